"""Codes that a tokenizer decodes: of the right count, type, range and shape, all levels scaled alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from intarsia.specs import SignalSpec
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture
Codes = list[Tensor]


def codes(rows: int, height: int, width: int, levels: int = 2) -> Codes:
    return [torch.zeros(rows, height * f, width * f, dtype=torch.int64) for f in (1, 2, 4)[:levels]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c[0][0], c[1]], r"level 'top': shape \(2, 2\); expected \(batch, 2, 2\), or another grid of as many axes"),
        (lambda c: [c[0], c[1][:, :, None]], r"level 'bottom': shape \(3, 4, 1, 4\); expected \(batch, 4, 4\)"),
        (lambda c: [c[0], c[1][:, :2]], r"level 'bottom': shape \(3, 2, 4\) beside \(3, 2, 2\) of level 'top'; expected \(3, 4, 4\)"),
        (lambda c: [c[0].new_zeros(3, 4, 2), c[1]], r"level 'bottom': shape \(3, 4, 4\) beside \(3, 4, 2\) of level 'top'"),
        (lambda c: [c[0], c[1][:2]], r"level 'bottom': shape \(2, 4, 4\) beside \(3, 2, 2\)"),
        (lambda c: [c[0][:, :0], c[1][:, :0]], r"level 'top': shape \(3, 0, 2\)"),
        (lambda c: [c[0], c[1] + 7], r"level 'bottom': values in \[7, 7\]"),
    ],
)
def test_codes_of_another_shape_are_refused_by_their_level(change: Callable[[Codes], Codes], message: str) -> None:
    tokenizer = tiny.Ladder(tiny.LadderConfig(levels=2), SignalSpec("image", 1, (8, 8)))
    with pytest.raises(ValueError, match=f"^codes of {message}"):
        tokenizer.decode(change(codes(3, 2, 2)))


@pytest.mark.parametrize(("rows", "height", "width"), [(3, 2, 2), (2, 3, 1), (1, 5, 4), (0, 2, 2)])
def test_other_grids_decode_where_all_levels_are_scaled_alike(rows: int, height: int, width: int) -> None:
    tokenizer = tiny.Ladder(tiny.LadderConfig(levels=3), SignalSpec("image", 1, (8, 8)))
    for count in (1, 3):
        found = tokenizer.decode(codes(rows, height, width, count))
        assert found.shape[0] == rows and found.ndim == 4
