"""Intervals by the bootstrap (Efron 1979), seeded: the same figures always come with the same intervals.

A statistic such as a Frechet distance is biased upwards at finite n, and a resampled set has that bias once more. The
replicates are therefore centred on the estimate: an interval says how far the figure would move with another draw of
equally many samples; it does not correct the figure itself for its sample size. Of a Frechet distance near the value that
equal distributions have at this n, intervals can be too wide.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from intarsia.rng import uniform

LEVEL = 0.95
FEW = 10  # rows of a class below which one resampled set holds a row fewer of it, see ``draw_counts``


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval of level 0.95."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Strata:
    """Rows grouped by class, to draw rows of a given class at random.

    Attributes:
        order: (n,) int64, the rows sorted by class.
        start, size: (classes,) int64, where a class begins in ``order`` and how many rows it has.
    """

    order: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, labels: Tensor | None, n: int, classes: int | None = None) -> Strata:
        """labels: (n,) int64 in [0, classes), or None for one class of all rows."""
        if labels is None:
            return cls(torch.arange(n), torch.tensor([0]), torch.tensor([n]))
        if labels.shape != (n,):
            raise ValueError(f"labels: shape {tuple(labels.shape)}; expected ({n},)")
        size = torch.bincount(labels, minlength=classes or 0)
        return cls(torch.argsort(labels, stable=True), size.cumsum(0) - size, size)

    def weights(self, labels: Tensor) -> Tensor:
        """(n,) float64: how often the draw for each row counts; see ``draw_counts``. Raises ValueError for a class of one row."""
        if (single := (self.size == 1).nonzero()).numel():
            raise ValueError(f"labels: class {int(single[0])} has 1 row; expected at least 2 of each class, to resample within it")
        size = self.size[labels].double()
        weights = torch.where(size < FEW, size / (size - 1), 1.0)
        weights[self.order[self.start[(self.size > 0) & (self.size < FEW)]]] = 0.0  # the draw that is left out
        return weights

    def pick(self, labels: Tensor, u: Tensor) -> Tensor:
        """The row that each uniform draw ``u`` in (0, 1), float64, picks among those of class ``labels``; int64 of the broadcast shape."""
        size = self.size[labels]
        if bool((size == 0).any()):
            empty = int(labels.broadcast_to(size.shape)[size == 0][0])
            raise ValueError(f"labels: class {empty} has no rows to draw from")
        return self.order[self.start[labels] + torch.minimum((u * size).long(), size - 1)]


def draw_counts(n: int, replicate: int, seed: int, name: str, labels: Tensor | None = None) -> Tensor:
    """(n,) float64: how often each of ``n`` rows occurs in one resampled set of n rows.

    With ``labels`` (n,) each class keeps its number of rows m, as in a set that was balanced on purpose. Within a class m draws vary by
    (m - 1) / m too little. Of a class of fewer than ``FEW`` rows there are therefore m - 1 draws, which count m / (m - 1) times each, so
    that the variance of a mean is right (the rescaling bootstrap: Rao and Wu 1988); of larger classes, intervals are at most 5 % narrow.

    Raises:
        ValueError: for a class of one row, which tells nothing of what varies within it.
    """
    strata = Strata.of(labels, n)
    u = uniform(seed, f"bootstrap/{name}", torch.arange(n), step=replicate, dtype=torch.float64)
    if labels is None:
        return torch.bincount(strata.pick(torch.zeros(n, dtype=torch.int64), u), minlength=n).double()
    rows = strata.pick(labels, u)
    if int(strata.size.min()) >= FEW:
        return torch.bincount(rows, minlength=n).double()
    return torch.bincount(rows, strata.weights(labels), minlength=n)


def interval(value: float, replicates: Tensor, share: bool = False) -> Estimate:
    """``replicates`` (B,): the statistic on resampled sets, centred on ``value`` (see the module's text); a share stays in [0, 1]."""
    centred = replicates.double() - replicates.double().mean() + value
    low, high = torch.quantile(centred, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return Estimate(value, max(low, 0.0), min(high, 1.0)) if share else Estimate(value, low, high)


def mean_estimate(values: Tensor, replicates: int, seed: int, name: str, labels: Tensor | None = None) -> Estimate:
    """The mean of (n,) ``values`` (booleans give a share)."""
    v = values.double().cpu()
    draws = torch.stack([draw_counts(v.numel(), b, seed, name, labels) @ v for b in range(replicates)]) / v.numel()
    return interval(v.mean().item(), draws, share=values.dtype == torch.bool)


def ratio_of_means(
    a: Tensor,
    b: Tensor,
    replicates: int,
    seed: int,
    names: tuple[str, str],
    labels: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Estimate:
    """mean(a) / mean(b) of two independent sets (n_a,) and (n_b,); nan or inf where mean(b) is 0. ``labels`` as in ``draw_counts``."""
    sets = [v.double().cpu() for v in (a, b)]

    def mean(i: int, replicate: int) -> Tensor:
        return draw_counts(sets[i].numel(), replicate, seed, names[i], labels[i]) @ sets[i] / sets[i].numel()

    draws = [mean(0, r) / mean(1, r) for r in range(replicates)]
    return interval((sets[0].mean() / sets[1].mean()).item(), torch.stack(draws))


def resampled(values: Tensor, replicate: int, seed: int, name: str) -> Tensor:
    """(n,): one resampled set of ``values`` (n,)."""
    n = values.shape[0]
    u = uniform(seed, f"bootstrap/{name}", torch.arange(n), step=replicate, dtype=torch.float64)
    return values[(u * n).long().clamp(max=n - 1)]
