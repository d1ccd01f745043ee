"""What each level of codes is worth: the quality of leading levels alone, and what another sample's codes of one level cost.

Usage shows nothing here: a coarse level can use all of its codes and carry nothing. If it does carry something, its codes
cannot be taken from another sample without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from intarsia.distributed import Comm
from stage1_tokenizer.metrics import CodeStatistics, ReconstructionMetrics, unit
from stage1_tokenizer.tokenizers.base import Tokenizer


def partners(rows: Tensor, n: int) -> Tensor:
    """The samples that ``rows`` (B,) of a split of ``n`` swap codes with: half a split further, whatever the batch or process."""
    return (rows + n // 2) % n


def swapped(codes: list[Tensor], others: list[Tensor], level: int) -> list[Tensor]:
    """``codes`` with one level taken from ``others``."""
    return [other if i == level else own for i, (own, other) in enumerate(zip(codes, others, strict=True))]


def prefix_names(tokenizer: Tokenizer) -> dict[int, str]:
    """Count of leading levels -> "top + middle", for what decodes alone, without all levels. Beyond three levels "a ... c"."""
    names = [level.name for level in tokenizer.level_specs()]
    counts = tokenizer.prefixes()[:-1]
    return {count: " + ".join(names[:count]) if count <= 3 else f"{names[0]} ... {names[count - 1]}" for count in counts}


def prefix_rows(tokenizer: Tokenizer, codes: list[Tensor]) -> dict[str, Tensor]:
    """Name of each prefix of levels that decodes alone -> signals (B, C, *axes) in [0, 1]."""
    return {name: unit(tokenizer.decode(codes[:count])) for count, name in prefix_names(tokenizer).items()}


def swapped_rows(tokenizer: Tokenizer, codes: list[Tensor], others: list[Tensor]) -> dict[str, Tensor]:
    """ "other NAME" -> signals (B, C, *axes) in [0, 1], with the codes of that level from ``others``; nothing for one level."""
    levels = tokenizer.level_specs()
    if len(levels) == 1:
        return {}
    return {f"other {level.name}": unit(tokenizer.decode(swapped(codes, others, i))) for i, level in enumerate(levels)}


@dataclass(frozen=True)
class PrefixFigures:
    """A reconstruction from leading levels alone.

    Attributes:
        levels: how many; ``names``: which.
        psnr: dB, mean per sample; ``psnr_pooled``: of the mean error; ``ssim``: None for what is no image or too small.
        bits_per_image: of these levels, by the entropy of each; ``nominal_bits_per_image``: log2 K times positions.
    """

    levels: int
    names: tuple[str, ...]
    psnr: float
    psnr_pooled: float
    ssim: float | None
    bits_per_image: float
    nominal_bits_per_image: float


@dataclass(frozen=True)
class SwapFigures:
    """A reconstruction with one level's codes of another sample, and all other levels kept.

    Attributes:
        name: of the level.
        psnr: dB, mean per sample; ``cost_db``: how much less than with the own codes.
    """

    name: str
    psnr: float
    cost_db: float


class LevelMetrics:
    """Sums over any number of batches and ranks; figures for each prefix that decodes alone, and for each level of several.

    Attributes:
        prefixes: count of leading levels -> sums.
        swaps: for each level; empty where there is one, or fewer than two samples.
    """

    def __init__(self, tokenizer: Tokenizer, samples: int) -> None:
        self.tokenizer = tokenizer
        self.levels = tokenizer.level_specs()
        self.prefixes = {count: ReconstructionMetrics(tokenizer.device) for count in tokenizer.prefixes()[:-1]}
        several = len(self.levels) > 1 and samples > 1
        self.swaps = [ReconstructionMetrics(tokenizer.device) for _ in self.levels] if several else []

    def __bool__(self) -> bool:
        """There is something to measure."""
        return bool(self.prefixes or self.swaps)

    def update(self, x: Tensor, codes: list[Tensor], others: list[Tensor]) -> None:
        """x: (B, C, *axes) in [-1, 1]; codes: theirs; others: those of their ``partners``."""
        for count, metrics in self.prefixes.items():
            metrics.update(unit(x), unit(self.tokenizer.decode(codes[:count]).to(x.dtype)))
        for level, metrics in enumerate(self.swaps):
            metrics.update(unit(x), unit(self.tokenizer.decode(swapped(codes, others, level)).to(x.dtype)))

    def all_reduce_(self, comm: Comm) -> Self:
        """Adds up over the ranks."""
        for metrics in (*self.prefixes.values(), *self.swaps):
            metrics.all_reduce_(comm)
        return self

    def compute(self, psnr: float, codes: list[CodeStatistics]) -> tuple[list[PrefixFigures], list[SwapFigures]]:
        """The figures, given the PSNR with all levels, and how the codes of each level are used on the same samples."""
        prefixes = []
        for count, metrics in self.prefixes.items():
            figures = metrics.compute()
            prefixes.append(
                PrefixFigures(
                    levels=count,
                    names=tuple(level.name for level in self.levels[:count]),
                    psnr=figures["psnr"],
                    psnr_pooled=figures["psnr_pooled"],
                    ssim=figures.get("ssim"),
                    bits_per_image=sum(level.bits_per_image for level in codes[:count]),
                    nominal_bits_per_image=sum(level.nominal_bits_per_image for level in codes[:count]),
                )
            )
        found = [metrics.compute()["psnr"] for metrics in self.swaps]
        swaps = [SwapFigures(level.name, value, psnr - value) for level, value in zip(self.levels, found, strict=False)]
        return prefixes, swaps


def lines(tree: dict[str, Any]) -> list[str]:
    """The ``prefixes`` and ``swaps`` of a report as lines of text."""
    found = [
        f"{' + '.join(figures['names'])} alone: PSNR {figures['psnr']:.2f} dB, {figures['bits_per_image']:.1f} of"
        f" {figures['nominal_bits_per_image']:.1f} bits per sample"
        for figures in tree["prefixes"]
    ]
    for figures in tree["swaps"]:
        found.append(f"another sample's {figures['name']} codes: PSNR {figures['psnr']:.2f} dB, a cost of {figures['cost_db']:.2f} dB")
    return found
