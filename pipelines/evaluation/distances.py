"""How far a set of samples is from a set of real ones, in the features of a named model: Frechet distance, precision, recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipelines.evaluation.bootstrap import Estimate, draw_counts, interval, mean_estimate
from pipelines.evaluation.neighbours import kth_neighbour, within


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of a set, float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """R with R R^T = covariance; eigenvalues below zero are rounding of zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()


def fit_gaussian(features: Tensor, counts: Tensor | None = None) -> Gaussian:
    """The moments of (n, D) features, with n - 1 in the denominator; ``counts`` (n,) says how often each row occurs (default 1)."""
    x = features.double()
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features: shape {tuple(x.shape)}; expected at least two rows (n, D)")
    w = torch.ones(x.shape[0], dtype=torch.float64, device=x.device) if counts is None else counts.to(x)
    total = w.sum()
    mean = w @ x / total
    centred = x - mean
    return Gaussian(mean, centred.T @ (centred * w[:, None]) / (total - 1))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017).

    tr (C_a C_b)^(1/2) is the sum of the singular values of R_a^T R_b with C = R R^T: no root of a product that is not
    symmetric, and no imaginary part to throw away, however close to singular the covariances are.
    """
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    value = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(value.item(), 0.0)


@dataclass(frozen=True)
class FeatureSet:
    """Features (n, D) of one set; ``labels`` (n,) where the set was drawn with a fixed number per class (then it is resampled so)."""

    name: str
    features: Tensor
    labels: Tensor | None = None

    def gaussian(self) -> Gaussian:
        return fit_gaussian(self.features)

    def resampled(self, replicate: int, seed: int) -> Gaussian:
        return fit_gaussian(self.features, draw_counts(self.features.shape[0], replicate, seed, self.name, self.labels))


@dataclass(frozen=True)
class FrechetTable:
    """Frechet distances of several sets to one reference, with ``replicates`` of each on jointly resampled sets.

    Attributes:
        values: name -> distance.
        replicates: name -> (B,) float64; replicate b of every set used the same resampled reference.
    """

    values: Mapping[str, float]
    replicates: Mapping[str, Tensor]

    def estimate(self, name: str) -> Estimate:
        return interval(self.values[name], self.replicates[name])

    def ratio(self, name: str, other: str) -> Estimate:
        """The distance of ``name`` as a share of that of ``other``."""
        if self.values[other] == 0:
            raise ValueError(f"ratio: the distance of {other!r} is 0")
        return interval(self.values[name] / self.values[other], self.replicates[name] / self.replicates[other])

    def difference(self, name: str, other: str) -> Estimate:
        """How much larger the distance of ``name`` is than that of ``other``; what the reference adds to both cancels."""
        return interval(self.values[name] - self.values[other], self.replicates[name] - self.replicates[other])


def frechet_table(reference: FeatureSet, sets: list[FeatureSet], replicates: int, seed: int) -> FrechetTable:
    """Distances of ``sets`` to ``reference``. Names must differ: they are part of the draws."""
    names = [s.name for s in [reference, *sets]]
    if len(set(names)) != len(names):
        raise ValueError(f"sets: the names {names} are not all different")
    target = reference.gaussian()
    values = {s.name: frechet(target, s.gaussian()) for s in sets}
    draws: dict[str, list[float]] = {s.name: [] for s in sets}
    for b in range(replicates):
        target = reference.resampled(b, seed)
        for s in sets:
            draws[s.name].append(frechet(target, s.resampled(b, seed)))
    return FrechetTable(values, {name: torch.tensor(d, dtype=torch.float64) for name, d in draws.items()})


@dataclass(frozen=True)
class PrecisionRecall:
    """Which rows lie in the manifold of the other set.

    Attributes:
        in_real: (n_s,) bool, the samples that lie in that of the real set; their share is the precision.
        in_samples: (n_r,) bool, the real ones that lie in that of the samples; their share is the recall.
    """

    in_real: Tensor
    in_samples: Tensor

    def estimates(self, replicates: int, seed: int) -> tuple[Estimate, Estimate]:
        """(precision, recall); the manifolds are kept as they are and the rows that are counted are resampled."""
        return (
            mean_estimate(self.in_real, replicates, seed, "precision"),
            mean_estimate(self.in_samples, replicates, seed, "recall"),
        )


def precision_recall(real: Tensor, samples: Tensor, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2), by exact search in float64.

    The manifold of a set is the union of balls around its rows, each out to the row's k-th nearest neighbour in the set.
    Both depend on the sizes of the sets: compare figures at equal sizes only.

    Args:
        real, samples: features (n_r, D) and (n_s, D).
    """
    return PrecisionRecall(
        within(samples, real, kth_neighbour(real, k)),
        within(real, samples, kth_neighbour(samples, k)),
    )
