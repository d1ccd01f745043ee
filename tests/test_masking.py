"""Schedules, counts and orders: what is masked, and when it is revealed."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from stage2_prior.masking import SCHEDULES, gamma, halton_order, masked_count, masked_places, most_revealed, remaining

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@every_schedule
def test_a_schedule_falls_from_1_to_0(schedule: str) -> None:
    r = torch.linspace(0, 1, 1001, dtype=torch.float64)
    share = gamma(schedule, r)
    assert abs(share[0] - 1) < 1e-12 and abs(share[-1]) < 1e-12
    assert (share.diff() < 0).all()


@pytest.mark.parametrize(
    ("schedule", "half"),
    [("cosine", 2**-0.5), ("linear", 0.5), ("square", 0.75), ("cubic", 0.875), ("sqrt", 1 - 2**-0.5), ("arccos", 2 / 3)],
)
def test_schedules_are_those_of_their_names(schedule: str, half: float) -> None:
    assert abs(gamma(schedule, torch.tensor(0.5, dtype=torch.float64)).item() - half) < 1e-12


@every_schedule
def test_training_masks_the_next_whole_number_of_the_share_and_at_least_one(schedule: str) -> None:
    r = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r[0], r[1] = 1 - 2.0**-53, 2.0**-53
    count = masked_count(schedule, r, 49)
    assert count.min() >= 1 and count.max() <= 49 and count[0] == 1 and count[1] == 49
    for share, m in zip(gamma(schedule, r).tolist(), count.tolist(), strict=True):
        assert m == max(1, math.ceil(share * 49))


def test_the_masked_places_are_as_many_as_asked_and_any_of_them_as_likely() -> None:
    n, size = 20000, 5
    numbers = torch.rand(n, size, generator=torch.Generator().manual_seed(1))
    numbers[:50] = 0.5  # ties
    count = torch.arange(n) % size + 1
    masked = masked_places(numbers, count)
    assert torch.equal(masked.sum(1), count)
    share = masked[50:].double().mean(0)
    assert (share - 3 / 5).abs().max() < 0.02
    assert torch.equal(masked[0], torch.arange(size) < 1) and torch.equal(masked[3], torch.arange(size) < 4)  # equal ones by position


@every_schedule
@pytest.mark.parametrize(("steps", "size"), [(1, 1), (1, 9), (5, 5), (8, 49), (12, 196), (3, 4)])
def test_every_step_reveals_something_until_all_is_known(schedule: str, steps: int, size: int) -> None:
    table = remaining(schedule, steps, tuple(range(size + 1)))
    assert table.shape == (steps + 1, size + 1)
    for unknown in range(size + 1):
        left = table[:, unknown].tolist()
        shown = [a - b for a, b in itertools.pairwise(left)]
        assert left[0] == unknown and left[-1] == 0
        assert all(s >= 1 for s in shown[: min(steps, unknown)]) and all(s == 0 for s in shown[unknown:])
        share = gamma(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps).tolist()
        for step in range(1, steps):
            wanted = math.floor(share[step] * unknown)
            if steps - step <= wanted <= left[step - 1] - 1:  # where no bound stands in the way
                assert left[step] == wanted
        assert remaining(schedule, steps, (unknown,))[:, 0].tolist() == left  # whatever others are asked for
    assert table.amax(1).tolist() == table[:, size].tolist()
    assert most_revealed(schedule, steps, size) == tuple((table[:-1] - table[1:]).amax(1).tolist())


def test_eight_cosine_steps_over_49_positions_are_those_of_the_paper() -> None:
    left = [49] + [math.floor(49 * math.cos(math.pi / 2 * t / 8)) for t in range(1, 8)] + [0]
    assert remaining("cosine", 8, (49,))[:, 0].tolist() == left == [49, 48, 45, 40, 34, 27, 18, 9, 0]


# Halton ----------------------------------------------------------------------------------------------------------
GRIDS = [(1,), (9,), (2, 2), (7, 7), (14, 14), (3, 5), (1, 6), (32, 32), (2, 3, 4), (4, 6, 6)]


def radical_inverse(index: int, base: int) -> Fraction:
    value, scale = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_the_halton_order_visits_each_cell_once_in_the_order_of_the_sequence(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    order = halton_order(shape).tolist()
    assert sorted(order) == list(range(size))
    expected: dict[int, None] = {}
    index = 0
    while len(expected) < min(size, 200):
        index += 1
        cell = 0
        for axis, base in zip(shape, (2, 3, 5), strict=False):
            cell = cell * axis + math.floor(radical_inverse(index, base) * axis)
        expected.setdefault(cell)
    assert order[: len(expected)] == list(expected)


def discrepancy(cells: torch.Tensor, rows: int, columns: int) -> float:
    """The largest difference, over boxes at the origin, between the share of cells inside and the share of the area."""
    count = torch.zeros(rows, columns, dtype=torch.float64).view(-1).index_add_(0, cells, torch.ones(len(cells), dtype=torch.float64))
    inside = count.view(rows, columns).cumsum(0).cumsum(1) / len(cells)
    area = torch.arange(1, rows + 1)[:, None] * torch.arange(1, columns + 1)[None] / (rows * columns)
    return float((inside - area).abs().max())


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5])
def test_any_first_part_of_the_halton_order_is_spread_more_evenly_than_chance(part: float) -> None:
    size = 16 * 16
    first = int(part * size)
    generator = torch.Generator().manual_seed(0)
    random = [discrepancy(torch.randperm(size, generator=generator)[:first], 16, 16) for _ in range(100)]
    assert discrepancy(halton_order((16, 16))[:first], 16, 16) < min(random)


def test_the_halton_order_is_for_one_to_three_axes() -> None:
    with pytest.raises(ValueError, match=r"order: 'halton' is for 1 to 3 axes; got a grid \(2, 2, 2, 2\)"):
        halton_order((2, 2, 2, 2))
