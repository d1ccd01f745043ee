"""Random codes in place of true ones, where training conditions on them: what is drawn one day will not be perfect either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.rng import StepRng
from intarsia.specs import LevelSpec


def corrupted(maps: Sequence[Tensor], levels: Sequence[LevelSpec], rate: float, rng: StepRng | None, purpose: str) -> list[Tensor]:
    """(B, positions) int64 codes of each level, a share ``rate`` of them replaced by uniformly drawn ones.

    Args:
        rng: draws where and by what, for each sample by itself; None for no change.
        purpose: the name of these draws.
    """
    if rng is None or rate == 0:
        return list(maps)
    out = []
    for i, (codes, level) in enumerate(zip(maps, levels, strict=True)):
        where = rng.uniform(purpose, codes.shape[1], level=i) < rate
        code = (rng.uniform(f"{purpose}/code", codes.shape[1], level=i, dtype=torch.float64) * level.vocab).long()
        out.append(torch.where(where, code, codes))
    return out
