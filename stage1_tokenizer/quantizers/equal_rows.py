"""Which rows are equal in every bit, by a hash of 64 bits of each: cheaper than comparing them, and the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.rng import bits

_CELLS = 1 << 22  # numbers hashed at once: as 64-bit integers they take twice the memory of float32


def hashes(rows: Tensor) -> Tensor:
    """(N, D) float32 or float64 to (N,) int64, equal where rows are; -0 is 0."""
    words = (rows + 0.0).view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    weights = bits(0, "vq/restart/equal", torch.arange(rows.shape[1], device=rows.device))
    parts = words.split(max(1, _CELLS // rows.shape[1]))
    return torch.cat([(part.long() * weights).sum(1) for part in parts])


def first_of_each(rows: Tensor) -> Tensor:
    """(M,) int64, rising: the numbers of the rows (N, D) that no earlier one equals. Waits for the device."""
    _, kind = hashes(rows).unique(return_inverse=True)
    number = torch.arange(rows.shape[0], device=rows.device)
    first = number.new_full((rows.shape[0],), rows.shape[0]).scatter_reduce(0, kind, number, "amin")
    return (first[kind] == number).nonzero()[:, 0]
