"""Figures and pictures of a trained pipeline: ``python -m pipelines.evaluate --pipeline DIR --out DIR``.

Reconstruction (PSNR, SSIM, usage), bits of the priors, and how samples compare with real images in the features of a named
model: Frechet distance, precision, recall, label agreement, distance to the nearest training images. Beside each figure of
the samples stands that of the baseline without a prior: codes drawn independently per position and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import parse, run_main
from intarsia.config import Config, ConfigError, Place
from intarsia.files import json_bytes, write_atomic
from intarsia.pictures import save_grid, save_strips
from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.bits import bits_report
from pipelines.evaluation.features import BUNDLED, FeatureModel, load_features
from pipelines.evaluation.neighbours import Nearest
from pipelines.evaluation.passes import baseline_batches, evaluate_held_out, search_train
from pipelines.evaluation.report import memorisation_figures, sample_figures, table
from pipelines.evaluation.sets import ImageSet, balanced_labels, choose_rows, in_batches, measure, real_batches
from pipelines.sample import device_of
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.metrics import CodeMetrics, finite_or_null, unit

PROGRAM = "python -m pipelines.evaluate"
SplitName = Literal["train", "validation", "test"]
SHOWN = 16  # samples of each kind in nearest.png
COLUMNS, ROWS = 10, 30  # of samples.png and baseline.png
SAMPLING = ("temperature", "top_k", "top_p", "guidance")


class SamplingConfig(Config):
    """How samples are drawn; what is not given here is the pipeline's default."""

    temperature: float | None = None
    """Divides the logits; 0 takes the most probable code."""
    top_k: int | None = None
    """Keep the k most probable codes."""
    top_p: float | None = None
    """Keep the most probable codes up to this mass."""
    guidance: float | None = None
    """Strength of the label; 1 is off."""


class EvaluateConfig(Config):
    """Evaluates a pipeline on a data set."""

    pipeline: Place[str] = ""
    """Folder of a saved pipeline, or a Hub id; the pipeline that ships with the package where empty."""
    data: SourceConfig = BundledConfig()
    """The data that it was trained on."""
    split: SplitName = "validation"
    """Held-out images: reconstruction, bits, real figures."""
    reference: SplitName = "train"
    """Real images that samples are compared with: ``n`` of them where there are as many. Train images are the default because
    held-out splits are often too small; what was copied from them shows in the distances to the nearest training images."""
    n: Annotated[int, Field(ge=2)] = 5000
    """Samples, and reference images. Frechet distance, precision and recall depend on it: compare at equal n only."""
    balanced: bool = True
    """Equally many samples and reference images per class; else both follow the frequencies of the data."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and the like."""
    features: str = BUNDLED
    """The feature model: the bundled one, or the folder or Hub id of one made by pipelines.evaluation.train_features."""
    k: Annotated[int, Field(ge=1)] = 5
    """Neighbours that make the manifolds of precision and recall."""
    bootstrap: Annotated[int, Field(ge=2)] = 200
    """Resampled sets behind each interval."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the samples, the baseline, the choice of reference images and the intervals."""
    out: Place[Annotated[str, Field(min_length=1)]] = "evaluation"
    """The folder for evaluation.json and pictures."""
    device: Place[str] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True)
class Evaluation:
    """The figures as a plain tree, and what the pictures are drawn from.

    Attributes:
        samples: with all images.
        baseline: with its first images.
        nearest: space -> for each sample the row of the nearest train image; ``order`` are the samples by distance in pixels.
    """

    tree: dict[str, Any]
    samples: ImageSet
    baseline: ImageSet
    nearest: dict[str, Tensor]
    order: Tensor


def check_fit(pipeline: TwoStagePipeline, source: Source) -> None:
    """Raises ValueError where the data are not those of the pipeline."""
    if source.signal != pipeline.signal:
        raise ValueError(f"data: the signals are {source.signal}; the pipeline makes {pipeline.signal}")
    if pipeline.signal.kind != "image":
        raise ValueError(f"pipeline: makes {pipeline.signal.kind}; samples are compared in the features of images only")
    if pipeline.classes and pipeline.classes != source.classes:
        raise ValueError(f"data: the classes are {', '.join(source.classes) or 'none'}; the pipeline knows {', '.join(pipeline.classes)}")


def evaluate_pipeline(pipeline: TwoStagePipeline, source: Source, model: FeatureModel, config: EvaluateConfig) -> Evaluation:
    """All figures. The pipeline stays on its device; ``config`` says how many, which splits and which seed."""
    check_fit(pipeline, source)
    held_split, train = source.split(config.split), source.split("train")
    balanced = config.balanced and bool(pipeline.classes)
    classes = len(source.classes) if balanced else 0
    rows = choose_rows(source.split(config.reference), config.n, config.seed, classes)
    if config.k >= min(config.n, len(rows)):
        raise ConfigError([f"k: {config.k}; expected fewer than the {config.n} samples and the {len(rows)} {config.reference} images"])

    print(f"drawing {config.n} samples", flush=True)
    asked: Tensor | None = None
    if pipeline.classes:
        asked = balanced_labels(config.n, classes) if balanced else pipeline.labels(config.n, seed=config.seed)
    options = {name: value for name, value in config.sampling.to_dict().items() if value is not None}
    stream = pipeline.stream(config.n, label=asked, seed=config.seed, **options)
    samples = measure("samples", in_batches(stream, asked), model, pixels=True, images=config.n, balanced=balanced)

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
    independent = measure("baseline", batches, model, images=COLUMNS * ROWS, balanced=balanced)
    reference = measure("reference", real_batches(source.split(config.reference), rows), model, balanced=balanced)

    print("figures", flush=True)
    sets = {"samples": samples, "baseline": independent, "reconstructions": held.reconstructions, "real": held.real}
    usage = {"train": CodeMetrics(levels), config.split: CodeMetrics(levels)}
    usage["train"].update(train_codes)
    if config.split != "train":
        usage[config.split].update(held.codes)
    tree: dict[str, Any] = {
        "pipeline": {
            "tokenizer": {"type": pipeline.tokenizer.type_name, "fingerprint": pipeline.spec.fingerprint},
            "priors": [{"type": prior.type_name, "sha256": prior.weights_sha256} for prior in pipeline.priors],
        },
        "data": source.describe(),
        "split": config.split,
        "reference": config.reference,
        "seed": config.seed,
        "balanced": balanced,
        "sampling": pipeline.defaults | options,
        "reconstruction": held.reconstruction.compute(),
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
    return Evaluation(tree, samples, independent, nearest, order)


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
    """A row per class where classes come in turn, else a plain grid."""
    assert found.images is not None
    x = found.images[: COLUMNS * ROWS].float() / 255
    rows = min(len(classes), len(x) // COLUMNS)
    if rows < 2 or found.labels is None or not torch.equal(found.labels, balanced_labels(len(found), len(classes))):
        save_grid(path, x, columns=COLUMNS, title=title)
        return
    turns = len(x) // len(classes)
    columns = min(COLUMNS, turns) if turns else 1
    shown = [x[c :: len(classes)][:columns] for c in range(rows)]
    save_grid(path, torch.cat(shown), columns=columns, row_labels=classes[:rows], title=title)


def main(argv: list[str] | None = None) -> None:
    aliases = {name: f"sampling.{name}" for name in SAMPLING}
    config, flags = parse(EvaluateConfig, argv, aliases, PROGRAM)
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: an evaluation has no steps"])
    out = Path(config.out)
    device = device_of(config.device)
    source = SOURCES.build(config.data)
    pipeline = (TwoStagePipeline.from_pretrained(config.pipeline) if config.pipeline else TwoStagePipeline.bundled()).to(device)
    model = load_features(config.features, source.signal, device)
    check_fit(pipeline, source)
    print(f"{pipeline}; features: {model.name}", flush=True)
    if flags.check or flags.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is said before the work
    evaluation = evaluate_pipeline(pipeline, source, model, config)
    draw(evaluation, source, out)
    write_atomic(out / "evaluation.json", json_bytes(finite_or_null(evaluation.tree)))
    print(table(evaluation.tree))
    print(f"{out / 'evaluation.json'} written", flush=True)


if __name__ == "__main__":
    run_main(main)
