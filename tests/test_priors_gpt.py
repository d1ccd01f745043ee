"""GPT: one sequence out of several levels, positions, and what surrounds a place."""

from __future__ import annotations

import math

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.specs import Cond, LevelSpec
from stage2_prior.context import UpperCodes
from stage2_prior.layout import Layout, nearest_cells
from stage2_prior.packed import packed
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.gpt import GPTPrior, GPTState
from tests.tiny_priors import Case


def levels(*shapes: tuple[int, ...]) -> list[LevelSpec]:
    return [LevelSpec(f"level{i}", 5 + i, shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        (Layout(levels((2, 2))), [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (Layout(levels((1, 1), (1, 2))), [(0, 0), (1, 0), (1, 1)]),
        (Layout(levels((2,), (2,), (2,)), "position"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
    ],
    ids=["one", "level", "position"],
)
def test_join_puts_every_code_at_its_step_and_split_undoes_it(layout: Layout, steps: list[tuple[int, int]]) -> None:
    assert list(layout.steps) == steps and len(layout) == len(steps)
    maps = [torch.tensor([[100 * i + p for p in range(size)]] * 3) for i, size in enumerate(layout.sizes)]
    joined = layout.join(maps)
    assert joined.tolist() == [[100 * i + p for i, p in steps]] * 3
    assert all(torch.equal(a, b) for a, b in zip(layout.split(joined), maps, strict=True))
    features = layout.join([m[..., None].expand(-1, -1, 4) for m in maps])
    assert torch.equal(features[..., 2], joined)


def test_coordinates_of_one_level_count_its_cells_and_those_of_several_agree_on_the_finest_grid() -> None:
    assert Layout(levels((3,))).coordinates()[:, 0].tolist() == [0, 1, 2]
    assert Layout(levels((2, 3))).coordinates().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    both = Layout(levels((1, 2), (2, 4))).coordinates()
    assert both[:2].tolist() == [[0, 0], [0, 2]] and both[2:].tolist() == [[r, c] for r in range(2) for c in range(4)]


@pytest.mark.parametrize(("coarse", "fine"), [((2, 2), (4, 4)), ((3,), (7,)), ((1, 2, 2), (2, 3, 4)), ((4, 4), (2, 2)), ((3, 3), (3, 3))])
def test_the_nearest_cell_is_the_one_that_covers(coarse: tuple[int, ...], fine: tuple[int, ...]) -> None:
    cells = nearest_cells(coarse, fine).view(fine)
    for place in torch.cartesian_prod(*[torch.arange(s) for s in fine]).view(-1, len(fine)).tolist():
        index = 0
        for p, small, large in zip(place, coarse, fine, strict=True):
            index = index * small + int(p / large * small + 1e-9)
        assert int(cells[tuple(place)]) == index


def test_upper_codes_reach_the_cells_below_them_and_their_neighbours() -> None:
    torch.manual_seed(0)
    module = UpperCodes(levels((4, 4)), levels((4, 4), (8, 8))[1:], 6)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    changed = codes.clone()
    changed[0, 1, 2] = 3
    differs = (module([codes])[0] - module([changed])[0]).abs().amax(2).view(8, 8) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2 - 2 : 4 + 2, 4 - 2 : 6 + 2] = True  # two blocks of 3 x 3 kernels
    assert torch.equal(differs, expected)


def test_an_order_by_position_needs_levels_of_one_shape() -> None:
    with pytest.raises(ValueError, match=r"prior.order: 'position' \(rq has no other\) needs levels of one shape; got \(2, 2\), \(4, 4\)"):
        Layout(levels((2, 2), (4, 4)), "position")
    with pytest.raises(ValueError, match=r"prior.levels: levels of different numbers of axes, \(4,\), \(4, 4\), make no sequence"):
        Layout(levels((4,), (4, 4)))


def test_rotary_positions_need_heads_that_can_hold_the_axes() -> None:
    with pytest.raises(ValueError, match=r"prior.heads: rotary positions over 3 axes need an even head dimension >= 6; got 4"):
        Case("gpt", ((5, (2, 2, 2)),), config={"positions": "rotary", "heads": 4}).build()


@torch.no_grad()
def test_rotary_positions_tell_places_apart() -> None:
    """The same codes in another order have another likelihood of what follows, though no position has a vector of its own."""
    case = Case("gpt", ((5, (3, 3)),), config={"positions": "rotary"})
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    codes = torch.tensor([[1, 2, 3, 4, 0, 1, 2, 3, 4]]).view(1, 3, 3)
    swapped = codes.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = codes[0, 0, 1], codes[0, 0, 0]
    a, b = (prior.logits([c])[0][0, 5:] for c in (codes, swapped))
    assert (a - b).abs().max() > 1e-2


def test_the_schedule_counts_levels_as_the_codes_do() -> None:
    prior = Case("gpt", ((6, (2, 2)), (5, (2, 2)), (4, (2, 2))), levels="1:3", config={"order": "position"}).build()
    assert isinstance(prior, AutoregressivePrior)
    assert prior.schedule == tuple((level, position) for position in range(4) for level in (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_sampling_runs_on_packed_weights_and_one_cache(dtype: torch.dtype) -> None:
    case = Case("gpt", ((5, (3, 4)),), classes=3)
    prior = case.build().to(dtype)
    assert isinstance(prior, GPTPrior)
    state, previous = prior.begin(2, cond=case.cond(2)), None
    assert isinstance(state, GPTState)
    cache = state.cache
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [tuple(past.keys.shape) for past in cache.pasts] == 2 * [(2, 2, 12, 8)] and {past.values.dtype for past in cache.pasts} == {wide}
    layer = torch.nn.Linear(8, 8).to(dtype)
    packs = packed(layer) is not layer  # where the processor gains from it
    block = prior.trunk.stack[0]
    layers = (block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down)
    assert all((used is not layer) == packs for used, layer in zip(cache.projections[0], layers, strict=True))
    where = [(past.keys.data_ptr(), past.values.data_ptr()) for past in cache.pasts]
    for i in range(12):
        logits, state = prior.step(state, previous)
        assert isinstance(state, GPTState) and logits.dtype == dtype and cache.length == i + 1
        previous = logits.argmax(1)
    assert state.cache is cache and [(past.keys.data_ptr(), past.values.data_ptr()) for past in cache.pasts] == where


def test_float32_and_bf16_weights_are_packed_here_where_onednn_has_kernels() -> None:
    """So that the test above says something on the machines that this runs on."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    with torch.no_grad():
        layer = torch.nn.Linear(8, 8)
        assert packed(layer) is not layer


@torch.no_grad()
def test_bf16_weights_draw_from_nearly_the_same_distribution() -> None:
    case = Case("gpt", ((5, (3, 4)),), classes=3)
    prior, narrow = case.build(noise=0.1), case.build(noise=0.1).to(torch.bfloat16)
    drawn = narrow.sample(torch.arange(400), cond=case.cond(400))
    a, b = (model.nll(drawn, case.cond(400)).double().mean() / math.log(2) for model in (prior, narrow))
    assert abs(a - b) < 0.02
    ours = prior.nll(prior.sample(torch.arange(400), cond=case.cond(400)), case.cond(400)).double().mean() / math.log(2)
    assert abs(a - ours) < 0.1  # as probable under the float32 weights as their own samples


@torch.no_grad()
def test_a_label_prefix_takes_the_place_of_the_begin_and_reaches_the_rest_through_attention_alone() -> None:
    config = {"label": "prefix"}
    prior = Case("gpt", ((5, (6,)),), classes=3, config=config).build()
    assert isinstance(prior, GPTPrior) and prior.first is None and prior.first_label is None
    context = prior._context([], torch.tensor([0, 1]))
    assert context.aligned.shape[0] == 1  # no place is told the label
    assert not torch.equal(*prior._first(context))
    codes = torch.zeros(2, 6, dtype=torch.int64)
    a, b = prior.logits([codes], Cond(label=torch.tensor([0, 1])))[0]
    assert ((a - b).abs().amax(1) > 1e-3).all()
    for block in prior.trunk.stack:
        block.attention.out.weight.zero_()
    a, b = prior.logits([codes], Cond(label=torch.tensor([0, 1])))[0]
    assert (a[0] - b[0]).abs().max() > 1e-3 and torch.equal(a[1:], b[1:])
    assert Case("gpt", ((5, (6,)),), config=config).build().first is not None  # a prior without labels has a begin


@pytest.mark.parametrize(("field", "value"), [("trunk", "gpt2"), ("label", "suffix"), ("head", "digits"), ("positions", "sinusoidal")])
def test_unknown_settings_are_refused_with_those_there_are(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: .*'{value}'"):
        Case("gpt", ((5, (6,)),), config={field: value}).build()
