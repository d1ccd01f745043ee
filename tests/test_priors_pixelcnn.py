"""PixelCNN: no blind spot, every activation computed once, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from stage2_prior.gated_conv import GatedLayer
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.base import PRIORS
from tests.tiny_priors import Case, Leaves


@pytest.mark.parametrize("kernel", [3, 5])
def test_there_is_no_blind_spot(kernel: int) -> None:
    """With layers enough, every position sees every one before it, those to the upper right too."""
    case = Case("pixelcnn", ((5, (6, 7)),), config={"depth": 7, "kernel": kernel})
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    with Leaves([prior.codes]) as leaves:  # type: ignore[list-item]
        (logits,) = prior.logits(case.codes(1))
    for i in range(42):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), leaves.found, retain_graph=True, allow_unused=True)
        seen = gradient[0].abs().amax(1) > 0
        assert seen.tolist() == [j < i for j in range(42)], f"position {divmod(i, 7)}"


@pytest.mark.parametrize(("kernel", "depth"), [(3, 1), (3, 2), (5, 1)])
def test_the_field_of_view_is_the_cone_that_the_kernels_span(kernel: int, depth: int) -> None:
    rows, columns, reach, side = 8, 9, (kernel + 1) // 2, kernel // 2
    case = Case("pixelcnn", ((5, (rows, columns)),), config={"depth": depth, "kernel": kernel})
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    with Leaves([prior.codes]) as leaves:  # type: ignore[list-item]
        (logits,) = prior.logits(case.codes(1))
    r, c = 6, 4
    (gradient,) = torch.autograd.grad(logits[0, r * columns + c].square().sum(), leaves.found)
    seen = (gradient[0].abs().amax(1) > 0).view(rows, columns)
    # Layer l's horizontal stack reads its own vertical one, which has seen l rows of kernels; the row itself widens the
    # reach to the left, and what a place to the left was told by its vertical stack comes with it.
    to_left = depth * (reach - 1)
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    expected[r, max(0, c - 1 - to_left) : c] = True
    for first in range(1, depth + 1):  # told by the vertical stack of layer ``first``; later layers carry it to the right
        for row in range(max(0, r - 1 - first * (reach - 1)), r):
            left = (depth - first) * (reach - 1)
            expected[row, max(0, c - left - first * side) : c + first * side + 1] = True
    assert torch.equal(seen, expected)


def test_one_step_touches_only_its_own_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vertical stack runs once for each row, the horizontal one once for each position."""
    calls = {"row": 0, "step": 0}
    start_row, step = GatedLayer.start_row, GatedLayer.step

    def count_row(self, *args):  # type: ignore[no-untyped-def]
        calls["row"] += 1
        return start_row(self, *args)

    def count_step(self, *args):  # type: ignore[no-untyped-def]
        calls["step"] += 1
        return step(self, *args)

    monkeypatch.setattr(GatedLayer, "start_row", count_row)
    monkeypatch.setattr(GatedLayer, "step", count_step)
    case = Case("pixelcnn", ((5, (4, 6)),), config={"depth": 3})
    case.build().sample(torch.arange(2))
    assert calls == {"row": 3 * 4, "step": 3 * 24}


@pytest.mark.parametrize(
    ("shapes", "levels"),
    [(((5, (9,)),), ""), (((5, (2, 2, 2)),), ""), (((5, (2, 2)), (5, (4, 4))), ""), (((5, (2, 2)), (5, (4, 4))), "0:2")],
)
def test_anything_but_one_two_dimensional_level_is_refused(shapes: tuple, levels: str) -> None:
    with pytest.raises(ConfigError, match=r"prior.levels: a pixelcnn prior models one two-dimensional level; .* has \("):
        Case("pixelcnn", shapes, levels).build()


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="kernel: expected an odd number; got 4"):
        PRIORS.config("pixelcnn").from_dict({"kernel": 4})
