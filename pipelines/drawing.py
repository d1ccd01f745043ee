"""Codes from the priors of a pipeline: level by level, coarse to fine, each given those above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.specs import Cond
from pipelines.request import Request
from stage2_prior.priors.base import Prior

Known = tuple[Sequence[Tensor], Sequence[Tensor]]


@torch.no_grad()
def draw_codes(priors: Sequence[Prior], ids: Tensor, request: Request, micro_batch: int, known: Known | None = None) -> list[Tensor]:
    """The codes of samples ``ids`` (b,) int64, one (b, *grid) int64 tensor per level that is modelled, on the priors' device.

    Args:
        known: (codes, keep) of the levels, each (b, *grid): codes stay wherever the boolean keep is True.
    """
    device = priors[0].device
    label = None if request.label_of is None else request.label_of(ids).to(device)
    codes: list[Tensor] = []
    for prior, options in zip(priors, request.options, strict=True):
        own = slice(prior.levels.start, prior.levels.stop)
        kept = None if known is None else (list(known[0][own]), list(known[1][own]))
        if kept is not None and all(bool(keep.all()) for keep in kept[1]):
            codes += kept[0]
            continue
        cond = Cond(label=label) if prior.conditional and label is not None else None
        codes += prior.sample(
            ids.to(device), upper=tuple(codes), cond=cond, seed=request.seed, known=kept, micro_batch=micro_batch, **options
        )
    return codes
