"""Which positions are masked, and when each is revealed: schedules, counts and orders, as pure functions.

A schedule gamma falls from 1 at r = 0 to 0 at r = 1: the share of positions that are masked after the share r of the way
(Chang et al. 2022, arXiv:2202.04200, section 3.3). Training draws r; decoding goes through r = t / steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt", "arccos"]
SCHEDULES = get_args(Schedule)
_GAMMA: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda r: torch.cos(r * (math.pi / 2)),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "sqrt": lambda r: 1 - r.sqrt(),
    "arccos": lambda r: torch.acos(r) * (2 / math.pi),  # of Besnier et al. 2025
}
_PRIMES = (2, 3, 5)


def gamma(schedule: str, r: Tensor) -> Tensor:
    """The share of positions that are masked at ``r`` in [0, 1]."""
    return _GAMMA[schedule](r)


def masked_count(schedule: str, r: Tensor, size: int) -> Tensor:
    """(B,) int64 in [1, size]: ceil(gamma(r) size), how many of ``size`` positions training masks.

    Args:
        r: (B,) in (0, 1), float64, so that the last bit of a cosine moves no count.
    """
    return torch.ceil(gamma(schedule, r) * size).long().clamp(1, size)


def masked_places(numbers: Tensor, count: Tensor) -> Tensor:
    """(..., N) bool: the ``count`` (...) positions whose numbers (..., N) are smallest; equal numbers by position."""
    ranks = numbers.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks < count[..., None]


def _rows(schedule: str, steps: int, unknown: Tensor) -> Iterator[Tensor]:
    """steps + 1 times (k,) int64: how many of ``unknown`` (k,) positions are still masked after t steps."""
    share = gamma(schedule, torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps)
    left = unknown
    yield left
    for step in range(1, steps + 1):
        most = left - 1
        wanted = torch.floor(share[step] * unknown).long()
        least = most.clamp(max=steps - step)
        left = torch.maximum(torch.minimum(wanted, most), least).clamp(min=0)
        yield left


@lru_cache(maxsize=16)
def remaining(schedule: str, steps: int, unknown: tuple[int, ...]) -> Tensor:
    """(steps + 1, k) int64 on the CPU, not to be written to: how many of each of k counts u of unknown positions are still masked
    after t steps.

    floor(gamma(t / steps) u) as in Chang et al. 2022, bounded so that every step reveals at least one position where there are
    enough of them: all are known after the last step, and after step u where u < steps.
    """
    return torch.stack(list(_rows(schedule, steps, torch.tensor(unknown, device="cpu"))))


@lru_cache(maxsize=16)
def most_revealed(schedule: str, steps: int, size: int) -> tuple[int, ...]:
    """Of each step, the most positions that it reveals, whichever of the counts 0..size is unknown."""
    rows = _rows(schedule, steps, torch.arange(size + 1, device="cpu"))
    return tuple(int((before - after).max()) for before, after in pairwise(rows))


def _radical_inverse(count: int, base: int) -> tuple[Tensor, int]:
    """Numerators (count,) and the one denominator of the van der Corput sequence of ``base`` from its element 1 on; exact."""
    index = torch.arange(1, count + 1, device="cpu")
    numerator, denominator = torch.zeros_like(index), 1
    while denominator <= count:
        numerator = numerator * base + index % base
        index = index // base
        denominator *= base
    return numerator, denominator


@cache
def halton_order(shape: tuple[int, ...]) -> Tensor:
    """(prod(shape),) int64 on the CPU, not to be written to: flat positions in the order in which the Halton sequence visits them.

    One coordinate per axis, the radical inverses of bases 2, 3 and 5 (Halton 1960), scaled to the grid; a cell that is visited
    again is left out. Any first part of the order is spread evenly over the grid, so that codes revealed together are far apart
    and depend little on each other (Besnier et al. 2025, arXiv:2503.17076).
    """
    if not 1 <= len(shape) <= len(_PRIMES):
        raise ValueError(f"order: 'halton' is for 1 to {len(_PRIMES)} axes; got a grid {shape}")
    size, count = math.prod(shape), 4 * math.prod(shape)
    while True:
        cells = torch.zeros(count, dtype=torch.int64, device="cpu")
        for axis, base in zip(shape, _PRIMES, strict=False):
            numerator, denominator = _radical_inverse(count, base)
            cells = cells * axis + numerator * axis // denominator
        never = torch.full((size,), count, device="cpu")
        first = never.scatter_reduce(0, cells, torch.arange(count, device="cpu"), "amin")
        if int(first.max()) < count:
            return first.argsort()
        count *= 2
