"""The digits of a code, and the vectors that stand for codes.

A code of a quantiser with factors (the levels of FSQ, the bits of LFQ) is a mixed-radix number, the first factor the lowest
digit: code = sum_i digit_i * prod_{j<i} size_j. Neighbouring factors taken together are again one digit of such a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from intarsia.config import ConfigError
from intarsia.specs import LevelSpec

HeadKind = Literal["auto", "full", "factorised"]
LARGEST_FULL = 16384  # the largest vocabulary that "auto" gives one softmax
LARGEST_DIGIT = 1024

Sizes = tuple[int, ...]


def digit_sizes(factors: Sequence[int]) -> Sizes:
    """The sizes of the digits in which codes with two factors or more are predicted.

    Neighbouring factors are taken together: the fewest digits, but at least two, of at most ``LARGEST_DIGIT`` each, and of
    these the split whose largest digit is smallest. 18 bits make (512, 512), as in MAGVIT-v2 (Yu et al. 2023); a digit costs a
    draw, and one softmax over several factors knows more than their product.
    """
    whole = tuple(factors)
    for count in range(2, len(whole) + 1):
        cuts = [(0, *inner, len(whole)) for inner in combinations(range(1, len(whole)), count - 1)]
        best = min((tuple(math.prod(whole[a:b]) for a, b in pairwise(cut)) for cut in cuts), key=max)
        if max(best) <= LARGEST_DIGIT:
            return best
    return whole


def sizes_of(level: LevelSpec, head: HeadKind) -> Sizes:
    """The digits of a level's codes: (vocab,), the code itself, where it is predicted in one go.

    Args:
        head: "full", "factorised", or "auto": factorised where the vocabulary exceeds ``LARGEST_FULL`` and has factors.

    Raises:
        ConfigError: for "factorised" where a level has one factor.
    """
    several = len(level.factors) > 1
    if head == "factorised" and not several:
        raise ConfigError([f"prior.head: 'factorised' needs levels with factors; level {level.name!r} has {level.factors}"])
    if several and (head == "factorised" or (head == "auto" and level.vocab > LARGEST_FULL)):
        return digit_sizes(level.factors)
    return (level.vocab,)


def to_digits(codes: Tensor, sizes: Sizes) -> list[Tensor]:
    """The digits of integers in [0, prod(sizes)), the lowest first: one tensor of their shape each."""
    if len(sizes) == 1:
        return [codes]
    out, rest = [], codes
    for size in sizes:
        out.append(rest % size)
        rest = torch.div(rest, size, rounding_mode="floor")
    return out


def weights_of(sizes: Sizes) -> Sizes:
    """What each digit counts: code = sum_i digit_i * weight_i."""
    return tuple(math.prod(sizes[:i]) for i in range(len(sizes)))


def _embedding(count: int, width: int, std: float) -> nn.Embedding:
    table = nn.Embedding(count, width)
    nn.init.normal_(table.weight, std=std)
    return table


class CodeTable(nn.Embedding):
    """A vector for each code."""

    def __init__(self, vocab: int, width: int, std: float) -> None:
        super().__init__(vocab, width)
        nn.init.normal_(self.weight, std=std)

    def part(self, digit: int, value: Tensor) -> Tensor:
        """What digit ``digit`` adds to a code's vector: here the only one, the code itself. (...) to (..., D)."""
        return self(value)


class DigitTable(nn.Module):
    """A code's vector is the sum of one for each of its digits."""

    def __init__(self, sizes: Sizes, width: int, std: float) -> None:
        super().__init__()
        self.sizes = sizes
        self.tables = nn.ModuleList(_embedding(size, width, std * len(sizes) ** -0.5) for size in sizes)

    def part(self, digit: int, value: Tensor) -> Tensor:
        """What digit ``digit`` adds to a code's vector: (...) int64 in [0, its size) to (..., D)."""
        return self.tables[digit](value)

    def forward(self, codes: Tensor) -> Tensor:
        """(...) int64 in [0, vocab) to (..., D)."""
        first, *more = (self.part(i, digit) for i, digit in enumerate(to_digits(codes, self.sizes)))
        return sum(more, first)


def code_table(sizes: Sizes, width: int, std: float) -> CodeTable | DigitTable:
    """Vectors of about this standard deviation for codes with these digits."""
    return CodeTable(sizes[0], width, std) if len(sizes) == 1 else DigitTable(sizes, width, std)
