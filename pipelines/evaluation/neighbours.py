"""Nearest neighbours by brute force, in blocks, so that memory stays bounded for any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**22  # entries of a block of distances, and of the rows that it compares


def squared_distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of x, (rows, m) squared Euclidean distances to all of y) for x (n, D), y (m, D)."""
    y_norm = y.square().sum(1)
    rows = max(1, BLOCK // max(1, *y.shape))
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        d = torch.addmm(y_norm[None], part, y.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        yield slice(start, start + part.shape[0]), d.clamp_(min=0)


def kth_neighbour(x: Tensor, k: int) -> Tensor:
    """(n,) float64: the squared distance of each row of x (n, D) to its k-th nearest other row."""
    if not 1 <= k < x.shape[0]:
        raise ValueError(f"k: {k}; expected 1 to {x.shape[0] - 1} for {x.shape[0]} rows")
    x = x.double()
    out = x.new_empty(x.shape[0])
    for rows, d in squared_distance_blocks(x, x):
        own = torch.arange(rows.start, rows.stop, device=x.device)
        d[own - rows.start, own] = torch.inf
        out[rows] = d.kthvalue(k, dim=1).values
    return out


def within(x: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(n,) bool: the row of x (n, D) lies in the ball of at least one centre (m, D) with squared radius ``radii`` (m,)."""
    x, centres = x.double(), centres.double()
    return torch.cat([(d <= radii[None]).any(1) for _, d in squared_distance_blocks(x, centres)])


class Nearest:
    """The nearest key of each query, over keys that come in batches.

    The search is in float32 on centred rows; the distance of each batch's winner is then computed directly in float64, so
    that a copy has distance 0.

    Attributes:
        distance: (n,) float64, Euclidean; inf before the first batch.
        index: (n,) int64, the number of the key in order of arrival; -1 before the first batch.
    """

    def __init__(self, queries: Tensor) -> None:
        """queries: (n, D) floating point."""
        self.queries = queries.float()
        self.distance = torch.full((queries.shape[0],), torch.inf, dtype=torch.float64, device=queries.device)
        self.index = torch.full((queries.shape[0],), -1, dtype=torch.int64, device=queries.device)
        self.seen = 0
        self._centre = self.queries.mean(0)

    def update(self, keys: Tensor) -> None:
        """keys: (m, D), m > 0."""
        if keys.ndim != 2 or keys.shape[1] != self.queries.shape[1] or keys.shape[0] == 0:
            raise ValueError(f"keys: shape {tuple(keys.shape)}; expected (rows, {self.queries.shape[1]})")
        keys = keys.to(self.queries)
        for rows, d in squared_distance_blocks(self.queries - self._centre, keys - self._centre):
            best = d.argmin(1)
            exact = (self.queries[rows].double() - keys[best].double()).square().sum(1).sqrt()
            nearer = exact < self.distance[rows]
            self.distance[rows] = torch.where(nearer, exact, self.distance[rows])
            self.index[rows] = torch.where(nearer, best + self.seen, self.index[rows])
        self.seen += keys.shape[0]
