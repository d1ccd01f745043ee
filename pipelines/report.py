"""One table of several pipelines: ``python -m pipelines.report --evaluations runs/a/evaluation,runs/b/evaluation --out table.md``.

Each folder is one that ``pipelines.evaluate`` wrote. Rows are pipelines, tokenizer by prior; figures that do not compare with
each other (other features, other n, other data) are refused unless ``--mixed true``, which then names them in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from intarsia.cli import UserError, parse, run_main
from intarsia.config import Config, Place
from intarsia.files import read_json, write_atomic
from pipelines.evaluation.timing import TIMING
from pipelines.paths import split_paths

PROGRAM = "python -m pipelines.report"
FIGURES = "evaluation.json"
MAX_BYTES = 1 << 24


class ReportConfig(Config):
    """Collects the evaluations of several pipelines into one Markdown table."""

    evaluations: Place[Annotated[str, Field(min_length=1)]]
    """Folders of pipelines.evaluate, joined by commas, in the order of the rows."""
    mixed: bool = False
    """Allow figures of different features, n or data in one table, each row saying which."""
    out: Place[str] = ""
    """The Markdown file to write; only printed where empty."""


@dataclass(frozen=True)
class Row:
    """The figures of one pipeline.

    Attributes:
        basis: name -> value of what has to be equal for figures to compare: features, n, reference, split, data.
        cells: heading -> text.
    """

    folder: str
    basis: Mapping[str, str]
    cells: Mapping[str, str]


def read_row(folder: str) -> Row:
    """Raises UserError naming the file that is missing, or the figure that it lacks."""
    path = Path(folder) / FIGURES
    if not path.is_file():
        raise UserError(f"evaluations: {path}: there is no such file; expected a folder that pipelines.evaluate wrote")
    tree = read_json(path, UserError, MAX_BYTES)
    clock = Path(folder) / TIMING
    spent = read_json(clock, UserError) if clock.is_file() else None
    try:
        figures, counts = tree["samples"], tree["samples"]["counts"]
        basis = {
            "features": figures["features"]["name"],
            "n": str(counts["samples"]),
            "reference": f"{counts['reference']} {tree['reference']} {tree['data']['splits'][tree['reference']]['sha256'][:8]}",
            "classes": "balanced" if tree["balanced"] else "as they come",
            "k": str(figures["precision_recall"]["k"]),
            "split": tree["split"],
            "data": f"{tree['data'].get('name') or tree['data']['type']} {tree['data']['splits'][tree['split']]['sha256'][:8]}",
        }
        return Row(folder, basis, _cells(tree, figures, spent))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no evaluation of this version: {error} is missing; run pipelines.evaluate again") from None


def _cells(tree: Mapping[str, Any], figures: Mapping[str, Any], spent: Mapping[str, Any] | None) -> dict[str, str]:
    tokenizer, priors = tree["pipeline"]["tokenizer"], tree["pipeline"]["priors"]
    modelled = {name for prior in priors for name in prior["levels"]}
    levels = [level for level in tokenizer["levels"] if level["name"] in modelled]
    grids = " + ".join(f"{'x'.join(map(str, level['shape']))} of {level['vocab']}" for level in levels)
    total = tree["bits"]["total"]
    bits = f"{total['bits_per_image']:.1f}"
    options = ", ".join(f"{name} {value}" for name, value in tree["sampling"].items())
    agreement = figures.get("agreement", {}).get("samples")
    return {
        "tokenizer": f"{tokenizer['type']}, {grids}",
        "prior": " + ".join(f"{prior['type']} ({', '.join(prior['levels'])})" for prior in priors) + (f"; {options}" if options else ""),
        "PSNR dB": f"{tree['reconstruction']['psnr']:.2f}",
        "bits per image": f"<= {bits} (bound)" if total["is_bound"] else bits,
        "Frechet distance": _interval(figures["frechet"]["samples"]),
        "share of the baseline's": f"{figures['frechet_ratio_to_baseline']['value']:.3f}",
        "recall": f"{figures['precision_recall']['samples']['recall']['value']:.3f}",
        "agreement": "" if agreement is None else f"{agreement['value']:.3f}",
        "s per 1,000 samples": "" if spent is None else f"{spent['seconds_per_1000_samples']:.3g} ({spent['device']}, {spent['threads']})",
    }


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def markdown(rows: Sequence[Row], mixed: bool = False) -> str:
    """The table, and a line that says what all figures were measured with.

    Raises UserError where rows do not compare with the first and ``mixed`` is False.
    """
    first = rows[0]
    different = [(row, key) for row in rows for key in row.basis if row.basis[key] != first.basis[key]]
    if different and not mixed:
        row, key = different[0]
        raise UserError(
            f"evaluations: {row.folder} has {key} {row.basis[key]!r}, {first.folder} {first.basis[key]!r}: the figures do not compare;"
            " --mixed true puts them in one table all the same"
        )
    varying = list(dict.fromkeys(key for _, key in different))
    cells = [dict(row.cells) | {key: row.basis[key] for key in varying} for row in rows]
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(one.values()) for one in cells)]
    same = "; ".join(f"{key}: {value}" for key, value in first.basis.items() if key not in varying)
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return (
        f"{table}\n\nOf every row: {same}. Brackets hold 95 % bootstrap intervals; times are of drawing and decoding (device, threads).\n"
    )


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(ReportConfig, argv, program=PROGRAM)
    rows = [read_row(folder) for folder in split_paths(config.evaluations)]
    text = markdown(rows, config.mixed)
    print(text, end="")
    if config.out and not (flags.check or flags.dry_run):
        Path(config.out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.out), text.encode())


if __name__ == "__main__":
    run_main(main)
