"""What a run tells: metrics.jsonl, trackers, the progress bar, lines for the user; and which validation was the best."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from intarsia.distributed import Comm
from intarsia.metrics_log import MetricsLog
from intarsia.run_config import RunConfig
from intarsia.together import on_main
from intarsia.trackers import Trackers


class Journal:
    """Rank 0 writes; the other ranks take the same calls.

    Attributes:
        best: the best figure so far, None before the first validation.
        stale: validations since then.
        metrics: the file.
    """

    def __init__(self, folder: Path, config: RunConfig, comm: Comm, device: torch.device) -> None:
        self._comm, self._device, self._config = comm, device, config
        self.is_main = comm.rank == 0
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.trackers = Trackers(config.log.trackers if self.is_main else (), folder, config.to_dict(), self.say)
        self.best: float | None = None
        self.stale = 0
        self._bar: Any = None

    def say(self, line: str) -> None:
        """One line to the user, from rank 0, that does not break the progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)

    @contextmanager
    def progress(self, start: int, end: int) -> Iterator[Any]:
        """A bar on a terminal, nothing elsewhere."""
        from tqdm import tqdm

        with tqdm(total=end, initial=start, disable=not (self.is_main and sys.stderr.isatty()), unit="step") as self._bar:
            yield self._bar

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the trackers. ``step``: 0-based."""
        with on_main(str(self.metrics.path), self._comm, self._device):
            if self.is_main:
                self.metrics.append(step + 1, values)
                self.trackers.log(values, step + 1)
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4g}")

    def validated(self, step: int, figures: Mapping[str, float], best: str, higher: bool) -> bool:
        """Records the figures; True where ``figures[best]`` is the best so far."""
        self.record(step, {f"validation/{name}": value for name, value in figures.items()})
        value = figures[best]
        improved = value == value and (self.best is None or (value > self.best if higher else value < self.best))
        self.best, self.stale = (value, 0) if improved else (self.best, self.stale + 1)
        self.say(f"step {step + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()) + (" (best)" if improved else ""))
        return improved

    def draw_curves(self) -> None:
        """curves.png: each figure of metrics.jsonl over the steps. Nothing where there are none."""
        from intarsia.pictures import NoFiguresError, save_curves

        with suppress(NoFiguresError):
            save_curves(self.metrics.path.with_name("curves.png"), {"": self.metrics.path})

    @property
    def out_of_patience(self) -> bool:
        return 0 < self._config.log.patience <= self.stale
