"""metrics.jsonl: one JSON object per line, each with its ``step``; and the running means that fill it.

No wall-clock time stands in it, so that equal runs write equal files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.cli import RunError
from intarsia.disk import why_not_written
from intarsia.distributed import Comm
from intarsia.files import write_atomic


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line torn by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


class MetricsLog:
    """Appends to a metrics.jsonl. Values that are not finite are written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """One line, in one write. Raises RunError with the path, and with the bytes that are free where the disk is full."""
        tree = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = (json.dumps(tree, allow_nan=False) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise RunError(why_not_written(error, self.path, len(line))) from error

    def cut(self, step: int) -> None:
        """Removes the lines beyond ``step`` and a torn last one: a resumed run writes them again."""
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def flush_to_disk(self) -> None:
        """A checkpoint must not outlive the lines before it."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


class RunningMeans:
    """Sums of scalars as float64 tensors on their device; read, over all ranks, only when a line is due.

    The values of a step are staged and kept only if the step is. All ranks must add the same names.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self._staged: dict[str, Tensor] = {}

    def stage(self, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Adds ``weight`` times each value to this step's sums; weights add up to 1 over the parts of a step and the ranks."""
        for name, value in values.items():
            tensor = torch.as_tensor(value, device=self.device).detach().to(torch.float64) * weight
            self._staged[name] = self._staged[name] + tensor if name in self._staged else tensor

    def commit(self) -> None:
        for name, value in self._staged.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.steps[name] = self.steps.get(name, 0) + 1
        self._staged = {}

    def discard(self) -> None:
        self._staged = {}

    def fold(self, comm: Comm) -> dict[str, Tensor]:
        """Moves the sums of all ranks to rank 0 and returns them, with the counts of steps, as tensors for a checkpoint."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        total = comm.all_reduce_sum_(torch.stack([self.sums[name] for name in names]))
        for i, name in enumerate(names):
            self.sums[name] = total[i] if comm.rank == 0 else torch.zeros_like(total[i])
        folded = {f"sum/{name}": total[i].clone() for i, name in enumerate(names)}
        return folded | {f"steps/{name}": torch.tensor(self.steps[name]) for name in names}

    def restore(self, saved: Mapping[str, Tensor], comm: Comm) -> None:
        for key, value in saved.items():
            kind, _, name = key.partition("/")
            if kind == "sum":
                self.sums[name] = value.to(self.device) * (1.0 if comm.rank == 0 else 0.0)
            else:
                self.steps[name] = int(value)

    def read(self, comm: Comm) -> dict[str, float]:
        """The means over the steps since the last call, equal on all ranks (one host sync), and a fresh start."""
        folded = self.fold(comm)
        names = sorted(self.sums)
        values = torch.stack([folded[f"sum/{name}"] for name in names]).tolist() if names else []
        means = {name: value / self.steps[name] for name, value in zip(names, values, strict=True)}
        self.sums, self.steps = {}, {}
        return means
