"""What the priors of a pipeline say of codes: the chain rule over their ranges of levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.padded import run_padded
from intarsia.rng import StepRng
from intarsia.specs import Cond
from stage2_prior.priors.base import Prior, check_codes


@torch.no_grad()
def nats(priors: Sequence[Prior], codes: Sequence[Tensor], label: Tensor | None, micro_batch: int) -> Tensor:
    """(n,) float64: -log p(codes | label), the sum over the priors of that of their levels given the levels above.

    A sample's value does not depend on its batch: fixed, padded micro-batches, and for bounds that draw, its place in ``codes``.

    Args:
        codes: (n, *grid) int64 on the priors' device, one for each level up to the last prior's.
        label: (n,) int64, for the priors that take labels; None asks those for their learned null.

    Raises:
        ValueError: codes of the wrong number, shape, dtype or range; no label for a prior that knows no null.
    """
    n = len(codes[0]) if codes else 0
    check_codes(codes, priors[-1].spec.levels[: priors[-1].levels.stop], n, "codes")
    index = torch.arange(n, device=priors[0].device)
    total = torch.zeros(n, dtype=torch.float64, device=index.device)
    for prior in priors:

        def per_sample(ids: Tensor, labels: Tensor, *codes: Tensor, prior: Prior = prior) -> list[Tensor]:
            cond = Cond(label=labels) if prior.conditional and label is not None else None
            return [prior.nll(codes, cond, StepRng(0, 0, ids)).double().sum(1)]

        total += run_padded(per_sample, [index, index if label is None else label, *codes[: prior.levels.stop]], micro_batch)[0]
    return total
