"""The order of training samples as a function of (seed, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.rng import permutation


class Order:
    """An endless stream of permutations of ``range(n)``, one per epoch, cut into global batches; nothing is dropped."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"data: {n} samples; there must be at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} must be positive")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._cache: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._cache:
            self._cache = {e: p for e, p in self._cache.items() if e == epoch - 1}
            self._cache[epoch] = permutation(self.seed, "order", self.n, epoch)
        return self._cache[epoch]

    def epochs(self, step: int) -> Tensor:
        """(batch_size,) int64: the epoch of each entry of the global batch of ``step`` (0-based)."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size) // self.n

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64: the samples of the global batch of ``step``."""
        places = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = places // self.n
        out = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            mine = epochs == epoch
            out[mine] = self._permutation(epoch)[places[mine] % self.n]
        return out


def share(n: int, part: int, parts: int) -> slice:
    """The contiguous range of ``n`` things that part ``part`` of ``parts`` takes; sizes differ by at most one."""
    if n < 0 or not 0 <= part < parts:
        raise ValueError(f"share: part {part} of {parts} of {n} things; expected 0 <= part < parts")
    small, extra = divmod(n, parts)
    start = part * small + min(part, extra)
    return slice(start, start + small + (part < extra))
