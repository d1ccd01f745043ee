"""SIGTERM and SIGINT as a wish to stop, which all ranks then follow at the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Within the block, the first SIGTERM or SIGINT is only noted; a second SIGINT interrupts at once.

    Attributes:
        received: 0, or the number of the signal. The exit code is 128 more: 143 or 130.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the handlers back; a second call does nothing."""
        while self._previous:
            signal.signal(*self._previous.popitem())
