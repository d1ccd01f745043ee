"""Samples of a pipeline as files: ``python -m pipelines.sample --pipeline DIR --n 64 --out grid.png``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import Flags, UserError, parse, run_main
from intarsia.config import Config, Place
from intarsia.files import atomic, json_bytes, write_atomic
from intarsia.pictures import mosaic
from pipelines.labels import class_index
from pipelines.outputs import check_output, to_pil, to_uint8
from pipelines.two_stage import TwoStagePipeline

FACTS = "samples.json"
OPTIONS = ("temperature", "top_k", "top_p", "guidance")


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
    """A .png file for one grid, a .npz file for arrays, or a folder for a PNG per sample."""
    columns: Annotated[int | None, Field(ge=1)] = None
    """Columns of the grid; nearly square by default."""
    label: str = ""
    """Class name or index, several joined by commas to be dealt in turn, or "all"; drawn by the training frequencies where empty."""
    seed: Annotated[int | None, Field(ge=0)] = None
    """A fresh one by default, which is printed."""
    temperature: float | None = None
    """Divides the logits; 0 takes the most probable code."""
    top_k: int | None = None
    """Keep the k most probable codes."""
    top_p: float | None = None
    """Keep the most probable codes up to this mass."""
    guidance: float | None = None
    """Strength of the label; 1 is off."""
    batch_size: Place[Annotated[int | None, Field(ge=1)]] = None
    """How many are in the making at once; the samples do not depend on it."""
    device: Place[str] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


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


def labels_of(text: str, classes: tuple[str, ...], n: int) -> list[int] | None:
    """The class of each sample: one name or index for all, or several in turn. Raises ValueError for an unknown one."""
    if not text:
        return None
    if not classes:
        raise ValueError("label: no prior of this pipeline takes labels")

    def index(word: str) -> int:
        known = any(word.casefold() == name.casefold() for name in classes)
        return class_index(int(word) if not known and word.lstrip("-").isdecimal() else word, classes)

    if "," not in text or any(text.casefold() == name.casefold() for name in classes):
        found = list(range(len(classes))) if text == "all" and text not in classes else [index(text)]
    else:
        found = [index(word.strip()) for word in text.split(",")]
    return [found[i % len(found)] for i in range(n)]


def checked_out(out: str) -> Path:
    """The path to write to. Raises UserError naming ``out`` where that cannot be."""
    path = Path(out)
    is_file = path.suffix in (".png", ".npz")
    if path.is_dir() and is_file:
        raise UserError(f"out: {out} is a folder; expected a file, or a folder of another name")
    if not is_file and path.suffix and not path.is_dir() and not out.endswith("/"):
        raise UserError(f"out: {out!r} ends with {path.suffix!r}; expected .png, .npz, or a folder ({out}/)")
    if not is_file and path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "a folder that holds files already" if path.is_dir() else "a file"
        raise UserError(f"out: {out} is {found}; expected a new or empty folder")
    above = next(p for p in (path if path.is_dir() else path.absolute().parent, *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"out: {above} is {'not writable' if above.is_dir() else 'a file'}; {out} cannot be written")
    return path


def write_samples(pipeline: TwoStagePipeline, path: Path, config: SampleConfig, request: dict[str, Any]) -> None:
    """Draws the samples and writes them: a grid, arrays, or a folder of pictures."""
    rows = pipeline.stream(**request)  # fixes the seed
    seed = pipeline.last_seed
    assert seed is not None
    label = request["label"]
    if label is None and pipeline.classes:
        label = pipeline.labels(config.n, first=config.first, seed=seed).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png" and not path.is_dir():
        sheet = mosaic(torch.stack([x for _, x in rows]), min(config.n, config.columns or math.ceil(math.sqrt(config.n))))
        with atomic(path) as temporary:
            sheet.save(temporary, format="png")
    elif path.suffix == ".npz" and not path.is_dir():
        arrays = {"images" if pipeline.signal.kind == "image" else "x": stacked(pipeline, rows, config)}
        arrays["index"] = np.arange(config.first, config.first + config.n)
        if label is not None:
            arrays["label"] = np.array(label)
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    else:
        path.mkdir(exist_ok=True)
        for index, x in rows:
            to_pil(x[None])[0].save(path / f"{index:06d}.png")
        facts = {"n": config.n, "first": config.first, "seed": seed, "classes": list(pipeline.classes), "label": label}
        facts |= {name: value for name, value in request.items() if name in OPTIONS} | {"fingerprint": pipeline.spec.fingerprint}
        write_atomic(path / FACTS, json_bytes(facts))  # last: its presence means complete
    print(f"{config.n} samples of seed {seed}: {path}")


def stacked(pipeline: TwoStagePipeline, rows: Iterator[tuple[int, Tensor]], config: SampleConfig) -> np.ndarray:
    """(n, H, W, C) uint8 of images, (n, C, *axes) float32 of other signals; one array, filled as the samples come."""
    convert = to_uint8 if pipeline.signal.kind == "image" else Tensor.numpy
    out: np.ndarray | None = None
    for index, x in rows:
        row = convert(x[None])[0]
        out = np.empty((config.n, *row.shape), row.dtype) if out is None else out
        out[index - config.first] = row
    assert out is not None
    return out


def run(config: SampleConfig, flags: Flags) -> None:
    """The script: all checks, then the pipeline, then the samples. Raises UserError or ValueError naming what is wrong."""
    for name in ("dry_run", "max_steps", "resume", "allow_low_space"):
        if getattr(flags, name) not in (None, False):
            raise UserError(f"--{name}: pipelines.sample has no use for it")
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE: {world} processes; pipelines.sample runs as one, with --first for a part of the samples")
    path = checked_out(config.out)
    device = device_of(config.device)
    if config.pipeline:
        pipeline = TwoStagePipeline.from_pretrained(config.pipeline, revision=config.revision)
    else:
        pipeline = TwoStagePipeline.bundled()
    if path.suffix != ".npz":
        check_output("pil", pipeline.signal)
    request: dict[str, Any] = {"n": config.n, "first": config.first, "seed": config.seed, "batch_size": config.batch_size}
    request |= {"label": labels_of(config.label, pipeline.classes, config.n)}
    request |= {name: getattr(config, name) for name in OPTIONS if getattr(config, name) is not None}
    if flags.check:
        pipeline.stream(**request)
        print(f"{pipeline}: {config.n} samples would be written to {path}")
        return
    write_samples(pipeline.to(device), path, config, request)


def main(argv: list[str] | None = None) -> None:
    run(*parse(SampleConfig, argv, program="python -m pipelines.sample"))


if __name__ == "__main__":
    run_main(main)
