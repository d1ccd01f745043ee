"""A folder of samples, written by any number of processes: the same bytes as from one, and resumed where it was interrupted.

``plan.json`` comes first and says what is drawn; shards are fixed ranges of sample indices, dealt to the processes in turn;
``samples.json`` comes last, so that its presence means complete. Files are whole or absent.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from intarsia.cli import UserError
from intarsia.distributed import Comm, comm
from intarsia.files import atomic, json_bytes, read_json, write_atomic
from intarsia.lock import RunLock
from intarsia.together import on_main
from pipelines.options import plain_options, route_options
from pipelines.outputs import to_pil, to_uint8
from pipelines.two_stage import TwoStagePipeline

FORMAT, PLAN, FACTS = "samples/1", "plan.json", "samples.json"
Kind = Literal["png", "npz"]
SHARD = 1000  # samples per shard where nothing else is said


@dataclass(frozen=True)
class SetPlan:
    """What a folder of samples holds.

    Attributes:
        n, first: samples ``first`` to ``first + n - 1``.
        seed: None for that of the folder's plan, or a fresh one.
        label: the classes that are dealt in turn, sample 0 having the first; None for classes drawn by the training frequencies.
        options: sampling options of the call.
        kind: a PNG per sample, or a .npz file per shard.
        shard: samples per shard.
        batch_size: how many are in the making at once; no part of the plan.
    """

    n: int
    first: int
    seed: int | None
    label: tuple[int, ...] | None
    options: dict[str, Any]
    kind: Kind = "png"
    shard: int = SHARD
    batch_size: int | None = None

    def tree(self, pipeline: TwoStagePipeline) -> dict[str, Any]:
        """All that decides the bytes but the seed."""
        routed = route_options(pipeline.priors, pipeline.defaults, self.options)
        return {
            "format": FORMAT,
            "n": self.n,
            "first": self.first,
            "label": None if self.label is None else list(self.label),
            "classes": list(pipeline.classes),
            "files": self.kind,
            "shard": self.shard,
            "sampling": [plain_options(own) for own in routed],
            "micro_batch": pipeline.micro_batch,
            "device": pipeline.device.type,
            "threads": torch.get_num_threads() if pipeline.device.type == "cpu" else None,
            "fingerprint": pipeline.spec.fingerprint,
            "tokenizer": pipeline.tokenizer.weights_sha256,
            "priors": [prior.weights_sha256 for prior in pipeline.priors],
        }

    def count(self, start: int) -> int:
        """How many samples the shard from ``start`` has."""
        return min(self.shard, self.first + self.n - start)

    def names(self, start: int) -> list[str]:
        """The files of the shard from ``start``."""
        return [f"{i:06d}.{self.kind}" for i in (range(start, start + self.count(start)) if self.kind == "png" else (start,))]

    def labels(self, start: int, n: int) -> list[int] | None:
        """The classes of samples ``start`` to ``start + n - 1``, where they are given."""
        return None if self.label is None else [self.label[i % len(self.label)] for i in range(start, start + n)]


def agreed_plan(folder: Path, plan: SetPlan, tree: dict[str, Any]) -> dict[str, Any]:
    """What plan.json holds or is to hold: ``tree`` and the seed, the given or a fresh one; where it is there, it has to be this plan.

    Raises UserError naming all that differs. Plans that say nothing of device and threads are of any.
    """
    path = folder / PLAN
    if not path.exists():
        return tree | {"seed": secrets.randbits(32) if plan.seed is None else plan.seed}
    found = read_json(path, UserError)
    if not isinstance(found, dict) or not isinstance(found.get("seed"), int):
        raise UserError(f"{path}: holds no plan of samples; expected a new folder, or one of interrupted samples")
    mine = tree | {"seed": found["seed"] if plan.seed is None else plan.seed}
    for key in {"device", "threads"} - set(found):
        del mine[key]
    different = [
        f"{key} {_short(found.get(key))} there, {_short(mine.get(key))} now" for key in {**found, **mine} if found.get(key) != mine.get(key)
    ]
    if different:
        threads = found.get("threads")
        advice = "" if threads is None or threads == mine["threads"] else f" (OMP_NUM_THREADS={threads} sets the threads)"
        raise UserError(f"out: {path} is the plan of other samples: {'; '.join(different)}; expected the same, or another folder{advice}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_set(pipeline: TwoStagePipeline, folder: Path, plan: SetPlan, comm: Comm = comm) -> int:
    """Writes the samples that are missing; every process calls it. Returns the seed.

    Raises:
        UserError: ``folder`` holds samples of another plan, or another command writes there. DiskFullError: what is there stays,
            and the same call goes on.
    """
    tree = plan.tree(pipeline)
    lock: RunLock | None = None
    try:
        with on_main(f"out: {folder}", comm, pipeline.device):
            if comm.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                lock = RunLock(folder, "out")
        return _write_locked(pipeline, folder, plan, tree, comm)
    finally:
        if lock is not None:
            lock.path.unlink(missing_ok=True)  # a set is its samples and what they are
            lock.release()


def _write_locked(pipeline: TwoStagePipeline, folder: Path, plan: SetPlan, tree: dict[str, Any], comm: Comm) -> int:
    shards = range(plan.first, plan.first + plan.n, plan.shard)
    agreed = torch.zeros(1 + len(shards), dtype=torch.int64, device=pipeline.device)  # the seed, and which shards are missing
    facts: dict[str, Any] = {}
    with on_main(f"out: {folder}", comm, pipeline.device):
        if comm.rank == 0:
            facts = agreed_plan(folder, plan, tree)
            for torn in folder.glob(".tmp-*"):
                torn.unlink()
            if not (folder / PLAN).exists():
                write_atomic(folder / PLAN, json_bytes(facts))
            there = {path.name for path in folder.iterdir()}
            missing = [not there.issuperset(plan.names(start)) for start in shards]
            agreed.copy_(torch.tensor([facts["seed"], *missing], dtype=torch.int64))
    seed, *open_ = comm.broadcast_(agreed).tolist()
    to_do = [start for start, missing in zip(shards, open_, strict=True) if missing]
    for start in to_do[comm.rank :: comm.world_size]:  # dealt anew, so that no rank gets what is there and waits
        (write_pictures if plan.kind == "png" else write_arrays)(pipeline, folder, plan, seed, start, plan.count(start))
    comm.barrier()
    with on_main(f"out: {folder}", comm, pipeline.device):
        if comm.rank == 0 and not (folder / FACTS).exists():
            dealt = {"label": _labels(pipeline, plan, seed, plan.first, plan.n)} if plan.kind == "png" else {}
            write_atomic(folder / FACTS, json_bytes(facts | dealt))
    return seed


def _stream(pipeline: TwoStagePipeline, plan: SetPlan, seed: int, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
    label = plan.labels(start, count)
    return pipeline.stream(count, first=start, label=label, seed=seed, batch_size=plan.batch_size, **plan.options)


def _labels(pipeline: TwoStagePipeline, plan: SetPlan, seed: int, start: int, count: int) -> list[int] | None:
    """The classes of samples, given or drawn; None where no prior takes labels."""
    given = plan.labels(start, count)
    drawn = given is None and bool(pipeline.classes)
    return pipeline.labels(count, first=start, seed=seed).tolist() if drawn else given


def write_pictures(pipeline: TwoStagePipeline, folder: Path, plan: SetPlan, seed: int, start: int, count: int) -> None:
    """The PNGs of a shard from the first missing one to the last: they are written in order."""
    missing = [i for i in range(start, start + count) if not (folder / f"{i:06d}.png").exists()]
    if not missing:
        return
    for index, x in _stream(pipeline, plan, seed, missing[0], missing[-1] - missing[0] + 1):
        buffer = io.BytesIO()
        to_pil(x[None])[0].save(buffer, "PNG")
        write_atomic(folder / f"{index:06d}.png", buffer.getvalue())


def write_arrays(pipeline: TwoStagePipeline, folder: Path, plan: SetPlan, seed: int, start: int, count: int) -> None:
    """The .npz of a shard, where it is missing."""
    path = folder / f"{start:06d}.npz"
    if not path.exists():
        rows = _stream(pipeline, plan, seed, start, count)
        write_npz(path, arrays(pipeline, rows, start, count, _labels(pipeline, plan, seed, start, count)))


def arrays(
    pipeline: TwoStagePipeline, rows: Iterator[tuple[int, Tensor]], start: int, count: int, label: list[int] | None
) -> dict[str, np.ndarray]:
    """ "images" (n, H, W, C) uint8, or "x" (n, C, *axes) float of other signals; "index" and "label" (n,) where there are labels."""
    image = pipeline.signal.kind == "image"
    convert = to_uint8 if image else Tensor.numpy
    out: np.ndarray | None = None
    for index, x in rows:  # one array, filled as the samples come
        row = convert(x[None])[0]
        out = np.empty((count, *row.shape), row.dtype) if out is None else out
        out[index - start] = row
    assert out is not None
    found = {"images" if image else "x": out, "index": np.arange(start, start + count)}
    return found if label is None else found | {"label": np.array(label)}


def write_npz(path: Path, content: dict[str, np.ndarray]) -> None:
    """Whole or not at all; equal arrays make equal bytes."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **content)  # type: ignore[arg-type]
