"""One run per folder: a POSIX record lock, which the kernel frees the moment its holder dies, however it dies.

``flock`` would be inherited by forked workers and outlive the trainer. A record lock is lost when its process closes any
descriptor of the file, so that the holder's particulars stand in a second file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from intarsia.cli import UserError

_held: set[Path] = set()  # record locks do not keep a process from itself


class RunLock:
    """Holds ``folder/.lock`` from construction to ``release``.

    Args:
        argument: what named the folder, for messages.

    Raises:
        UserError: where another run holds it, naming its pid, host and start.
    """

    def __init__(self, folder: Path, argument: str = "run") -> None:
        self.path = folder.resolve() / ".lock"
        self._holder = self.path.with_name(".lock.json")
        if self.path in _held:
            raise UserError(f"{argument}: {folder} is in use by this process (pid {os.getpid()})")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{argument}: {folder} cannot be locked: {error.strerror}") from error
            raise UserError(f"{argument}: {folder} is in use by {self._describe()}") from None
        _held.add(self.path)
        self._pid = os.getpid()
        self._holder.write_text(json.dumps({"pid": self._pid, "host": socket.gethostname(), "start": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))

    def _describe(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"the run with pid {holder['pid']} on {holder['host']}, started {holder['start']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another run that has only just started"

    def release(self) -> None:
        """Frees the folder; a second call does nothing, nor does one in a forked child."""
        if self._pid != os.getpid() or self.path not in _held:
            return
        _held.discard(self.path)
        self._holder.unlink(missing_ok=True)
        os.close(self._descriptor)
