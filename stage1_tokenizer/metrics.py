"""Figures of a tokenizer: PSNR, SSIM, and how its codes are used.

The accumulators hold sums only, so that they add up over batches and ranks, each sample counted once, in any order.
Signals are in [0, 1] here (``unit`` brings them there from [-1, 1]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.specs import LevelSpec
from intarsia.tally import Tally

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MAX_PSNR = 100.0  # dB; of a sample without error, for which the formula has infinity, and one such sample would be all that a mean says


def unit(x: Tensor) -> Tensor:
    """Signals in [-1, 1] (decoders may leave it) to [0, 1], clamped: what a picture file can hold."""
    return ((x + 1) / 2).clamp(0, 1)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim < 3:
        raise ValueError(f"signals: shapes {tuple(x.shape)} and {tuple(y.shape)}; expected two equal (batch, channels, *axes)")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"signals: dtypes {x.dtype} and {y.dtype}; expected floating point in [0, 1]")


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """(B,) float64: the mean squared error of each sample of two (B, C, *axes) signals."""
    _check_pair(x, y)
    return (x.double() - y.double()).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """(B,) float64 in dB: 10 log10(MAX^2 / MSE) with MAX = 1, at most ``MAX_PSNR``.

    Args:
        x, y: (B, C, *axes) in [0, 1], any number of axes.
    """
    return _decibels(squared_error(x, y))


def _decibels(mse: Tensor) -> Tensor:
    return (-10 * torch.log10(mse)).clamp(max=MAX_PSNR)


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window over the last two axes, only where it lies wholly inside: (..., H, W) to (..., H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    taps = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        size = x.shape[axis] - SSIM_WINDOW + 1
        blurred = taps[0] * x.narrow(axis, 0, size)
        for i in range(1, SSIM_WINDOW):
            blurred.add_(x.narrow(axis, i, size), alpha=taps[i])
        x = blurred
    return x


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B,) float64: the structural similarity of images (Wang et al. 2004, eq. 13), averaged over positions and channels.

    Gaussian window 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, population variances. Border: no padding, only
    windows that lie wholly inside the image count. Computed in float64, because local variances are differences of large terms.

    Args:
        x, y: (B, C, H, W) in [0, 1], H and W at least 11.
    """
    _check_pair(x, y)
    if x.ndim != 4 or min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: shape {tuple(x.shape)}; expected (batch, channels, height, width), at least {SSIM_WINDOW} pixels a side")
    rows = max(1, 2**18 // math.prod(x.shape[1:]))  # a few images at a time: all five maps of a part stay in the cache
    return torch.cat([_ssim(a.double(), b.double()) for a, b in zip(x.split(rows), y.split(rows), strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    energy = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (similar / energy).flatten(1).mean(1)


class ReconstructionMetrics:
    """PSNR and SSIM over any number of batches. SSIM stands for images of at least 11 pixels a side, otherwise it is left out.

    Attributes:
        sums: (5,) float64: samples, squared errors, PSNRs, samples without error, SSIMs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.has_ssim: bool | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """x, y: originals and reconstructions, (B, C, *axes) in [0, 1]."""
        mse = squared_error(x, y)
        self.has_ssim = x.ndim == 4 and min(x.shape[2:]) >= SSIM_WINDOW
        similarity = ssim(x, y) if self.has_ssim else torch.zeros_like(mse)
        parts = [torch.ones_like(mse), mse, _decibels(mse), (mse == 0).double(), similarity]
        self.sums += torch.stack([part.sum() for part in parts]).to(self.sums.device)

    def merge(self, other: Self) -> Self:
        """Adds what ``other`` has seen; returns self."""
        self.sums += other.sums.to(self.sums.device)
        self.has_ssim = other.has_ssim if self.has_ssim is None else self.has_ssim
        return self

    def all_reduce_(self, comm: Comm) -> Self:
        """Adds up over the ranks; a rank that saw nothing takes part with zeros."""
        flag = torch.tensor([1.0 if self.has_ssim else 0.0], dtype=torch.float64, device=self.sums.device)
        reduced = comm.all_reduce_sum_(torch.cat([self.sums, flag]))
        self.sums, self.has_ssim = reduced[:5], bool(reduced[5] > 0)
        return self

    def compute(self) -> dict[str, Any]:
        """The figures of all samples.

        ``samples``; ``psnr``: mean per sample, of at most ``MAX_PSNR`` each; ``psnr_pooled``: of the mean error, likewise;
        ``mse``; ``exact``: samples without any error; for images ``ssim``.
        """
        count, mse, decibels, exact, similarity = self.sums.tolist()
        if count == 0:
            raise ValueError("metrics: no samples were given")
        figures = {
            "samples": int(count),
            "psnr": decibels / count,
            "psnr_pooled": float(_decibels(self.sums[1] / count)),
            "mse": mse / count,
            "exact": int(exact),
        }
        return figures | ({"ssim": similarity / count} if self.has_ssim else {})


@dataclass(frozen=True)
class CodeStatistics:
    """How the codes of one level are used.

    Attributes:
        name, vocab, positions: of the level.
        codes: how many codes were counted.
        used: how many of the vocabulary occurred; ``usage`` their share.
        entropy_bits: -sum p log2 p of the frequencies: what a memoryless coder pays per code.
        perplexity: exp of the entropy in nats; K when uniform.
        bits_per_image: ``entropy_bits`` times positions; ``nominal_bits_per_image``: log2 K times positions.
    """

    name: str
    vocab: int
    positions: int
    codes: int
    used: int
    usage: float
    perplexity: float
    entropy_bits: float
    bits_per_image: float
    nominal_bits_per_image: float


def code_statistics(counts: Tensor, level: LevelSpec) -> CodeStatistics:
    """counts: (vocab,), how often each code occurred, or (used,) of those that did; at least one did."""
    if counts.ndim != 1 or counts.numel() > level.vocab:
        raise ValueError(f"counts of level {level.name!r}: shape {tuple(counts.shape)}; expected at most ({level.vocab},)")
    total = int(counts.sum())
    if total == 0:
        raise ValueError(f"counts of level {level.name!r}: no codes were given")
    p = counts[counts > 0].double() / total
    nats = max(0.0, float(-(p * p.log()).sum()))  # not -0.0, where one code is all
    used = p.numel()
    return CodeStatistics(
        name=level.name,
        vocab=level.vocab,
        positions=level.positions,
        codes=total,
        used=used,
        usage=used / level.vocab,
        perplexity=math.exp(nats),
        entropy_bits=nats / math.log(2),
        bits_per_image=nats / math.log(2) * level.positions,
        nominal_bits_per_image=math.log2(level.vocab) * level.positions,
    )


def expected_codes(codes: int, seen: int) -> float:
    """How many different codes a healthy codebook shows in ``seen`` of them: as many as half as many draws from all alike would."""
    return codes * -math.expm1(-seen / (2 * codes))


class CodeMetrics:
    """Counts every code of every level.

    Attributes:
        tallies: one for each level.
    """

    def __init__(self, levels: Sequence[LevelSpec], device: torch.device | str = "cpu") -> None:
        self.levels = tuple(levels)
        self.tallies = [Tally(level.vocab, device) for level in self.levels]

    def update(self, codes: Sequence[Tensor]) -> None:
        """codes: one (B, *grid) integer tensor per level, in [0, vocab)."""
        if len(codes) != len(self.levels):
            raise ValueError(f"codes: {len(codes)} levels; expected {len(self.levels)}")
        for level, tally, c in zip(self.levels, self.tallies, codes, strict=True):
            try:
                tally.add(c)
            except ValueError as error:
                raise ValueError(f"codes of level {level.name!r}: {error}") from None

    def merge(self, other: Self) -> Self:
        """Adds what ``other`` has seen; returns self."""
        for tally, more in zip(self.tallies, other.tallies, strict=True):
            tally.merge(more)
        return self

    def all_reduce_(self, comm: Comm) -> Self:
        """Adds up over the ranks."""
        for tally in self.tallies:
            tally.all_reduce_(comm)
        return self

    def compute(self) -> list[CodeStatistics]:
        """One per level, coarse to fine."""
        return [code_statistics(tally.occurred(), level) for tally, level in zip(self.tallies, self.levels, strict=True)]
