"""Several maps of codes as one sequence, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from intarsia.specs import LevelSpec

ORDERS = ("level", "position")


class Layout:
    """The order in which the positions of several levels follow each other.

    ``level`` runs one level after the other, each in raster order; ``position`` (levels of one shape) runs all levels of a
    position before the next, as residual depths want it. What grows with the sequence is made at first use.
    """

    def __init__(self, levels: Sequence[LevelSpec], order: str = "level") -> None:
        if order not in ORDERS:
            raise ValueError(f"prior.order: {order!r}; expected {' or '.join(ORDERS)}")
        shapes = [level.shape for level in levels]
        if order == "position" and len(set(shapes)) > 1:
            raise ValueError(f"prior.order: 'position' (rq has no other) needs levels of one shape; got {', '.join(map(str, shapes))}")
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(f"prior.levels: levels of different numbers of axes, {', '.join(map(str, shapes))}, make no sequence")
        self.levels = tuple(levels)
        self.order = order
        self.sizes = [level.positions for level in levels]

    @cached_property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(level, flat position) of each place in the sequence; levels count from 0 within ``levels``."""
        if self.order == "level":
            return tuple((i, p) for i, size in enumerate(self.sizes) for p in range(size))
        return tuple((i, p) for p in range(self.sizes[0]) for i in range(len(self.sizes)))

    def __len__(self) -> int:
        return sum(self.sizes)

    def join(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, positions, ...) tensor per level to (B, length, ...)."""
        if len(maps) == 1:
            return maps[0]
        if self.order == "level":
            return torch.cat(list(maps), 1)
        return rearrange(torch.stack(list(maps), 2), "b p l ... -> b (p l) ...")

    def split(self, sequence: Tensor) -> list[Tensor]:
        """The inverse of ``join``."""
        if len(self.levels) == 1:
            return [sequence]
        if self.order == "level":
            return list(sequence.split(self.sizes, 1))
        return list(rearrange(sequence, "b (p l) ... -> b p l ...", l=len(self.levels)).unbind(2))

    def coordinates(self) -> Tensor:
        """(length, axes) float64 on the CPU: where each place lies on the finest grid of the levels, in cells of that grid.

        A coarser level's cell stands at the first cell that it covers, so that one level alone counts 0, 1, 2, ...
        """
        finest = [max(sizes) for sizes in zip(*(level.shape for level in self.levels), strict=True)]
        maps = []
        for level in self.levels:
            axes = [[i * fine / size for i in range(size)] for fine, size in zip(finest, level.shape, strict=True)]
            maps.append(torch.tensor(list(product(*axes)), dtype=torch.float64, device="cpu")[None])
        return self.join(maps)[0]


def nearest_cells(coarse: tuple[int, ...], fine: tuple[int, ...]) -> Tensor:
    """(prod(fine),) int64 on the CPU: the flat index of the cell of ``coarse`` that lies under each cell of ``fine``."""
    index = torch.zeros(1, dtype=torch.int64, device="cpu")
    for small, large in zip(coarse, fine, strict=True):
        place = torch.arange(large, device="cpu") * small // large
        index = (index[:, None] * small + place[None]).flatten()
    return index
