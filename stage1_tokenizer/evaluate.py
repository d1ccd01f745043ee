"""Figures and pictures of a trained tokenizer: ``accelerate launch -m stage1_tokenizer.evaluate --tokenizer runs/tok``.

PSNR and SSIM on a split, how the codes are used on it and on the train split, and of several levels what each is worth. Any
number of processes gives the same figures: each takes a share of the samples, and sums are added up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import UserError, parse, run_main
from intarsia.config import Config, ConfigError, Place
from intarsia.distributed import Comm, comm
from intarsia.files import EVALUATED, finite_or_null, json_bytes, writable_folder, write_atomic
from intarsia.order import share
from intarsia.pictures import save_codebook, save_strips
from intarsia.processes import start
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig, Split
from stage1_tokenizer.data.near_duplicates import without_near_duplicates
from stage1_tokenizer.levels import LevelMetrics, partners, prefix_rows, swapped_rows
from stage1_tokenizer.levels import lines as level_lines
from stage1_tokenizer.metrics import CodeMetrics, ReconstructionMetrics, unit
from stage1_tokenizer.run_data import check_signal, needed_data, with_run_data
from stage1_tokenizer.sizes import rows_at_once
from stage1_tokenizer.tokenizers.base import Tokenizer

PROGRAM = "python -m stage1_tokenizer.evaluate"
SHOWN_CODES = 4096
TILE_CELLS, TILE_PIXELS = 2, 8


class EvaluateConfig(Config):
    """Reconstruction and usage of a trained tokenizer."""

    tokenizer: Place[Annotated[str, Field(min_length=1)]]
    """A run folder, the folder of a release, or a Hub id: user/name, user/name@revision, user/name//subfolder."""
    data: SourceConfig | None = None
    """The data source; that of the tokenizer's run where it is not given, with ``--data.*`` flags on top of it."""
    split: Literal["train", "validation", "test"] = "validation"
    """What is reconstructed."""
    out: Place[str | None] = None
    """The folder for evaluation.json and pictures; ``evaluation/SPLIT`` in the run folder where it is not given."""
    pictures: Place[Annotated[int, Field(ge=0)]] = 32
    """Samples in reconstructions.png; 0 = no pictures."""
    device: Place[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: CUDA where there is one."""
    timeout: Place[Annotated[float, Field(gt=0)]] = 300.0
    """Seconds after which a process that waits for another gives up."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over one split, complete on every rank.

    Attributes:
        reconstruction: None where only codes were counted.
        levels: None there, and where there is one level that has no prefixes.
    """

    reconstruction: ReconstructionMetrics | None
    codes: CodeMetrics
    levels: LevelMetrics | None


def _rows(split: Split, size: int, comm: Comm) -> Iterator[Tensor]:
    """This rank's share of a split, as numbers of samples, ``size`` at a time."""
    mine = share(len(split), comm.rank, comm.world_size)
    yield from torch.arange(mine.start, mine.stop).split(size) if mine.stop > mine.start else ()


def evaluate(tokenizer: Tokenizer, split: Split, *, reconstruct: bool = True, comm: Comm = comm) -> Evaluation:
    """Encodes a split and, with ``reconstruct``, decodes it again; each rank calls it.

    Reconstructions are clamped to the range of the data before they are compared. Signals are compared on a scale where the
    range [-1, 1] is [0, 1], and MAX is 1.
    """
    metrics, codes = ReconstructionMetrics(tokenizer.device), CodeMetrics(tokenizer.level_specs(), tokenizer.device)
    levels = LevelMetrics(tokenizer, len(split))
    for rows in _rows(split, rows_at_once(tokenizer.signal, tokenizer.config.micro_batch), comm):
        x = split.batch(rows)["x"].to(tokenizer.device)
        found = tokenizer.encode(x)
        codes.update(found)
        if reconstruct:
            metrics.update(unit(x), unit(tokenizer.decode(found).to(x.dtype)))
        if reconstruct and levels:
            others = tokenizer.encode(split.batch(partners(rows, len(split)))["x"].to(tokenizer.device)) if levels.swaps else []
            levels.update(x, found, others)
    codes.all_reduce_(comm)
    if not reconstruct:
        return Evaluation(None, codes, None)
    return Evaluation(metrics.all_reduce_(comm), codes, levels.all_reduce_(comm) if levels else None)


def decoded_codes(tokenizer: Tokenizer, counts: list[Tensor], level: int, limit: int = SHOWN_CODES) -> Tensor:
    """(m, C, h, w) in [0, 1]: the ``limit`` most frequent codes of a level as the decoder draws them, by falling frequency.

    A code is drawn as the middle of an image whose grid of that level holds nothing else; all other levels hold their most
    frequent code. The level has as many axes as the signal.

    Args:
        counts: for each level (vocab,), how often each code occurs.
    """
    specs = tokenizer.level_specs()
    chosen = counts[level].argsort(descending=True, stable=True)[:limit].to(tokenizer.device)
    window = []
    for side, cells in zip(tokenizer.signal.shape, specs[level].shape, strict=True):
        size = min(side, max(TILE_PIXELS, TILE_CELLS * side // cells))
        window.append(slice((side - size) // 2, (side - size) // 2 + size))
    tiles = []
    for part in chosen.split(rows_at_once(tokenizer.signal, tokenizer.config.micro_batch)):
        grids = []
        for number, spec in enumerate(specs):
            fill = part if number == level else counts[number].argmax().to(part.device).expand(len(part))
            grids.append(fill.view(-1, *[1] * len(spec.shape)).expand(-1, *spec.shape).contiguous())
        tiles.append(unit(tokenizer.decode(grids))[(slice(None), slice(None), *window)].cpu())
    return torch.cat(tiles)


def _shown(split: Split, n: int) -> Tensor:
    """``n`` samples, evenly spaced over the split, so that sorted classes all occur."""
    return torch.linspace(0, len(split) - 1, min(n, len(split))).round().long().unique()


def draw_reconstructions(path: Path, tokenizer: Tokenizer, split: Split, n: int, title: str = "") -> None:
    """``n`` images above their reconstructions: from leading levels alone, where these decode, and from all."""
    x = split.batch(_shown(split, n))["x"].to(tokenizer.device)
    codes = tokenizer.encode(x)
    save_strips(
        path, {"original": unit(x), **prefix_rows(tokenizer, codes), "reconstruction": unit(tokenizer.decode(codes))}, title=title
    )


def draw_swapped(path: Path, tokenizer: Tokenizer, split: Split, n: int, title: str = "") -> None:
    """``n`` images above the samples they swap codes with, and above what they become with the others' codes of one level."""
    rows = _shown(split, n)
    x, other = (split.batch(r)["x"].to(tokenizer.device) for r in (rows, partners(rows, len(split))))
    codes, others = tokenizer.encode(x), tokenizer.encode(other)
    own = {"reconstruction": unit(tokenizer.decode(codes)), "the other": unit(tokenizer.decode(others))}
    save_strips(path, own | swapped_rows(tokenizer, codes, others), title=title)


def draw_codebook(path: Path, tokenizer: Tokenizer, codes: CodeMetrics, title: str = "") -> None:
    """Usage of every level and its codes as the decoder draws them; nothing where a vocabulary is too large for a table.

    Codes have pictures where they are places of an image: on a grid of two axes, not in a row of tokens.
    """
    tables = [tally.table for tally in codes.tallies if tally.table is not None]
    if len(tables) < len(codes.levels):
        return
    levels = [
        (level.name, tables[i].cpu(), decoded_codes(tokenizer, tables, i) if tokenizer.signal.drawable and len(level.shape) == 2 else None)
        for i, level in enumerate(codes.levels)
    ]
    hidden = max(level.vocab for level in codes.levels) > SHOWN_CODES
    save_codebook(path, levels, title=title, note=f"the {SHOWN_CODES} most frequent codes are drawn" if hidden else "")


def report(tokenizer: Tokenizer, source: Source, split: str, comm: Comm = comm) -> tuple[dict[str, Any], CodeMetrics]:
    """The figures as a plain tree, and the counts of the train codes. Each rank calls it; all get the same."""
    check_signal(tokenizer, source)
    held = evaluate(tokenizer, source.split(split), comm=comm)
    train = held if split == "train" else evaluate(tokenizer, source.split("train"), reconstruct=False, comm=comm)
    assert held.reconstruction is not None
    figures = held.reconstruction.compute()
    prefixes, swaps = ([], []) if held.levels is None else held.levels.compute(figures["psnr"], held.codes.compute())
    usage = {"train": train.codes} | {split: held.codes}
    tree = {
        "tokenizer": {"type": tokenizer.type_name, "fingerprint": tokenizer.fingerprint, "sha256": tokenizer.weights_sha256},
        "data": source.describe(),
        "split": split,
        "reconstruction": figures,
        "prefixes": [asdict(prefix) for prefix in prefixes],
        "swaps": [asdict(swap) for swap in swaps],
        "codes": {name: [asdict(level) for level in codes.compute()] for name, codes in usage.items()},
    }
    if (far := without_near_duplicates(source, split)) is not None:  # the same on every rank
        apart = evaluate(tokenizer, far, comm=comm).reconstruction
        assert apart is not None
        tree["reconstruction_without_near_duplicates"] = apart.compute()
    return tree, train.codes


def table(tree: dict[str, Any]) -> str:
    """The figures as lines of text."""
    found = tree["reconstruction"]
    lines = [
        f"{found['samples']} {tree['split']} samples: PSNR {found['psnr']:.2f} dB (mean per sample), {found['psnr_pooled']:.2f} dB (pooled)"
        + (f", SSIM {found['ssim']:.4f} (11x11 Gaussian, inside the border)" if "ssim" in found else "")
    ]
    if (far := tree.get("reconstruction_without_near_duplicates")) is not None:
        quality = f"PSNR {far['psnr']:.2f} dB, {far['psnr_pooled']:.2f} dB (pooled)"
        lines.append(f"{far['samples']} of them without a near neighbour in train: {quality}")
    lines += level_lines(tree)
    for split, levels in tree["codes"].items():
        for level in levels:
            lines.append(
                f"{split} codes, level {level['name']}: {level['used']} of {level['vocab']} used ({level['usage']:.1%}), perplexity"
                f" {level['perplexity']:.1f}, entropy {level['entropy_bits']:.3f} bits per code, {level['bits_per_image']:.1f} of"
                f" {level['nominal_bits_per_image']:.1f} bits per sample"
            )
    return "\n".join(lines)


def out_folder(config: EvaluateConfig) -> Path:
    """Where to write. Raises ConfigError where that is not said and ``tokenizer`` is no run folder."""
    if config.out is not None:
        return Path(config.out)
    if not (Path(config.tokenizer) / "config.yaml").is_file():
        raise ConfigError([f"out: {config.tokenizer} is no run folder; say where to write"])
    return Path(config.tokenizer) / "evaluation" / config.split


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(EvaluateConfig, with_run_data(list(sys.argv[1:] if argv is None else argv)), program=PROGRAM)
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: an evaluation has no steps"])
    data = needed_data(config.data, config.tokenizer)
    out = out_folder(config)
    device = start(config.device, config.timeout)
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    source = SOURCES.build(data)
    if comm.rank == 0:
        rows = ", ".join(f"{len(source.split(name))} {name}" for name in source.splits)
        print(f"{tokenizer.type_name} {tokenizer.fingerprint[:12]}: {rows}", flush=True)
    source.split(config.split)
    check_signal(tokenizer, source)
    checked = flags.check or flags.dry_run
    writable_folder(out, "out", UserError, make=comm.rank == 0 and not checked, own=EVALUATED)
    if checked:
        return
    tree, train_codes = report(tokenizer.to(device), source, config.split)
    if comm.rank != 0:
        return
    write_atomic(out / "evaluation.json", json_bytes(finite_or_null(tree)))
    if config.pictures:
        draw_codebook(out / "codebook.png", tokenizer, train_codes, title="Codebook on the train codes")
        if tokenizer.signal.drawable:
            title = f"{config.split.capitalize()} images and their reconstructions"
            draw_reconstructions(out / "reconstructions.png", tokenizer, source.split(config.split), config.pictures, title)
        if tokenizer.signal.drawable and len(tokenizer.level_specs()) > 1:
            title = f"{config.split.capitalize()} images with another one's codes of one level"
            draw_swapped(out / "swapped.png", tokenizer, source.split(config.split), config.pictures, title)
    print(table(tree))
    print(f"{out / 'evaluation.json'} written", flush=True)


if __name__ == "__main__":
    run_main(main)
