"""Exact nearest-code search without an N x K matrix, and k-means on top of it."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.rng import StepRng, permutation

_TILE_FLOATS = {"cpu": 1 << 20}  # 4 MB of scores at once stay in cache; elsewhere 256 MB
_BLOCK = 64


def nearest(rows: Tensor, codebook: Tensor, cost: Tensor | None = None) -> Tensor:
    """argmin_k |z - e_k|^2 + cost_k = argmax_k (z . e_k - (|e_k|^2 + cost_k) / 2) for each row; the first of equals.

    Args:
        rows: (N, D) float32 or float64.
        codebook: (K, D) of the same dtype.
        cost: (K,) of the same dtype, what a code costs beside its distance; None for nothing.

    Returns:
        (N,) int64.
    """
    n, k = rows.shape[0], codebook.shape[0]
    out = torch.empty(n, dtype=torch.int64, device=rows.device)
    bias = codebook.square().sum(1)
    bias = (bias if cost is None else bias + cost).mul(-0.5)
    columns = codebook.t()
    tile = max(1, _TILE_FLOATS.get(rows.device.type, 1 << 26) // k)
    scores = rows.new_empty((min(tile, n), k))
    for start in range(0, n, tile):
        part = rows[start : start + tile]
        torch.addmm(bias, part, columns, out=scores[: part.shape[0]])
        out[start : start + tile] = _argmax(scores[: part.shape[0]])
    return out


def _argmax(scores: Tensor) -> Tensor:
    """argmax over the last axis. On CPU in two steps, block maxima first: exact, and several times faster there."""
    n, k = scores.shape
    if scores.device.type != "cpu" or k % _BLOCK or k < 4 * _BLOCK:
        return scores.argmax(1)
    blocks = scores.view(n, k // _BLOCK, _BLOCK)
    best = blocks.amax(2).argmax(1)
    inside = blocks[torch.arange(n, device=scores.device), best].argmax(1)
    return best * _BLOCK + inside


def kmeans(rows: Tensor, k: int, rng: StepRng, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k distinct random rows; an empty cluster moves to a random row.

    With fewer than k rows, rows are used again with a little noise, so that no two codes are equal.

    Args:
        rows: (N, D), N > 0, the same on every rank.

    Returns:
        centres (k, D) and the number of rows nearest to each (k,), in the dtype of ``rows``.
    """
    n = rows.shape[0]
    order = permutation(rng.seed, "kmeans", n, rng.step).to(rows.device)
    centres = rows[order[torch.arange(k, device=rows.device) % n]].clone()
    if n < k:
        slots = StepRng(rng.seed, rng.step, torch.arange(k, device=rows.device))
        centres += 1e-3 * rows.std().clamp_min(1e-6) * slots.normal("kmeans/noise", rows.shape[1]).to(rows.dtype)
    counts = rows.new_zeros(k)
    for i in range(iterations):
        codes = nearest(rows, centres)
        counts = rows.new_zeros(k).index_add_(0, codes, rows.new_ones(n))
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        fresh = rows[permutation(rng.seed, "kmeans/empty", n, rng.step + i).to(rows.device)[torch.arange(k, device=rows.device) % n]]
        moved = sums / counts.clamp_min(1)[:, None]
        centres = torch.where((counts > 0)[:, None], moved, fresh if n >= k else centres)
    codes = nearest(rows, centres)
    return centres, rows.new_zeros(k).index_add_(0, codes, rows.new_ones(n))
