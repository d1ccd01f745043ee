"""Codebooks that grow: few codes at first, doubled at given steps by splitting each in two (Linde, Buzo and Gray 1980)."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.rng import StepRng

_APART = 0.01  # how far a new code starts from its parent, as a share of the codes' root mean square


def codes_at(step: int, codes: int, grow: tuple[int, ...]) -> int:
    """The codes in use in ``step``: K at last, and half as many (rounded up) for each step of ``grow`` that is still to come."""
    coming = sum(at > step for at in grow)
    return -(-codes // 2**coming)


def split(codebook: Tensor, counts: Tensor, sums: Tensor | None, used: Tensor, now: int, rng: StepRng) -> None:
    """Brings the codes in use from ``used`` to ``now``: the new ones are copies of the old with a little noise, and share their counts.

    Where so many are in use already (more, where a grown codebook is trained on), nothing changes. Without a host sync, the same
    on every rank.

    Args:
        codebook, counts, sums: (K, D), (K,), (K, D), changed in place.
        used: () int64, changed in place.
    """
    k = torch.arange(codebook.shape[0], device=codebook.device)
    then = used.clamp(min=now)
    old, fresh = k < used, (k >= used) & (k < then)
    parent = torch.where(fresh, k % used, k)
    family = torch.zeros_like(counts).index_add_(0, parent, (k < then).to(counts.dtype))[parent].clamp_min(1)
    size = torch.where(old[:, None], codebook, 0.0).square().sum() / (used * codebook.shape[1])
    noise = StepRng(rng.seed, rng.step, k).normal("vq/grow", codebook.shape[1]).to(codebook.dtype)
    noise = noise * (_APART * size.sqrt().clamp_min(1e-6))
    codebook.copy_(torch.where(fresh[:, None], codebook[parent] + noise, codebook))
    counts.copy_(torch.where(k < then, counts[parent] / family, counts))
    if sums is not None:
        sums.copy_(torch.where((family > 1)[:, None], codebook * counts[:, None], sums))
    used.copy_(then)
