"""Samples of a pipeline as files: ``python -m pipelines.sample --pipeline DIR --n 64 --out grid.png``.

``accelerate launch -m pipelines.sample --n 50000 --out DIR`` fills a folder with any number of processes: the same bytes as one
process writes. Interrupted, the same command goes on from there.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from intarsia.cli import Flags, RunError, UserError, parse, run_main
from intarsia.config import Config, Place, Seed
from intarsia.distributed import comm
from intarsia.files import DiskFullError, atomic, writable_folder
from intarsia.pictures import mosaic
from intarsia.processes import start
from intarsia.specs import SignalSpec
from pipelines.labels import class_index
from pipelines.outputs import CHANNELS
from pipelines.sample_set import PLAN, SHARD, Kind, SetPlan, agreed_plan, arrays, write_npz, write_set
from pipelines.sampling_config import ALIASES, SamplingConfig
from pipelines.two_stage import TwoStagePipeline

PROGRAM = "python -m pipelines.sample"
NUMBER, WHOLE = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*"), re.compile(r"-?\d+")


class SampleConfig(Config):
    """Draws samples from a pipeline and writes them."""

    pipeline: Place[str] = ""
    """Folder of a saved pipeline, or a Hub id such as user/name; the pipeline that ships with the package where empty."""
    revision: Place[str | None] = None
    """Commit, branch or tag of the Hub."""
    n: Annotated[int, Field(ge=1)] = 64
    """How many samples."""
    first: Annotated[int, Field(ge=0)] = 0
    """Index of the first one: sample i of a seed is always the same."""
    out: Place[str] = "grid.png"
    """A .png file for one grid, a .npz file for arrays, or a folder for many samples, which several processes can fill."""
    columns: Annotated[int | None, Field(ge=1)] = None
    """Columns of a grid (.png); nearly square by default."""
    label: str = ""
    """Class name, or index where no class has a number for a name; several joined by commas to be dealt in turn, or "all"; drawn by
    the training frequencies where empty."""
    seed: Seed | None = None
    """A fresh one by default, which is printed."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and the like."""
    format: Kind | None = None
    """In a folder: png, one per sample, or npz, a file with arrays per shard; png where null."""
    shard: Annotated[int | None, Field(ge=1)] = None
    """In a folder: consecutive samples that one process draws; 1000 where null."""
    batch_size: Place[Annotated[int | None, Field(ge=1)]] = None
    """How many are in the making at once; the samples do not depend on it. Fewer than the pipeline's micro_batch save no memory."""
    device: Place[str] = "auto"
    """auto, cpu, cuda; with one process also cuda:1, ..."""
    timeout: Place[Annotated[float, Field(gt=0)]] = 3600.0
    """Seconds after which a process that waits for another gives up: longer than a shard takes."""


def device_of(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def turns(text: str, classes: tuple[str, ...]) -> list[int] | None:
    """The classes that samples take in turn: one name or index for all, or several; None for an empty text.

    Where any class has a decimal number for a name, such as "10" or "-0.5", every word is a name: an index would pass for one.

    Raises ValueError for an unknown name, with those that there are, and for an index out of range.
    """
    if not text:
        return None
    if not classes:
        raise ValueError("label: no prior of this pipeline takes labels")

    numbered = any(NUMBER.fullmatch(name) for name in classes)

    def index(word: str) -> int:
        return class_index(word if numbered or not WHOLE.fullmatch(word) else int(word), classes)

    if "," not in text or any(text.casefold() == name.casefold() for name in classes):
        return list(range(len(classes))) if text == "all" and text not in classes else [index(text)]
    return [index(word.strip()) for word in text.split(",")]


def checked_out(out: str) -> Path:
    """The path to write to. Raises UserError naming ``out`` where that cannot be."""
    path = Path(out)
    is_file = path.suffix in (".png", ".npz")
    if path.is_dir() and is_file:
        raise UserError(f"out: {out} is a folder; expected a file, or a folder of another name")
    if not is_file and path.suffix and not path.is_dir() and not out.endswith("/"):
        raise UserError(f"out: {out!r} ends with {path.suffix!r}; expected .png, .npz, or a folder ({out}/)")
    writable_folder(path.parent if is_file else path, "out", UserError, make=False, own=None if is_file else (PLAN,), alone=True)
    return path


def check_idle(config: SampleConfig, path: Path, one_file: bool) -> None:
    """Raises UserError for an option that has no use for what is written to ``path``."""
    what = "a folder" if not one_file else "a grid" if path.suffix == ".png" else "a file of arrays"
    for name, has in (("columns", "a grid"), ("format", "a folder"), ("shard", "a folder")):
        if getattr(config, name) is not None and what != has:
            raise UserError(f"{name}: {config.out} is {what}; only {has} has it")


def check_pictures(signal: SignalSpec, out: str, one_file: bool) -> None:
    """Raises UserError naming ``out`` (a grid) or ``format`` (a folder of PNG files) for signals that are no such pictures."""
    if signal.kind == "image" and signal.channels in CHANNELS:
        return
    found = f"PNG files hold images of 1 or 3 channels; these are {signal.kind} of {signal.channels}"
    raise UserError(f"out: {out}: {found}; expected a .npz file" if one_file else f"format: png: {found}; expected --format npz")


def write_file(pipeline: TwoStagePipeline, path: Path, plan: SetPlan, columns: int | None) -> int:
    """Draws the samples and writes them into one file: a grid or arrays. Returns the seed."""
    label = plan.labels(plan.first, plan.n)
    rows = pipeline.stream(plan.n, first=plan.first, label=label, seed=plan.seed, batch_size=plan.batch_size, **plan.options)
    seed = pipeline.last_seed
    assert seed is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        if label is None and pipeline.classes:
            label = pipeline.labels(plan.n, first=plan.first, seed=seed).tolist()
        write_npz(path, arrays(pipeline, rows, plan.first, plan.n, label))
        return seed
    sheet = mosaic(torch.stack([x for _, x in rows]), min(plan.n, columns or math.ceil(math.sqrt(plan.n))))
    with atomic(path) as temporary:
        sheet.save(temporary, format="png")
    return seed


def run(config: SampleConfig, flags: Flags) -> None:
    """The script: all checks, then the pipeline, then the samples. Raises UserError or ValueError naming what is wrong."""
    for name in ("dry_run", "max_steps", "resume", "allow_low_space"):
        if getattr(flags, name) not in (None, False):
            raise UserError(f"--{name}: pipelines.sample has no use for it")
    path = checked_out(config.out)
    one_file = path.suffix in (".png", ".npz") and not path.is_dir()
    check_idle(config, path, one_file)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and one_file:
        raise UserError(f"out: {config.out} is one file, which {world} processes cannot write together; give a folder")
    device = device_of(config.device) if world == 1 else start(config.device, config.timeout)
    if config.pipeline:
        pipeline = TwoStagePipeline.from_pretrained(config.pipeline, revision=config.revision)
    else:
        pipeline = TwoStagePipeline.bundled()
    kind = config.format or "png"
    if path.suffix != ".npz" and (one_file or kind == "png"):
        check_pictures(pipeline.signal, config.out, one_file)
    label = turns(config.label, pipeline.classes)
    plan = SetPlan(
        n=config.n,
        first=config.first,
        seed=config.seed,
        label=None if label is None else tuple(label),
        options=config.sampling.given(),
        kind=kind,
        shard=config.shard or SHARD,
        batch_size=config.batch_size,
    )
    pipeline.stream(1, first=plan.first, label=plan.labels(plan.first, 1), seed=plan.seed, batch_size=plan.batch_size, **plan.options)
    if config.batch_size is not None and config.batch_size < pipeline.micro_batch and comm.rank == 0:
        padded = f"batch_size: {config.batch_size} is below the pipeline's micro_batch, {pipeline.micro_batch}, to which batches are padded"
        print(f"{padded}: it saves no memory; pipelines.assemble --micro_batch does", flush=True)
    pipeline.to(device)
    if flags.check:
        if not one_file:
            agreed_plan(path, plan, plan.tree(pipeline))
        if comm.rank == 0:
            print(f"{pipeline}: {config.n} samples would be written to {path}")
        return
    try:
        seed = write_file(pipeline, path, plan, config.columns) if one_file else write_set(pipeline, path, plan)
    except DiskFullError as error:
        raise RunError(f"{error}; the same command goes on from here") from error
    if comm.rank == 0:
        print(f"{config.n} samples of seed {seed}: {path}")


def main(argv: list[str] | None = None) -> None:
    run(*parse(SampleConfig, argv, ALIASES, PROGRAM))


if __name__ == "__main__":
    run_main(main)
