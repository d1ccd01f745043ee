"""Figures and pictures of a trained pipeline: ``python -m pipelines.evaluate --pipeline DIR --out DIR``.

Reconstruction (PSNR, SSIM, usage), bits of the priors, and how samples compare with real images in the features of a named
model: Frechet distance, precision, recall, label agreement, distance to the nearest training images. Beside each figure of
the samples stands that of the baseline without a prior: codes drawn independently per position and class.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import UserError, parse, run_main
from intarsia.config import ConfigError, Place
from intarsia.files import EVALUATED, finite_or_null, json_bytes, writable_folder, write_atomic
from intarsia.machine import SPARE_BYTES
from intarsia.pictures import save_grid, save_strips
from intarsia.specs import SignalSpec
from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.bits import bits_report
from pipelines.evaluation.features import FeatureModel, load_features
from pipelines.evaluation.neighbours import Nearest
from pipelines.evaluation.passes import baseline_batches, evaluate_held_out, search_train
from pipelines.evaluation.report import describe_pipeline, memorisation_figures, sample_figures, table
from pipelines.evaluation.sets import ImageSet, balanced_labels, measure
from pipelines.evaluation.settings import (
    HeldOutName,
    MeasureConfig,
    Reference,
    check_fit,
    check_script,
    choose_reference,
    data_name,
    load_pipeline,
    measure_reference,
    measure_samples,
)
from pipelines.evaluation.timing import TIMING, timing
from pipelines.options import merged_options
from pipelines.sample import device_of
from pipelines.sampling_config import ALIASES
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import SOURCES, Source
from stage1_tokenizer.metrics import CodeMetrics, unit

PROGRAM = "python -m pipelines.evaluate"
FIGURES = "evaluation.json"
SHOWN = 16  # samples of each kind in nearest.png
COLUMNS, ROWS = 10, 30  # of samples.png and baseline.png


class EvaluateConfig(MeasureConfig):
    """Evaluates a pipeline on a data set."""

    pipeline: Place[str] = ""
    """Folder of a saved pipeline, or a Hub id; the pipeline that ships with the package where empty."""
    split: HeldOutName = "validation"
    """Held-out images: reconstruction, bits, real figures."""
    out: Place[Annotated[str, Field(min_length=1)]] = "evaluation"
    """The folder for evaluation.json, timing.json and pictures."""


@dataclass(frozen=True)
class Evaluation:
    """The figures as a plain tree, and what the pictures are drawn from.

    Attributes:
        samples: with all images.
        baseline: with its first images.
        seconds: that drawing and decoding the samples took.
        nearest: space -> for each sample the row of the nearest train image; ``order`` are the samples by distance in pixels.
    """

    tree: dict[str, Any]
    samples: ImageSet
    baseline: ImageSet
    seconds: float
    nearest: dict[str, Tensor]
    order: Tensor


def checked_reference(pipeline: TwoStagePipeline, source: Source, config: EvaluateConfig) -> Reference:
    """The reference images; raises ValueError for all that keeps these figures from being measured, before any work."""
    check_fit(pipeline, source)
    if (held := len(source.split(config.split))) < 2:
        raise ConfigError([f"split: {config.split} has {held} image(s); figures need at least 2"])
    chosen = choose_reference(source, config, bool(pipeline.classes))
    pipeline.stream(1, label=chosen.labels(pipeline, 1, config.seed), seed=config.seed, **config.sampling.given())
    return chosen


def check_room(folder: Path, signal: SignalSpec, n: int, allow_low_space: bool) -> None:
    """Raises UserError naming ``out`` where the folder's disk has no room for ``n`` images of 8 bits."""
    needed, free = SPARE_BYTES + n * signal.channels * math.prod(signal.shape), shutil.disk_usage(folder).free
    if free < needed and not allow_low_space:
        raise UserError(f"out: {folder}: {needed} bytes are needed for {n} images, {free} are free; --allow_low_space starts anyway")


def evaluate_pipeline(
    pipeline: TwoStagePipeline, source: Source, model: FeatureModel, config: EvaluateConfig, folder: Path | None = None
) -> Evaluation:
    """All figures. The pipeline stays on its device; ``config`` says how many, which splits and which seed.

    Args:
        folder: of temporary files; the system's where None.
    """
    chosen = checked_reference(pipeline, source, config)
    held_split, train = source.split(config.split), source.split("train")
    balanced = chosen.balanced

    print(f"drawing {config.n} samples", flush=True)
    asked = chosen.labels(pipeline, config.n, config.seed)
    samples, seconds = measure_samples(pipeline, config, chosen, model, kept=True, folder=folder)

    print(f"reconstructing {len(held_split)} {config.split} images and searching {len(train)} train images", flush=True)
    held = evaluate_held_out(pipeline, held_split, model)
    assert samples.pixels is not None and held.reconstructions.pixels is not None
    queries = {
        "features": Nearest(torch.cat([samples.features, held.reconstructions.features])),
        "pixels": Nearest(torch.cat([samples.pixels, held.reconstructions.pixels])),
    }
    train_codes = search_train(pipeline, train, model, queries)

    print("drawing the baseline", flush=True)
    levels = pipeline.spec.levels
    modelled = slice(pipeline.priors[-1].levels.stop)
    baseline = IndependentCodes(levels[modelled], train_codes[modelled], train.labels, len(source.classes))
    drawn = asked if asked is not None else baseline.draw_labels(torch.arange(config.n), config.seed)
    batches = baseline_batches(pipeline, baseline, config.n, drawn, config.seed)
    independent = measure("baseline", batches, model, images=COLUMNS * ROWS, folder=folder, balanced=balanced)
    reference = measure_reference(source, config, chosen, model)

    print("figures", flush=True)
    sets = {"samples": samples, "baseline": independent, "reconstructions": held.reconstructions, "real": held.real}
    usage = {"train": CodeMetrics(levels), config.split: CodeMetrics(levels)}
    usage["train"].update(train_codes)
    usage[config.split].update(held.codes)
    tree: dict[str, Any] = {
        "pipeline": describe_pipeline(pipeline),
        "data": source.describe(),
        "split": config.split,
        "reference": config.reference,
        "seed": config.seed,
        "balanced": balanced,
        "sampling": merged_options(pipeline.priors, pipeline.defaults, config.sampling.given()),
        "reconstruction": held.reconstruction.compute() | {"levels": [level.name for level in levels[modelled]]},
        "codes": {name: [asdict(level) for level in counts.compute()] for name, counts in usage.items()},
        "bits": bits_report(pipeline, baseline, held.codes, held.labels, config.bootstrap, config.seed),
        "samples": sample_figures(
            model,
            reference,
            sets,
            classes=source.classes,
            own_split="real" if config.reference == config.split else "",
            k=config.k,
            replicates=config.bootstrap,
            seed=config.seed,
        ),
        "memorisation": memorisation_figures(
            {space: found.distance for space, found in queries.items()}, config.n, len(train), config.bootstrap, config.seed
        ),
    }
    nearest = {space: found.index[: config.n] for space, found in queries.items()}
    order = queries["pixels"].distance[: config.n].argsort(stable=True)
    return Evaluation(tree, samples, independent, seconds, nearest, order)


def draw(evaluation: Evaluation, source: Source, out: Path) -> None:
    """samples.png and baseline.png (a row per class), nearest.png (samples above the train images that are nearest to them)."""
    _draw_rows(evaluation.samples, source.classes, out / "samples.png", "Samples")
    _draw_rows(evaluation.baseline, source.classes, out / "baseline.png", "Codes drawn independently per position and class: no prior")
    images, train = evaluation.samples.images, source.split("train")
    assert images is not None
    spread = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    chosen = torch.cat([evaluation.order[:SHOWN], spread])
    strips = {"sample": images[chosen].float() / 255}
    for space, rows in evaluation.nearest.items():
        strips[f"nearest, {space}"] = unit(train.batch(rows[chosen])["x"])
    title = "Samples and their nearest training images: first those nearest of all, then any"
    note = f"features: {evaluation.tree['samples']['features']['name']}"
    save_strips(out / "nearest.png", strips, columns=SHOWN, title=title, note=note)


def _draw_rows(found: ImageSet, classes: Sequence[str], path: Path, title: str) -> None:
    """A row per class, of fewer columns where there are few images, where classes come in turn and each has one; else a plain grid."""
    assert found.images is not None
    x = found.images[: COLUMNS * ROWS].float() / 255
    columns = min(COLUMNS, len(x) // max(1, len(classes)))
    in_turn = found.labels is not None and torch.equal(found.labels, balanced_labels(len(found), max(1, len(classes))))
    if len(classes) < 2 or columns < 1 or not in_turn:
        save_grid(path, x, columns=COLUMNS, title=title)
        return
    shown = [x[c :: len(classes)][:columns] for c in range(len(classes))]
    save_grid(path, torch.cat(shown), columns=columns, row_labels=classes, title=title)


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(EvaluateConfig, argv, ALIASES, PROGRAM)
    check_script(flags)
    device = device_of(config.device)
    source = SOURCES.build(config.data)
    pipeline = load_pipeline(config.pipeline, device)
    model = load_features(config.features, source.signal, device)
    checked_reference(pipeline, source, config)
    print(f"{pipeline}; features: {model.name}; data: {data_name(config.data)}", flush=True)
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=EVALUATED)
    if checked:
        return
    check_room(out, source.signal, config.n + COLUMNS * ROWS, flags.allow_low_space)
    evaluation = evaluate_pipeline(pipeline, source, model, config, out)
    spent = timing(evaluation.seconds, config.n, device)
    write_atomic(out / TIMING, json_bytes(spent.to_dict()))
    write_atomic(out / FIGURES, json_bytes(finite_or_null(evaluation.tree)))
    if source.signal.drawable:
        draw(evaluation, source, out)
    else:
        print(f"no pictures: images of {source.signal.channels} channels", flush=True)
    print(table(evaluation.tree))
    print(spent)
    print(f"{out / FIGURES} written", flush=True)


if __name__ == "__main__":
    run_main(main)
