"""Masks: what is hidden is filled from what is known."""

from __future__ import annotations

import pytest
import torch

from intarsia.specs import SignalSpec
from pipelines.masks import enlarged, filled


@pytest.mark.parametrize("shape", [(9,), (5, 6), (3, 4, 5)])
def test_what_is_hidden_is_filled_with_the_nearest_known_along_an_axis(shape: tuple[int, ...]) -> None:
    x, mask = torch.rand(6, 2, *shape), torch.rand(6, 1, *shape) < 0.5
    mask[0], mask[1] = False, True
    mask[(1, 0, *[0] * len(shape))] = False
    y = filled(x, mask)
    assert torch.equal(y, filled(torch.where(mask, -x, x), mask)), "nothing of what is hidden"
    assert torch.equal(torch.where(mask, 0, y), torch.where(mask, 0, x)), "what is known stays"
    assert torch.equal(y[0], x[0]) and (y[1] == x[(1, slice(None), *[slice(1)] * len(shape))]).all()
    for row, *place in mask[2:].nonzero().tolist():
        lines = [(axis, i) for axis, size in enumerate(shape) for i in range(size)]
        known = [
            (abs(i - place[1 + axis]), (*place[1 : 1 + axis], i, *place[2 + axis :]))
            for axis, i in lines
            if not mask[(2 + row, 0, *place[1 : 1 + axis], i, *place[2 + axis :])]
        ]
        near = [x[(2 + row, slice(None), *at)] for distance, at in known if distance == min(known)[0]]
        assert not known or any(torch.equal(y[(2 + row, slice(None), *place[1:])], value) for value in near)


def test_a_row_of_which_nothing_is_known_stays_as_it_is() -> None:
    x, mask = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1, :, :, 0] = False
    y = filled(x, mask)
    assert torch.equal(y[0], x[0]) and torch.equal(y[1], x[1, :, :, :1].expand(-1, -1, 4)) and bool(mask[0].all())


def test_beside_a_straight_border_that_is_what_outpainting_starts_from() -> None:
    x, mask = torch.rand(3, 1, 8, 8), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    assert torch.equal(filled(x, mask), enlarged(x[:, :, :4], [(0, 4), (0, 0)], SignalSpec("image", 1, (8, 8)))[0])
