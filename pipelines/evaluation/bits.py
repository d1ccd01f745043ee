"""What a pipeline's priors pay for held-out codes, in bits, beside the baseline that draws positions independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.bootstrap import mean_estimate
from pipelines.likelihood import nats
from pipelines.two_stage import TwoStagePipeline


def prior_bits(pipeline: TwoStagePipeline, codes: Sequence[Tensor], label: Tensor | None) -> list[Tensor]:
    """For each prior (n,) float64 on the CPU: -log2 p(its levels | levels above, label), summed over its codes.

    The sum over the priors is ``pipeline.nll`` in bits.

    Args:
        codes: one (n, *grid) int64 tensor per level.
        label: (n,) int64, or None for priors without labels.
    """
    moved = [c.to(pipeline.device) for c in codes]
    given = None if label is None else label.to(pipeline.device)
    found = [nats([prior], moved[: prior.levels.stop], given, pipeline.micro_batch) for prior in pipeline.priors]
    return [bits.cpu() / math.log(2) for bits in found]


def bits_report(
    pipeline: TwoStagePipeline, baseline: IndependentCodes, codes: Sequence[Tensor], label: Tensor | None, replicates: int, seed: int
) -> dict[str, Any]:
    """Bits per code, per image and per dimension (of the signal) of held-out codes, in all and for each prior.

    Args:
        codes: one (n, *grid) int64 tensor per level.
        label: (n,) int64, or None for unlabelled data.
    """
    levels = pipeline.spec.levels
    signal = pipeline.signal
    conditional = label if pipeline.classes else None
    own = prior_bits(pipeline, codes, conditional)
    independent = [bits.sum(1) for bits in baseline.bits(codes[: len(baseline.levels)], label if baseline.labels is not None else None)]

    def figures(name: str, bits: Tensor, independent: Tensor, positions: int, is_bound: bool) -> dict[str, Any]:
        return {
            "levels": name,
            "codes": positions,
            "bits_per_code": mean_estimate(bits / positions, replicates, seed, "bits").to_dict(),
            "bits_per_image": bits.mean().item(),
            "bits_per_dimension": bits.mean().item() / (signal.channels * math.prod(signal.shape)),
            "is_bound": is_bound,
            "baseline_bits_per_code": mean_estimate(independent / positions, replicates, seed, "bits").to_dict(),
        }

    parts = []
    for prior, bits in zip(pipeline.priors, own, strict=True):
        mine = levels[prior.levels.start : prior.levels.stop]
        name = ", ".join(level.name for level in mine)
        other = torch.stack([independent[i] for i in prior.levels]).sum(0)
        parts.append(figures(name, bits, other, sum(level.positions for level in mine), prior.nll_is_bound))
    total = sum(part["codes"] for part in parts)
    whole = figures("all", torch.stack(own).sum(0), torch.stack(independent).sum(0), total, pipeline.nll_is_bound)
    return {"samples": int(codes[0].shape[0]), "total": whole, "priors": parts}
