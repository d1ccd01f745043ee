"""What every script that measures samples is told, and what follows from it: reference images, labels, one set of samples."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import Flags, UserError
from intarsia.config import Config, ConfigError, Place, Seed
from pipelines.evaluation.bootstrap import FEW
from pipelines.evaluation.features import BUNDLED, FeatureModel
from pipelines.evaluation.sets import ImageSet, balanced_labels, can_balance, choose_rows, in_batches, measure, real_batches
from pipelines.sampling_config import SamplingConfig
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import Source, SourceConfig
from stage1_tokenizer.data.bundled import BundledConfig

SplitName = Literal["train", "validation", "test"]
HeldOutName = Literal["validation", "test"]

REFERENCE = "reference"  # what the set of real images is called among those of samples


class MeasureConfig(Config):
    """How samples are drawn and what they are compared with."""

    data: SourceConfig = BundledConfig()
    """The data that the pipeline was trained on."""
    reference: SplitName = "train"
    """Real images that samples are compared with: ``n`` of them where there are as many. Train images are the default because
    held-out splits are often too small; what was copied from them shows in the distances to the nearest training images."""
    n: Annotated[int, Field(ge=2)] = 5000
    """Samples, and reference images. Frechet distance, precision and recall depend on it: compare at equal n only."""
    balanced: bool | None = None
    """Equally many samples and reference images per class (at least 2), or both by the frequencies of the data. By default balanced where
    ``n`` is at least 10 per class and the reference has enough images of each."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and the like."""
    features: str = BUNDLED
    """The feature model: the bundled one, or the folder or Hub id of one made by pipelines.evaluation.train_features."""
    k: Annotated[int, Field(ge=1)] = 5
    """Neighbours that make the manifolds of precision and recall."""
    bootstrap: Annotated[int, Field(ge=2)] = 200
    """Resampled sets behind each interval."""
    seed: Seed = 0
    """Of the samples, the baseline, the choice of reference images and the intervals."""
    device: Place[str] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def check_script(flags: Flags) -> None:
    """Raises ConfigError or UserError for flags that a measuring script has no use for, and for several processes."""
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: an evaluation has no steps"])
    check_alone("figures are measured by one")


def check_alone(why: str) -> None:
    """Raises UserError for several processes, saying ``why``."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE: {world} processes; {why}")


def load_pipeline(name: str, device: torch.device) -> TwoStagePipeline:
    """The saved pipeline of that folder or Hub id; the bundled one where empty."""
    return (TwoStagePipeline.from_pretrained(name) if name else TwoStagePipeline.bundled()).to(device)


def data_name(config: SourceConfig) -> str:
    """The type of the data and what it names, for a line that says what figures are of."""
    tree = config.to_dict()
    named = [str(tree[key]) for key in ("name", "path", "root", "dataset") if tree.get(key)]
    return " ".join([tree["type"], *named])


def check_fit(pipeline: TwoStagePipeline, source: Source) -> None:
    """Raises ValueError where the data are not those of the pipeline."""
    if source.signal != pipeline.signal:
        raise ValueError(f"data: the signals are {source.signal}; the pipeline makes {pipeline.signal}")
    if pipeline.signal.kind != "image":
        raise ValueError(f"pipeline: makes {pipeline.signal.kind}; samples are compared in the features of images only")
    if pipeline.classes and pipeline.classes != source.classes:
        raise ValueError(f"data: the classes are {', '.join(source.classes) or 'none'}; the pipeline knows {', '.join(pipeline.classes)}")


@dataclass(frozen=True)
class Reference:
    """The real images that samples are compared with.

    Attributes:
        rows: of the reference split.
        balanced: whether they, and so the samples, are equally many per class.
        classes: how many there are.
    """

    rows: Tensor
    balanced: bool
    classes: int

    def labels(self, pipeline: TwoStagePipeline, n: int, seed: int) -> Tensor | None:
        """(n,) int64: the classes that samples are asked for; None for a pipeline without labels."""
        if not pipeline.classes:
            return None
        return balanced_labels(n, self.classes) if self.balanced else pipeline.labels(n, seed=seed)


def choose_reference(source: Source, config: MeasureConfig, labelled: bool) -> Reference:
    """The rows that ``config`` asks for. Raises ValueError where classes cannot be balanced as it says; ConfigError where there are none to
    balance, or fewer than 2 images of a class, within which nothing can be resampled, or ``k`` is too large.

    Args:
        labelled: whether the samples have classes.
    """
    split, classes = source.split(config.reference), len(source.classes)
    if config.balanced and not labelled:
        raise ConfigError(["balanced: True, but no prior of the pipeline takes labels; expected False, or null"])
    each = min(config.n, len(split)) // max(1, classes)  # of the reference; samples are no fewer
    possible = labelled and each >= FEW and can_balance(split, config.n, classes)
    balanced = possible if config.balanced is None else config.balanced
    if balanced and each < 2:
        found = f"{min(config.n, len(split))} {config.reference} images of {classes} classes are {each} of each"
        raise ConfigError([f"balanced: True, but {found}: intervals need 2; expected {2 * classes} images or more, False, or null"])
    rows = choose_rows(split, config.n, config.seed, classes if balanced else 0)
    if config.k >= min(config.n, len(rows)):
        raise ConfigError([f"k: {config.k}; expected fewer than the {config.n} samples and the {len(rows)} {config.reference} images"])
    return Reference(rows, balanced, classes)


def measure_reference(source: Source, config: MeasureConfig, chosen: Reference, model: FeatureModel) -> ImageSet:
    """The features of the reference images."""
    return measure(REFERENCE, real_batches(source.split(config.reference), chosen.rows), model, balanced=chosen.balanced)


def measure_samples(
    pipeline: TwoStagePipeline,
    config: MeasureConfig,
    chosen: Reference,
    model: FeatureModel,
    *,
    name: str = "samples",
    options: Mapping[str, Any] | None = None,
    kept: bool = False,
    folder: Path | None = None,
) -> tuple[ImageSet, float]:
    """``config.n`` samples in the features of ``model``, and the seconds that drawing and decoding them took.

    Args:
        options: sampling options; those of ``config`` where None.
        kept: keep pixel vectors and images, too.
        folder: of the temporary file that holds the images; see ``OnDisk``.
    """
    asked = chosen.labels(pipeline, config.n, config.seed)
    drawn = config.sampling.given() if options is None else dict(options)
    clock = Clock(pipeline.stream(config.n, label=asked, seed=config.seed, **drawn))
    images = config.n if kept else 0
    batches = in_batches(clock, asked, pipeline.signal)
    found = measure(name, batches, model, pixels=kept, images=images, folder=folder, balanced=chosen.balanced)
    return found, clock.seconds


class Clock:
    """An iterator that adds up the seconds in which it is waited for."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.seconds = iter(rows), 0.0

    def __iter__(self) -> Clock:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self.rows)
        finally:
            self.seconds += time.perf_counter() - start
