"""The passes over the data that the figures of a pipeline need: held-out images, train images, the baseline's samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.features import FeatureModel
from pipelines.evaluation.memorisation import pixel_vectors
from pipelines.evaluation.neighbours import Nearest
from pipelines.evaluation.sets import ImageSet, Labelled, measure, real_batches
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.metrics import ReconstructionMetrics, unit
from stage1_tokenizer.sizes import rows_at_once


@dataclass(frozen=True)
class HeldOut:
    """What is kept of a held-out split.

    Attributes:
        codes: one (N, *grid) int64 tensor per level.
        labels: (N,) int64, or None where unlabelled.
        reconstruction: PSNR and SSIM of all its images.
        reconstructions, real: the images after and before; the former from the levels that the priors model, with pixel vectors.
    """

    codes: list[Tensor]
    labels: Tensor | None
    reconstruction: ReconstructionMetrics
    reconstructions: ImageSet
    real: ImageSet


def _size(pipeline: TwoStagePipeline) -> int:
    """How many images a pass takes at once."""
    return rows_at_once(pipeline.signal, pipeline.tokenizer.config.micro_batch)


def evaluate_held_out(pipeline: TwoStagePipeline, split: Split, model: FeatureModel) -> HeldOut:
    """Reconstructs a split from the levels that the priors model, as samples are made; its codes of all levels stay on the CPU."""
    metrics = ReconstructionMetrics()
    codes: list[list[Tensor]] = []
    tokenizer, stop = pipeline.tokenizer, pipeline.priors[-1].levels.stop

    def reconstructed() -> Iterator[Labelled]:
        for rows in torch.arange(len(split)).split(_size(pipeline)):
            batch = split.batch(rows)
            x = batch["x"].to(tokenizer.device)
            found = tokenizer.encode(x)
            y = unit(tokenizer.decode(found[:stop]).to(x.dtype))
            metrics.update(unit(x), y)
            codes.append([c.cpu() for c in found])
            yield y, batch.get("label")

    reconstructions = measure("reconstructions", reconstructed(), model, pixels=True)
    real = measure("real", real_batches(split), model)
    return HeldOut([torch.cat(level) for level in zip(*codes, strict=True)], split.labels, metrics, reconstructions, real)


def search_train(pipeline: TwoStagePipeline, split: Split, model: FeatureModel, queries: Mapping[str, Nearest]) -> list[Tensor]:
    """Codes of the train split, one (N, *grid) int64 tensor per level on the CPU; on the way the queries meet every train image.

    Args:
        queries: ``features`` and ``pixels``, the spaces to search.
    """
    codes: list[list[Tensor]] = []
    for rows in torch.arange(len(split)).split(_size(pipeline)):
        x = split.batch(rows)["x"].to(pipeline.device)
        codes.append([c.cpu() for c in pipeline.tokenizer.encode(x)])
        queries["features"].update(model(unit(x))[0].cpu())
        queries["pixels"].update(pixel_vectors(unit(x)).cpu())
    return [torch.cat(level) for level in zip(*codes, strict=True)]


def baseline_batches(
    pipeline: TwoStagePipeline, baseline: IndependentCodes, n: int, labels: Tensor | None, seed: int
) -> Iterator[Labelled]:
    """Samples of the baseline through the pipeline's decoder; ``labels`` (n,) where its training codes are labelled."""
    for ids in torch.arange(n).split(_size(pipeline)):
        label = None if labels is None else labels[ids]
        yield pipeline.decode(baseline.sample(ids, label, seed)), label
