"""MaskGIT: decoding against a plain reimplementation and against enumeration, the bound, masks, and what is computed when."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from intarsia.rng import StepRng, uniform
from intarsia.specs import Cond
from stage2_prior.decoding import MaskGITOptions
from stage2_prior.masking import halton_order, remaining
from stage2_prior.priors import maskgit_steps
from stage2_prior.priors.maskgit import MaskGITPrior
from stage2_prior.sampling import Guidance, filtered, guide
from tests.tiny_priors import Case, all_grids

SMALL = Case("maskgit", ((3, (2, 2)),), classes=2)
LEVELS = Case("maskgit", ((6, (2, 2)), (5, (4, 4))), classes=3)
BELOW = Case("maskgit", ((6, (2, 2)), (5, (4, 3))), levels="1:2", classes=3, config={"schedule": "square"})
PLAIN = Case("maskgit", ((5, (3, 3)),))


def build(case: Case, **kwargs: Any) -> MaskGITPrior:
    return cast(MaskGITPrior, case.build(**kwargs))


def labels(case: Case, n: int, label: int | None) -> Cond | None:
    return None if label is None else Cond(label=torch.full((n,), label))


# The reference: one sample at a time, one position at a time, from ``logits`` alone --------------------------------
def reference(
    prior: MaskGITPrior, sample: int, upper: list[Tensor], label: int | None, seed: int, known: Any, options: dict[str, Any]
) -> list[Tensor]:
    """What ``sample`` gives for one sample, by loops."""
    drawn: list[Tensor] = []
    for i, level in enumerate(prior.own):
        how = prior.check_options(options, None if label is None else Cond(label=torch.tensor([0])))[i]
        size, absolute = level.positions, prior.levels.start + i

        def number(purpose: str, position: int, step: int, absolute: int = absolute) -> float:
            return uniform(seed, f"sample/{purpose}", torch.tensor([sample]), absolute, position, step).item()

        codes, masked = torch.zeros(size, dtype=torch.int64), [True] * size
        if known is not None:
            codes = torch.where(known[1][i].flatten(), known[0][i].flatten(), 0)
            masked = [not k for k in known[1][i].flatten().tolist()]
        unknown = sum(masked)
        steps = min(12, size) if how.steps is None else how.steps
        own = max(1, min(steps, unknown))  # schedules of guidance and noise end with the sample's last step
        left = remaining(how.schedule or prior.config.schedule, steps, (unknown,))[:, 0].tolist()
        order = list(range(size))
        if how.order == "halton":
            order = halton_order(level.shape).tolist()
        if how.order == "random":
            order.sort(key=lambda p: number("order", p, 0))
        for step in range(steps):
            if left[step] == 0:
                break
            grid = codes.view(1, *level.shape)
            mask = torch.tensor(masked).view(1, *level.shape)
            seen = [*upper, *drawn, grid]
            logits = prior.logits(seen, mask, None if label is None else Cond(label=torch.tensor([label])))[0]
            if how.guided:
                logits = guide(logits, prior.logits(seen, mask)[0], how.guidance_at(step / max(1, own - 1)))
            drawn_now, confidence = {}, {}
            for p in range(size):
                if masked[p]:
                    if how.temperature == 0:
                        code = int(logits[p].argmax())
                    else:
                        rising = torch.softmax(filtered(logits[p : p + 1], how)[0], 0).double().cumsum(0)
                        code = int((rising <= number("code", p, step) * rising[-1]).sum())
                    noise = 4.5 if how.noise is None else how.noise
                    gumbel = -math.log(-math.log(number("confidence", p, step)))
                    drawn_now[p] = code
                    confidence[p] = logits[p].log_softmax(0)[code].item()
                    if how.temperature > 0:
                        confidence[p] += noise * (1 - (step + 1) / own) * gumbel
            show = left[step] - left[step + 1]
            ranked = sorted(drawn_now, key=lambda p: -confidence[p]) if how.order == "confidence" else [p for p in order if masked[p]]
            for p in ranked[:show]:
                codes[p], masked[p] = drawn_now[p], False
        drawn.append(codes.view(1, *level.shape))
    return drawn


@pytest.mark.parametrize("case", [SMALL, LEVELS, BELOW, PLAIN], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["free", "known"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 3, "noise": 0.0, "top_k": 3, "guidance": 2.0},
        {"steps": 4, "order": "halton", "guidance": Guidance(1.0, 3.0), "temperature": 0.7},
        {"steps": 2, "order": "random", "schedule": "linear", "min_p": 0.1},
        {"steps": 4, "order": "raster", "schedule": "sqrt", "top_p": 0.9},
        {"steps": 3, "temperature": 0, "guidance": 1.5},
        {"order": "random", "guidance": 1.5},
        {"steps": np.int64(3), "noise": np.float32(2.0), "temperature": np.float64(0.5)},
    ],
    ids=["default", "confidence", "halton", "random", "raster", "greedy", "guided-random", "numpy"],
)
def test_samples_are_those_of_a_plain_decoder_that_takes_one_at_a_time(case: Case, given: bool, options: dict[str, Any]) -> None:
    prior = build(case)
    n, start = 5, prior.levels.start
    codes, ids = case.codes(n, seed=3), torch.arange(n) + 40
    if not case.classes:
        options = {name: value for name, value in options.items() if name != "guidance"}
    keep = None
    if given:  # none, all but one, and others: every sample has its own number of unknown positions
        share = torch.tensor([0.0, 0.3, 0.5, 0.8, 0.99])
        numbers = torch.Generator().manual_seed(0)
        keep = [(torch.rand(n, s.positions, generator=numbers) < share[:, None]).view(n, *s.shape) for s in prior.own]
    label = None if not case.classes else torch.arange(n) % case.classes
    found = prior.sample(
        ids,
        upper=codes[:start],
        cond=None if label is None else Cond(label=label),
        seed=7,
        known=None if keep is None else (codes[start:], keep),
        micro_batch=4,
        **options,
    )
    for i in range(n):
        known = None if keep is None else ([c[i] for c in codes[start:]], [k[i] for k in keep])
        expected = reference(
            prior, int(ids[i]), [c[i : i + 1] for c in codes[:start]], None if label is None else int(label[i]), 7, known, options
        )
        for level, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(a[i], b[0]), f"sample {i}, level {level}"


# Enumeration on 2 x 2 cells of 3 codes -----------------------------------------------------------------------------
MASK = 3
State = tuple[int, ...]


@cache
def logits_of_all_states(label: int | None, guidance: float) -> dict[State, Tensor]:
    """For each way of filling 4 cells with codes or masks the (4, 3) logits, float64."""
    prior = build(SMALL).double()
    states = list(itertools.product(range(4), repeat=4))
    tokens = torch.tensor(states).view(-1, 2, 2)
    masked = tokens == MASK
    codes = [torch.where(masked, 0, tokens)]
    with torch.no_grad():
        logits = prior.logits(codes, masked, labels(SMALL, len(states), label))
        logits = guide(logits, prior.logits(codes, masked), guidance) if guidance != 1 else logits
    return dict(zip(states, logits, strict=True))


def outcomes(how: MaskGITOptions, label: int | None, order: tuple[int, ...] | None) -> dict[State, float]:
    """The probability of each grid; ``order`` None reveals the most probable of the drawn codes, without noise."""
    table = logits_of_all_states(label, float(how.guidance))  # type: ignore[arg-type]
    left = remaining(how.schedule or "cosine", how.steps_for(4), (4,))[:, 0].tolist()
    chances: dict[State, float] = {(MASK,) * 4: 1.0}
    for before, after in itertools.pairwise(left):
        following: dict[State, float] = defaultdict(float)
        for state, chance in chances.items():
            p = torch.softmax(filtered(table[state], how), 1).tolist()
            sure = table[state].log_softmax(1).tolist()
            places = [i for i in range(4) if state[i] == MASK]
            now = places if order is None else list(order[4 - before : 4 - after])
            for drawn in itertools.product(range(3), repeat=len(now)):
                each = dict(zip(now, drawn, strict=True))
                probability = math.prod(p[i][code] for i, code in each.items())
                shown = now if order is not None else sorted(now, key=lambda i: -sure[i][each[i]])[: before - after]
                if probability > 0:
                    following[tuple(each[i] if i in shown else state[i] for i in range(4))] += chance * probability
        chances = following
    return chances


def mixture(how: MaskGITOptions, label: int | None) -> dict[State, float]:
    if how.order == "confidence":
        return outcomes(how, label, None)
    if how.order != "random":
        return outcomes(how, label, tuple(halton_order((2, 2)).tolist()) if how.order == "halton" else (0, 1, 2, 3))
    total: dict[State, float] = defaultdict(float)
    for order in itertools.permutations(range(4)):
        for grid, chance in outcomes(how, label, order).items():
            total[grid] += chance / 24
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4, "order": "raster"},
        {"steps": 4, "order": "random"},
        {"steps": 2, "order": "random", "temperature": 1.3},
        {"steps": 2, "order": "halton", "guidance": 1.5},
        {"steps": 3, "order": "confidence", "noise": 0.0},
        {"steps": 2, "order": "confidence", "noise": 0.0, "top_k": 2, "guidance": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [1, None])
def test_samples_follow_the_probabilities_that_enumeration_gives(options: dict[str, Any], label: int | None) -> None:
    """With as many steps as positions and an order that does not look at codes this is ancestral sampling: exact."""
    if label is None:
        options = {name: value for name, value in options.items() if name != "guidance"}
    chances = mixture(MaskGITOptions(**options), label)
    assert abs(sum(chances.values()) - 1) < 1e-9
    n = 6000
    (drawn,) = build(SMALL).sample(torch.arange(n), cond=labels(SMALL, n, label), seed=5, micro_batch=1000, **options)
    counts: dict[State, int] = defaultdict(int)
    for row in drawn.flatten(1).tolist():
        counts[tuple(row)] += 1
    assert set(counts) <= set(chances)
    common = [grid for grid, chance in chances.items() if chance * n >= 5]
    observed = [counts[grid] for grid in common] + [n - sum(counts[grid] for grid in common)]
    expected = [chances[grid] * n for grid in common] + [n - sum(chances[grid] * n for grid in common)]
    assert len(common) > 5
    result = stats.chisquare(observed, [max(e, 1e-9) for e in expected], sum_check=False)
    assert result.pvalue > 1e-3, f"p = {result.pvalue}"


# The bound ---------------------------------------------------------------------------------------------------------
def exact(label: int | None) -> tuple[list[State], Tensor, Tensor]:
    """All grids; for each the expectation over orders of the sum of -log p, by position (81, 4); and -log p of the sampler that
    goes one by one in a random order (81,)."""
    table = logits_of_all_states(label, 1.0)
    grids = list(itertools.product(range(3), repeat=4))
    by_position = torch.zeros(len(grids), 4, dtype=torch.float64)
    likelihood = torch.zeros(len(grids), dtype=torch.float64)
    for g, grid in enumerate(grids):
        for order in itertools.permutations(range(4)):
            state, total = [MASK] * 4, 0.0
            for place in order:
                nats = -table[tuple(state)][place].log_softmax(0)[grid[place]].item()
                by_position[g, place] += nats / 24
                total += nats
                state[place] = grid[place]
            likelihood[g] += math.exp(-total) / 24
    return grids, by_position, -likelihood.log()


@pytest.mark.parametrize("draws", [1, 3, 4])
def test_the_mean_of_nll_is_the_expectation_over_all_orders(draws: int) -> None:
    grids, expected, _ = exact(1)
    prior = build(Case(SMALL.type, SMALL.shapes, classes=2, config={"nll_samples": draws})).double()
    repeats, chosen = 4000, [0, 30, 77]
    for g in chosen:
        codes = [torch.tensor(grids[g]).view(1, 2, 2).expand(repeats, 2, 2).contiguous()]
        with torch.no_grad():
            each = prior.nll(codes, labels(SMALL, repeats, 1), StepRng(0, 0, torch.arange(repeats)))
        error = each.std(0) / math.sqrt(repeats)
        assert ((each.mean(0) - expected[g]).abs() < 4.5 * error + 1e-9).all()
        total = each.sum(1)
        assert (total.mean() - expected[g].sum()).abs() < 4.5 * total.std() / math.sqrt(repeats)


def test_more_draws_lower_the_variance_faster_than_their_number() -> None:
    grids, _, _ = exact(0)
    codes = [torch.tensor(grids[40]).view(1, 2, 2).expand(4000, 2, 2).contiguous()]
    spread = {}
    for draws in (1, 4):
        prior = build(Case(SMALL.type, SMALL.shapes, classes=2, config={"nll_samples": draws}))
        with torch.no_grad():
            spread[draws] = prior.nll(codes, labels(SMALL, 4000, 0), StepRng(3, 0, torch.arange(4000))).sum(1).var().item()
    assert spread[4] < 0.95 * spread[1] / 4


@pytest.mark.parametrize("label", [0, None])
def test_nll_bounds_the_cost_under_the_sampler_that_goes_one_by_one_in_a_random_order(label: int | None) -> None:
    _, by_position, cost = exact(label)
    bound = by_position.sum(1)
    assert (bound >= cost - 1e-9).all() and (bound - cost).max() > 1e-3  # Jensen, and not an equality here
    assert abs((-cost).exp().sum().item() - 1) < 1e-9
    assert 0.5 < (-bound).exp().sum().item() <= 1
    assert MaskGITPrior.nll_is_bound


def test_training_with_the_linear_schedule_is_training_on_the_bound() -> None:
    grids, expected, _ = exact(1)
    prior = build(Case(SMALL.type, SMALL.shapes, classes=2, config={"schedule": "linear", "cond_dropout": 0.5})).double()
    n = 8000
    codes = [torch.tensor(grids[30]).view(1, 2, 2).expand(n, 2, 2).contiguous()]
    prior.config = prior.config.replace(cond_dropout=0.0)  # the same weights, without dropped labels
    with torch.no_grad():
        loss = prior.loss(codes, labels(SMALL, n, 1), StepRng(2, 9, torch.arange(n)))[0].item()
    assert abs(loss - expected[30].sum().item() / 4) < 0.05


def test_without_rng_the_bound_of_a_sample_does_not_depend_on_its_batch() -> None:
    prior = build(LEVELS).double()
    codes, cond = LEVELS.codes(6), LEVELS.cond(6)
    assert cond is not None
    whole = prior.nll(codes, cond)
    parts = torch.cat([prior.nll([c[i : i + 1] for c in codes], cond[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=0)
    top, bottom = prior.by_level(whole)
    assert top.shape == (6, 4) and bottom.shape == (6, 16) and torch.equal(torch.cat([top, bottom], 1), whole)


# What sees what ----------------------------------------------------------------------------------------------------
def test_a_level_sees_all_that_is_not_masked_of_it_and_of_the_levels_above_and_no_level_below() -> None:
    prior = build(Case("maskgit", ((4, (1, 2)), (6, (2, 2)), (5, (4, 4))), levels="1:3", classes=2)).double()
    codes = Case("maskgit", ((4, (1, 2)), (6, (2, 2)), (5, (4, 4)))).codes(1)
    cond = Cond(label=torch.tensor([1]))
    for stop, size in ((2, 4), (3, 16)):
        level = codes[:stop]
        masked = torch.zeros(1, *level[-1].shape[1:], dtype=torch.bool)
        masked.view(-1)[::2] = True
        logits = prior.logits(level, masked, cond)
        assert logits.shape == (1, size, prior.own[stop - 2].vocab)
        for j, c in enumerate(level):
            for position in range(c[0].numel()):
                changed = [d.clone() for d in level]
                changed[j].view(-1)[position] = (c.view(-1)[position] + 1) % prior.spec.levels[j].vocab
                other = prior.logits(changed, masked, cond)
                hidden = j == stop - 1 and bool(masked.view(-1)[position])
                difference = (other - logits).abs().amax(2)[0]
                assert (difference == 0).all() if hidden else (difference > 1e-7).all(), (stop, j, position)
        assert (prior.logits(level, masked, Cond(label=torch.tensor([0]))) - logits).abs().max() > 1e-3
        assert (prior.logits(level, masked) - logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="codes: 1 levels; expected 2 to 3"):
        prior.logits(codes[:1], torch.ones(1, 1, 2, dtype=torch.bool), cond)
    with pytest.raises(ValueError, match=r"masked: torch.bool \(1, 4, 4\); expected torch.bool \(1, 2, 2\)"):
        prior.logits(codes[:2], torch.ones(1, 4, 4, dtype=torch.bool), cond)


def test_the_loss_of_a_level_is_of_its_masked_codes_alone_weighted_by_positions() -> None:
    prior = build(LEVELS).double()
    codes, cond, rng = LEVELS.codes(3), LEVELS.cond(3), StepRng(1, 2, torch.tensor([5, 6, 7]))
    assert cond is not None and cond.label is not None
    prior.config = prior.config.replace(cond_dropout=0.0)
    expected = torch.zeros(3, dtype=torch.float64)
    for i, (size, shape) in enumerate(((4, (2, 2)), (16, (4, 4)))):
        share = rng.uniform("mask/share", level=i, dtype=torch.float64)
        numbers = rng.uniform("mask/places", size, level=i)
        for row in range(3):
            count = math.ceil(math.cos(math.pi / 2 * share[row].item()) * size)
            hidden = sorted(range(size), key=lambda p, row=row, numbers=numbers: numbers[row, p].item())[:count]
            masked = torch.zeros(1, size, dtype=torch.bool)
            masked[0, hidden] = True
            log_p = prior.logits([c[row : row + 1] for c in codes[: i + 1]], masked.view(1, *shape), cond[row : row + 1])[0].log_softmax(1)
            target = codes[i][row].flatten()
            expected[row] -= size / 20 * sum(log_p[p, target[p]] for p in hidden) / count  # type: ignore[operator]
    loss, found = prior(codes, cond, rng)
    torch.testing.assert_close(loss, expected.mean(), atol=1e-10, rtol=0)
    assert set(found) == {"masked_bits", "masked_bits/level0", "masked_bits/level1"}
    torch.testing.assert_close(found["masked_bits"], loss.detach() / math.log(2))
    torch.testing.assert_close((4 * found["masked_bits/level0"] + 16 * found["masked_bits/level1"]) / 20, found["masked_bits"])


# What is known -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["confidence", "halton", "random", "raster"])
@pytest.mark.parametrize("case", [LEVELS, BELOW, PLAIN], ids=str)
def test_any_mask_is_kept_exactly_and_a_sample_does_not_depend_on_the_masks_beside_it(case: Case, order: str) -> None:
    prior = build(case)
    n, start = 24, prior.levels.start
    codes, cond = case.codes(n), case.cond(n)
    share = torch.linspace(0, 1, n)
    keep = [torch.rand(n, s.positions, generator=torch.Generator().manual_seed(9)) < share[:, None] for s in prior.own]
    keep = [k.view(n, *s.shape) for k, s in zip(keep, prior.own, strict=True)]
    garbage = [torch.where(k, c, 10**6) for k, c in zip(keep, codes[start:], strict=True)]

    def drawn(rows: Tensor) -> list[Tensor]:
        return prior.sample(
            rows,
            upper=[c[rows] for c in codes[:start]],
            cond=None if cond is None else cond[rows],
            seed=2,
            known=([g[rows] for g in garbage], [k[rows] for k in keep]),
            micro_batch=8,
            order=order,
            steps=4,
        )

    whole = drawn(torch.arange(n))
    for out, c, k, level in zip(whole, codes[start:], keep, prior.own, strict=True):
        assert torch.equal(out[k], c[k]) and out.min() >= 0 and out.max() < level.vocab
        assert not torch.equal(out[:12], c[:12])
    for rows in (torch.arange(n).flip(0), torch.randperm(n, generator=torch.Generator().manual_seed(1)), torch.arange(n)):
        parts = [drawn(r) for r in rows.split(7 if rows[0] else 1)]
        for level, out in enumerate(whole):
            assert torch.equal(torch.cat([p[level] for p in parts])[rows.argsort()], out)


def test_where_all_is_known_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_positions(monkeypatch)
    codes = PLAIN.codes(8)
    (out,) = build(PLAIN).sample(torch.arange(8), known=(codes, [torch.ones(8, 3, 3, dtype=torch.bool)]), micro_batch=8)
    assert torch.equal(out, codes[0]) and seen["heads"] == []


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_that_pad_a_micro_batch_add_no_steps(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    seen, keep = count_positions(monkeypatch), torch.ones(rows, 3, 3, dtype=torch.bool)
    keep[:, 1, 1] = False
    build(PLAIN).sample(torch.arange(rows), known=(PLAIN.codes(rows), [keep]), micro_batch=8)
    assert len(seen["heads"]) == 1, "one open position wants one step"


# What is computed --------------------------------------------------------------------------------------------------
def count_positions(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many positions each call of a head predicts, and how many rows each call of the trunk has, from now on."""
    seen: dict[str, list[int]] = {"heads": [], "rows": []}
    packed, frozen = maskgit_steps.packed, maskgit_steps.frozen

    def counted(real: Any, name: str, size: Any) -> Any:
        def call(x: Tensor, *args: Any) -> Tensor:
            seen[name].append(size(x))
            return cast(Tensor, real(x, *args))

        return call

    monkeypatch.setattr(maskgit_steps, "packed", lambda head: counted(packed(head), "heads", lambda x: x.shape[0] * x.shape[1]))
    monkeypatch.setattr(maskgit_steps, "frozen", lambda trunk: counted(frozen(trunk), "rows", lambda x: x.shape[0]))
    return seen


@pytest.mark.parametrize("order", ["halton", "raster", "random"])
def test_in_a_fixed_order_the_head_predicts_each_position_once_and_about_once_where_counts_differ(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_positions(monkeypatch)
    case = Case("maskgit", ((5, (8, 8)),), levels="0:1")
    build(case).sample(torch.arange(4), order=order, steps=8, micro_batch=4)
    assert len(seen["heads"]) == 8
    assert 4 * 64 - 3 * 64 <= sum(seen["heads"]) <= 4 * (64 + 8)


@pytest.mark.parametrize("case", [LEVELS, BELOW], ids=str)
def test_training_and_the_bound_ask_the_head_for_masked_codes_alone(case: Case) -> None:
    prior, codes, rng = build(case), case.codes(6), StepRng(0, 1, torch.arange(6))
    asked: list[int] = []
    for head in prior.output:
        head.register_forward_pre_hook(lambda _, x: asked.append(x[0].shape[:-1].numel()))
    masked = [torch.rand(6, level.positions) < 0.4 for level in prior.own]
    own, told = [c.flatten(1) for c in codes[prior.levels.start :]], prior._context(codes[: prior.levels.start], case.cond(6).label)
    for i, places in enumerate(masked):
        nats = prior._nats(i, own, own, places, told, None)
        assert asked.pop() == places.sum()
        grid = places.view_as(codes[prior.levels.start + i])
        logits = prior.logits(codes[: prior.levels.start + i + 1], grid, case.cond(6))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[i].flatten(), reduction="none").view_as(places)
        torch.testing.assert_close(nats, torch.where(places, expected, 0), atol=1e-5, rtol=1e-5)
        asked.clear()
    prior.loss(codes, case.cond(6), rng)[0].backward()
    assert all(count < 6 * level.positions for count, level in zip(asked, prior.own, strict=True))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_in_the_order_of_confidence_the_head_predicts_what_is_still_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_positions(monkeypatch)
    case = Case("maskgit", ((6, (2, 2)), (5, (8, 8))), levels="1:2")
    build(case).sample(torch.arange(4), upper=case.codes(4)[:1], steps=8, micro_batch=4)
    assert seen["heads"] == [4 * left for left in remaining("cosine", 8, (64,))[:-1, 0].tolist()]


@pytest.mark.parametrize(
    ("case", "options", "rows"),
    [
        (PLAIN, {}, [1, 8, 8]),  # one for all
        (Case("maskgit", ((5, (3, 3)),), classes=3), {}, [4, 8, 8]),  # one for each label and one for the null
        (Case("maskgit", ((5, (3, 3)),), classes=3), {"guidance": 2.0}, [4, 16, 16]),
        (Case("maskgit", ((5, (3, 3)),), classes=3, config={"cond_dropout": 0.0}), {}, [3, 8, 8]),
        (Case("maskgit", ((5, (3, 3)),), classes=9), {}, [8, 8, 8]),  # 10 would be no fewer
        (Case("maskgit", ((5, (3, 3)),), classes=9), {"guidance": 2.0}, [10, 16, 16]),
        (Case("maskgit", ((6, (2, 2)), (5, (3, 3))), levels="1:2"), {}, [8, 8, 8]),  # codes above differ
        (Case("maskgit", ((6, (2, 2)), (5, (3, 3)))), {"steps": {"level0": 2, "level1": 3}}, [1, 8, 8, 8, 8]),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
def test_the_first_step_which_sees_masks_alone_is_shared(
    case: Case, options: dict[str, Any], rows: list[int], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = build(case)
    codes, cond = case.codes(8), case.cond(8)
    options = {"steps": 3, "order": order} | options
    arguments = {"upper": codes[: prior.levels.start], "cond": cond, "micro_batch": 8} | options
    nothing = [torch.zeros(8, *level.shape, dtype=torch.bool) for level in prior.own]
    unshared = prior.sample(torch.arange(8), known=(codes[prior.levels.start :], nothing), **arguments)
    seen = count_positions(monkeypatch)
    shared = prior.sample(torch.arange(8), **arguments)
    assert seen["rows"] == rows
    assert all(torch.equal(a, b) for a, b in zip(shared, unshared, strict=True))  # "nothing is known" is not shared


# Options -----------------------------------------------------------------------------------------------------------
def test_steps_may_differ_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_positions(monkeypatch)
    build(LEVELS).sample(torch.arange(8), steps={"level0": 2, "level1": 7}, micro_batch=8)
    assert len(seen["rows"]) == 9
    seen["rows"].clear()
    build(LEVELS).sample(torch.arange(8), steps={"level1": 1}, micro_batch=8)
    assert len(seen["rows"]) == 4 + 1  # 12, or as many as there are positions


def test_noise_spreads_what_is_revealed_first() -> None:
    """Without noise the surest position comes first in every sample; with much of it every position is as likely."""
    prior = build(PLAIN)
    n = 600

    def first(noise: float) -> Tensor:
        counts = torch.zeros(9)
        real = maskgit_steps.Predictor.scores

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            score = real(self, *args, **kwargs)

            def call(tokens: Tensor, where: Tensor, step: int) -> Tensor:
                if step == 1:
                    counts.add_((tokens != 5).float().sum(0))
                return score(tokens, where, step)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maskgit_steps.Predictor, "scores", watched)
            prior.sample(torch.arange(n), steps=9, noise=noise, micro_batch=n)
        return counts

    calm, wild = first(0.0), first(1e6)
    assert calm.sum() == wild.sum() == n
    assert stats.chisquare(wild.numpy()).pvalue > 1e-3
    assert stats.chisquare(calm.numpy()).pvalue < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0; expected a whole number >= 1"),
        ({"steps": 2.0}, "steps: 2.0; expected a whole number >= 1"),
        ({"steps": True}, "steps: True; expected a whole number >= 1"),
        ({"steps": 5}, "steps: 5; level 'level0' has 4 positions, expected at most as many steps"),
        ({"steps": {"level1": 17}}, "steps: 17; level 'level1' has 16 positions"),
        ({"steps": {"bottom": 4}}, "steps.bottom: a maskgit prior has no such level; it has level0, level1"),
        ({"order": "spiral"}, "order: 'spiral'; expected confidence, halton, random or raster"),
        ({"noise": -1.0}, "noise: -1.0; expected a finite number >= 0"),
        ({"noise": math.nan}, "noise: nan; expected a finite number"),
        ({"noise": True}, "noise: True; expected a finite number"),
        ({"noise": 1.0, "order": "halton"}, "noise: 1.0; order 'halton' has no use for it, only 'confidence' has"),
        ({"noise": 3.0, "temperature": 0}, "noise: 3.0; temperature 0 has no use for it, expected 0 or None"),
        ({"noise": {}}, "noise: {}; expected a value, or values by level of level0, level1"),
        ({"schedule": "sine"}, "schedule: 'sine'; expected cosine, linear, square, cubic, sqrt or arccos"),
        ({"min_p": 2.0}, "min_p: 2.0; expected"),
        ({"beam": 3}, "beam: .* it has temperature, top_k, top_p, min_p, guidance, steps, order, noise, schedule"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(LEVELS).sample(torch.arange(2), **options)


def test_all_grids_of_a_level_are_reached_by_enumeration_here() -> None:
    """Ties the states above to the grids that the other tests of exactness enumerate."""
    assert [tuple(g) for g in all_grids(SMALL.spec.levels)[0].flatten(1).tolist()] == exact(None)[0]
