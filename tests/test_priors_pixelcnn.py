"""PixelCNN: no blind spot, every activation computed once, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.rng import uniform
from intarsia.specs import Cond
from stage2_prior.causal_attention import CausalAttention
from stage2_prior.gated_conv import GatedLayer
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.base import PRIORS
from stage2_prior.priors.pixelcnn import PixelCNNPrior
from stage2_prior.sampling import DrawOptions, draw, guide
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


def test_attention_sees_every_position_before_however_short_the_convolutions_reach() -> None:
    case = Case("pixelcnn", ((5, (5, 6)),), config={"depth": 1, "attention": 1})
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    with Leaves([prior.codes]) as leaves:  # type: ignore[list-item]
        (logits,) = prior.logits(case.codes(1))
    for i in range(30):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), leaves.found, retain_graph=True, allow_unused=True)
        assert (gradient[0].abs().amax(1) > 0).tolist() == [j < i for j in range(30)], f"position {divmod(i, 6)}"


@pytest.mark.parametrize(("depth", "blocks", "after"), [(12, 3, [3, 7, 11]), (5, 2, [1, 4]), (4, 4, [0, 1, 2, 3]), (3, 1, [2]), (3, 0, [])])
def test_attention_is_spread_evenly_among_the_layers_and_stands_last(depth: int, blocks: int, after: list[int]) -> None:
    prior = Case("pixelcnn", ((5, (2, 2)),), config={"depth": depth, "attention": blocks}).build()
    assert isinstance(prior, PixelCNNPrior)
    assert list(prior.after) == after and list(prior.after.values()) == list(range(blocks))


def test_label_and_upper_codes_enter_every_gate_and_every_attention() -> None:
    """With all but one block's context silenced, in turn, the likelihood still hears of the label and of every upper code."""
    case = Case("pixelcnn", ((4, (2, 2)), (5, (4, 4))), levels="1:2", classes=2, config={"depth": 3, "attention": 2})
    codes = case.codes(1)
    for heard in range(5):
        prior = case.build().double()
        assert isinstance(prior, PixelCNNPrior)
        for i, block in enumerate([*prior.stack, *prior.attentions]):
            if i != heard:
                torch.nn.init.zeros_(block.context.weight)
        nll = prior.nll(codes, Cond(label=torch.tensor([0])))
        assert (prior.nll(codes, Cond(label=torch.tensor([1]))) - nll).abs().max() > 1e-4, f"block {heard}"
        for place in range(4):
            changed = codes[0].clone()
            changed.view(-1)[place] = (changed.view(-1)[place] + 1) % 4
            assert (prior.nll([changed, codes[1]], Cond(label=torch.tensor([0]))) - nll).abs().max() > 1e-6, f"block {heard}"
    halves = case.build().stack  # type: ignore[union-attr]
    assert [layer.context.out_features for layer in halves] == [4 * 12, 4 * 12, 2 * 12]  # vertical gates too, where there are any


# Step by step ----------------------------------------------------------------------------------------------------
SETTINGS = [
    Case("pixelcnn", ((7, (5, 6)),), classes=3, config={"depth": 4}),
    Case("pixelcnn", ((7, (6, 5)),), config={"depth": 3, "kernel": 5, "attention": 1}),
    Case("pixelcnn", ((4, (2, 3)), (6, (4, 6))), levels="1:2", classes=3, config={"depth": 4, "attention": 2, "heads": 3}),
    Case("pixelcnn", ((5, (1, 7)),), classes=2, config={"kernel": 7, "attention": 1}),
    Case("pixelcnn", ((5, (7, 1)),), config={"depth": 3, "attention": 3}),
    Case("pixelcnn", ((5, (2, 2)), (4, (3, 3)), (6, (5, 5))), levels="2:3", classes=2, config={"attention": 1}),
]
every_setting = pytest.mark.parametrize("case", SETTINGS, ids=str)


@every_setting
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_draws_are_those_of_a_full_forward_for_each_position(case: Case, guidance: float) -> None:
    """The reference runs the network over the whole grid, empty behind what it has drawn, once for every position."""
    prior = case.build().double()
    assert isinstance(prior, PixelCNNPrior)
    ids, (level, place) = torch.arange(9) + 50, (prior.levels.start, prior.own[0].shape)
    upper, cond = case.codes(9)[:level], case.cond(9)
    options = DrawOptions(guidance=guidance if case.classes else 1.0, temperature=0.8, top_k=4)
    codes = torch.zeros(9, *place, dtype=torch.int64)
    numbers = uniform(6, "sample", ids[:, None], level, torch.arange(place[0] * place[1])[None], dtype=torch.float64)
    for i in range(place[0] * place[1]):
        logits = prior.logits([*upper, codes], cond)[0][:, i]
        if options.guided:
            logits = guide(logits, prior.logits([*upper, codes])[0][:, i], options.guidance_at(0))
        codes.view(9, -1)[:, i] = draw(logits, numbers[:, i], options)
    sampled = prior.sample(ids, upper=upper, cond=cond, seed=6, guidance=options.guidance, temperature=0.8, top_k=4, micro_batch=4)
    assert torch.equal(sampled[0], codes)


@every_setting
@pytest.mark.parametrize("batch", [1, 3, 40])
@torch.no_grad()
def test_logits_step_by_step_are_those_of_the_full_forward_to_1e_6(case: Case, batch: int) -> None:
    prior = case.build(noise=0.1)
    assert isinstance(prior, PixelCNNPrior)
    codes, cond = case.codes(batch), case.cond(batch)
    full = prior.logits(codes, cond)[0]
    state, previous = prior.begin(batch, codes[: prior.levels.start], cond), None
    for i in range(full.shape[1]):
        logits, state = prior.step(state, previous)
        assert (logits - full[:, i]).abs().max() < 1e-6 * max(1.0, full.abs().max().item())
        previous = codes[-1].flatten(1)[:, i]


@torch.no_grad()
def test_half_precision_steps_stay_near_those_of_float32() -> None:
    case = SETTINGS[2]
    prior, codes, cond = case.build(noise=0.1), case.codes(4), case.cond(4)
    assert isinstance(prior, PixelCNNPrior)
    full = prior.logits(codes, cond)[0]
    narrow = prior.to(torch.bfloat16)
    state, previous = narrow.begin(4, codes[:1], cond), None
    for i in range(full.shape[1]):
        logits, state = narrow.step(state, previous)
        assert (logits.float() - full[:, i]).abs().max() < 0.05 * full.abs().max()
        previous = codes[-1].flatten(1)[:, i]


def test_one_step_touches_only_its_own_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vertical stack runs once for each row, the horizontal one, keys and values once for each position."""
    calls = {"start_row": 0, "step": 0, "attend": 0}

    def count(kind: type, name: str, key: str) -> None:
        real = getattr(kind, name)

        def counted(self, *args):  # type: ignore[no-untyped-def]
            calls[key] += 1
            return real(self, *args)

        monkeypatch.setattr(kind, name, counted)

    count(GatedLayer, "start_row", "start_row")
    count(GatedLayer, "step", "step")
    count(CausalAttention, "step", "attend")
    for name in ("convolve", "attend"):  # what runs over whole grids

        def refused(*args, **kwargs):  # type: ignore[no-untyped-def]
            raise AssertionError("a step ran over the whole grid")

        monkeypatch.setattr(f"stage2_prior.{'gated_conv' if name == 'convolve' else 'causal_attention'}.{name}", refused)
    case = Case("pixelcnn", ((5, (4, 6)),), config={"depth": 3, "attention": 2})
    case.build().sample(torch.arange(2))
    assert calls == {"start_row": 3 * 4, "step": 3 * 24, "attend": 2 * 24}


# What it refuses -------------------------------------------------------------------------------------------------
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


def test_attention_that_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="prior.attention: 3 blocks among prior.depth, 2 layers; expected at most one after each"):
        Case("pixelcnn", ((5, (2, 2)),), config={"attention": 3}).build()
    with pytest.raises(ConfigError, match="prior.width: 12 is no multiple of prior.heads, 5"):
        Case("pixelcnn", ((5, (2, 2)),), config={"attention": 1, "heads": 5}).build()
    Case("pixelcnn", ((5, (2, 2)),), config={"heads": 5}).build()  # without attention there are no heads
