"""What every benchmark shares: one pinned core, interleaved repeats, medians, and one line of JSON at the end.

``goals.yaml`` holds what the issues ask for: benchmark -> case -> {goal, issue}. A case without a goal is reported bare.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from intarsia import yaml_io

GOALS = Path(__file__).with_name("goals.yaml")
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True)
class Row:
    """One figure. ``value`` is the median of ``repeats``; ``holds`` is None where there is no goal."""

    case: str
    value: float
    unit: str
    goal: str | None
    holds: bool | None
    repeats: tuple[float, ...]


def pin() -> None:
    """One core and one thread, where the system lets a process choose: what is compared then has the same."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def interleaved(cases: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call: all cases in turn, ``repeats`` times, every second round backwards, after ``warmup`` unmeasured rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + repeats):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            gc.collect()
            start = time.perf_counter()
            cases[name]()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def load_goals() -> dict[str, dict[str, dict[str, Any]]]:
    """benchmark -> case -> {"goal": ">= 10", "issue": 3}."""
    return yaml_io.load(GOALS.read_text()) or {}


def meets(goal: str, value: float) -> bool:
    """Whether ``value`` fulfils a goal such as ">= 10"."""
    sign, number = goal.split()
    return bool(_COMPARE[sign](value, float(number)))


def row(benchmark: str, case: str, repeats: Sequence[float], unit: str) -> Row:
    """The median of ``repeats`` and what goals.yaml asks of it."""
    value = statistics.median(repeats)
    goal = load_goals().get(benchmark, {}).get(case, {}).get("goal")
    return Row(case, value, unit, goal, None if goal is None else meets(goal, value), tuple(repeats))


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each pair of neighbouring measurements: what disturbs the machine for long disturbs both."""
    return [a / b for a, b in zip(over, under, strict=True)]


def machine() -> dict[str, Any]:
    """What a reader must know to compare: no names of hosts or users."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    import torch

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in flags.split()],
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, numpy and the packages named."""
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "numpy", *packages)}


def show(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """A line for each figure; long benchmarks show them on stderr as they come."""
    for r in rows:
        goal = "" if r.goal is None else f"   goal {r.goal}: {'holds' if r.holds else 'MISSED'}"
        print(f"{r.case:<48} {r.value:>14,.4g} {r.unit}{goal}", file=file, flush=True)


def report(benchmark: str, rows: Sequence[Row], *packages: str) -> None:
    """A table on stdout, then the one line of JSON, in which ``holds`` tells whether a goal is met."""
    show(rows)
    tree = {"benchmark": benchmark, "rows": [asdict(r) for r in rows], "machine": machine(), "versions": versions(*packages)}
    print(json.dumps(tree), flush=True)
