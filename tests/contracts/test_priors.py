"""What every registered prior owes its callers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from intarsia.config import ConfigError
from intarsia.meta import build_on_meta
from intarsia.rng import StepRng
from intarsia.specs import Cond
from intarsia.stepping import check_gradients
from stage2_prior import decoding
from stage2_prior.priors import autoregressive as autoregressive_priors
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.base import PRIORS, Prior
from stage2_prior.sampling import Guidance, draw, guide
from tests.tiny_priors import CASES, TINY, Case, Leaves

every_case = pytest.mark.parametrize("case", CASES, ids=str)
autoregressive = pytest.mark.parametrize("case", [c for c in CASES if issubclass(PRIORS.get(c.type), AutoregressivePrior)], ids=str)
one_of_each = pytest.mark.parametrize("case", list({c.type: c for c in reversed(CASES) if c.classes}.values()), ids=str)


def test_every_registered_type_is_tested_here() -> None:
    assert set(PRIORS.names()) == set(TINY) == {case.type for case in CASES}


# Likelihood ------------------------------------------------------------------------------------------------------
@autoregressive
def test_no_position_sees_itself_or_its_future(case: Case) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    codes = case.codes(1)
    tables = prior.codes if isinstance(prior.codes, nn.ModuleList) else [prior.codes]
    with Leaves(list(tables)) as leaves:
        logits = prior.layout.join([each[..., :2] for each in prior.logits(codes, case.cond(1))])
    length = len(prior.schedule)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        # The square, since a sum could cancel; allow_unused: place 0 sees no code at all.
        gradients = torch.autograd.grad(logits[0, i].square().sum(), leaves.found, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves.found, strict=True)]
        seen[i] = prior.layout.join(filled)[0].abs().amax(1) > 0
    assert not seen.triu().any()
    expected = torch.ones(length, length).tril(-1).bool()
    if case.type in ("gpt", "rq"):
        assert torch.equal(seen, expected)
    else:  # what a stack of this depth reaches; test_priors_pixelcnn.py shows that there is no blind spot within it
        assert seen.sum() > length


@every_case
@pytest.mark.parametrize("cond_dropout", [0.0, 0.1, 1.0])
def test_every_parameter_gets_a_gradient_from_one_sample(case: Case, cond_dropout: float) -> None:
    prior = replace(case, config={**case.config, "cond_dropout": cond_dropout}).build().train()
    loss, _ = prior(case.codes(1), case.cond(1) if prior.conditional else None, StepRng(0, 0, torch.zeros(1, dtype=torch.int64)))
    loss.backward()
    check_gradients(prior)


@every_case
def test_the_likelihood_depends_on_the_label_and_on_every_upper_code(case: Case) -> None:
    prior = case.build()
    codes = case.codes(1)
    if case.classes:
        nll = [prior.nll(codes, Cond(label=torch.tensor([label]))) for label in range(case.classes)] + [prior.nll(codes)]
        assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(nll) for b in nll[:i])
    for level, spec in enumerate(prior.upper):
        for position in range(spec.positions):
            changed = [c.clone() for c in codes]
            changed[level].view(1, -1)[0, position] += 1
            changed[level] %= spec.vocab
            assert (prior.nll(changed, case.cond(1)) - prior.nll(codes, case.cond(1))).abs().max() > 1e-4


@autoregressive
@torch.no_grad()
def test_steps_give_the_logits_of_the_full_forward_and_nll_is_what_they_say(case: Case) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    n, codes, cond = 3, case.codes(3), case.cond(3)
    start = prior.levels.start
    full = prior.logits(codes, cond)
    nll = prior.nll(codes, cond)
    state, previous, said = prior.begin(n, codes[:start], cond), None, torch.zeros_like(nll)
    for level, position, digit in prior.draws:
        logits, state = prior.step(state, previous)
        sizes = prior.digits[level]
        torch.testing.assert_close(logits, full[level][:, position].split(sizes, 1)[digit], atol=2e-5, rtol=0)
        previous = codes[start + level].flatten(1)[:, position] // math.prod(sizes[:digit]) % sizes[digit]
        said[:, prior.schedule.index((start + level, position))] -= torch.log_softmax(logits, 1)[torch.arange(n), previous]
    torch.testing.assert_close(nll, said, atol=4e-5, rtol=0)


@every_case
def test_without_draws_the_loss_is_the_mean_of_the_samples_own(case: Case) -> None:
    prior = case.build().double()
    codes, cond = case.codes(5), case.cond(5)
    loss, stats = prior(codes, cond)
    alone = [prior([c[i : i + 1] for c in codes], None if cond is None else cond[i : i + 1])[0] for i in range(5)]
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-12, rtol=0)
    assert all(not s.requires_grad and s.ndim == 0 for s in stats.values())
    if not prior.nll_is_bound:
        torch.testing.assert_close(loss, prior.nll(codes, cond).mean(), atol=1e-12, rtol=0)
        torch.testing.assert_close(stats["bits"], loss.detach() / math.log(2))


# Training --------------------------------------------------------------------------------------------------------
@every_case
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    prior = case.build().train()
    prior(case.codes(4), case.cond(4), StepRng(0, 0, torch.arange(4)))[0].backward()
    assert [name for name, p in prior.named_parameters() if p.grad is None] == []


@one_of_each
@pytest.mark.parametrize("noise", ["cond_dropout", "corruption", "dropout"])
def test_the_noise_of_training_is_a_function_of_seed_step_and_sample(case: Case, noise: str) -> None:
    noisy = Case(case.type, case.shapes, case.levels, case.classes, case.config | {"cond_dropout": 0.0} | {noise: 0.3})
    prior = noisy.build().double().train()
    codes, cond, index = noisy.codes(20), noisy.cond(20), torch.randperm(90, generator=torch.Generator().manual_seed(0))[:20]
    assert cond is not None

    def loss(rows: slice, step: int = 5, seed: int = 2) -> torch.Tensor:
        return prior([c[rows] for c in codes], cond[rows], StepRng(seed, step, index[rows]))[0]

    whole = loss(slice(None))
    torch.testing.assert_close((loss(slice(0, 7)) * 7 + loss(slice(7, 20)) * 13) / 20, whole, atol=1e-12, rtol=0)
    for other in (loss(slice(None), step=6), loss(slice(None), seed=3), prior(codes, cond)[0]):
        assert (other - whole).abs() > 1e-6
    clean = noisy.build().double()
    torch.testing.assert_close(clean(codes, cond)[0], prior.eval()(codes, cond)[0])


@one_of_each
def test_a_dropped_label_is_the_null(case: Case) -> None:
    always = Case(case.type, case.shapes, case.levels, case.classes, case.config | {"cond_dropout": 0.999999})
    prior = always.build().double()
    codes, rng = always.codes(4), StepRng(0, 0, torch.arange(4))
    torch.testing.assert_close(prior(codes, always.cond(4), rng)[0], prior(codes, None, rng)[0], atol=0, rtol=0)


@one_of_each
def test_bf16_autocast_trains_as_float32_does(case: Case) -> None:
    losses = {}
    for cast in (False, True):
        prior = case.build(noise=0.0).train()
        optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
        codes, cond = [c.repeat(4, *[1] * (c.ndim - 1)) for c in case.codes(4)], case.cond(16)
        for step in range(100):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = prior(codes, cond, StepRng(0, step, torch.arange(16)))[0]
            assert loss.dtype == torch.float32 and loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[cast] = prior(codes, cond)[0].item()
    uniform = math.log(prior.own[-1].vocab)
    assert losses[True] < 0.8 * uniform and abs(losses[True] - losses[False]) < 0.1 * uniform


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_goes_on_after_sampling_in_inference_mode(case: Case, dtype: torch.dtype) -> None:
    prior = case.build().to(dtype)
    codes, ids = case.codes(2), torch.arange(2)
    with torch.inference_mode():
        prior.sample(ids, upper=codes[: prior.levels.start], cond=case.cond(2), micro_batch=2)
    prior.train().loss(codes, case.cond(2), StepRng(0, 0, ids))[0].backward()
    assert all(p.grad is not None for p in prior.parameters())


@pytest.mark.parametrize("case", [case for case in CASES if case.levels and not case.levels.startswith("0:")], ids=str)
def test_corruption_replaces_codes_of_the_levels_above_too(case: Case) -> None:
    prior = case.build()
    noisy = PRIORS.build(prior.config.replace(corruption=0.5), prior.spec)
    codes, rng = case.codes(400), StepRng(0, 3, torch.arange(400))
    for before, after, level in zip(codes, noisy._corrupt_upper(codes[: prior.levels.start], rng), prior.upper, strict=False):
        assert after.shape == before.shape and after.min() >= 0 and after.max() < level.vocab
        expected = 0.5 * (1 - 1 / level.vocab)
        assert abs((after != before).float().mean() - expected) < 0.06
    assert all(torch.equal(a, b) for a, b in zip(noisy._corrupt_upper(codes[: prior.levels.start], None), codes, strict=False))


@every_case
def test_no_samples_have_no_likelihoods(case: Case) -> None:
    prior = case.build()
    empty = [c[:0] for c in case.codes(1)]
    cond = None if case.cond(1) is None else Cond(label=torch.zeros(0, dtype=torch.int64))
    assert prior.nll(empty, cond).shape == (0, sum(level.positions for level in prior.own))


def test_likelihoods_of_large_levels_are_taken_of_fewer_samples_at_once() -> None:
    def rows(shape: tuple[int, ...], vocab: int | tuple[int, ...], **config: Any) -> int:
        case = Case("gpt", ((vocab, shape),), config=config)
        prior = build_on_meta(PRIORS.get("gpt"), PRIORS.config("gpt").from_dict(TINY["gpt"] | config), case.spec)
        assert isinstance(prior, Prior)
        return prior.nll_rows

    assert rows((7, 7), 512) == 250 and rows((32, 32), 8192) == 32
    assert rows((32, 32), (512, 512)) == 250 and rows((32, 32), (512, 512), head="full") == 1  # digits, and one softmax over all
    assert rows((64, 64), 512, width=512) == 16 and rows((1024, 1024), 16384) == 1


# Sampling --------------------------------------------------------------------------------------------------------
@every_case
def test_a_sample_does_not_depend_on_the_batch_that_it_is_in(case: Case) -> None:
    """Gate F4 for the priors."""
    prior = case.build()
    n = 32
    everything, labels = case.codes(n), case.cond(n)
    upper = everything[: prior.levels.start]
    options = {"guidance": 2.0} if case.classes else {}

    def drawn(order: torch.Tensor, batch: int) -> list[torch.Tensor]:
        parts = []
        for rows in order.split(batch):
            cond = None if labels is None else labels[rows]
            parts.append(prior.sample(rows + 1000, upper=[u[rows] for u in upper], cond=cond, seed=3, micro_batch=16, **options))
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    ids = torch.arange(n)
    expected = drawn(ids, n)
    for level, spec in zip(expected, prior.own, strict=True):
        assert level.shape == (n, *spec.shape) and level.dtype == torch.int64 and level.min() >= 0 and level.max() < spec.vocab
        assert len(level.flatten(1).unique(dim=0)) > 1
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    for order, batch in ((ids.flip(0), n), (shuffled[:23], 23), (shuffled[:7], 7), (shuffled[7:9], 1)):
        found = drawn(order, batch)
        assert all(torch.equal(a, b[order]) for a, b in zip(found, expected, strict=True)), f"batches of {batch}"


def in_larger_grids() -> list[Case]:
    """Of each kind of code that draws, a case whose rows torch's fused attention would round by their places."""
    rotary = {"positions": "rotary"}
    return [
        Case("gpt", ((64, (7, 7)),), classes=2, config=rotary),
        Case("gpt", ((64, (7, 7)),), classes=2, config=rotary | {"trunk": "llama"}),
        Case("rq", ((16, (4, 4)), (16, (4, 4))), classes=2),
        Case("pixelcnn", ((64, (7, 7)),), classes=2, config={"width": 16, "attention": 2, "heads": 2}),
        Case("maskgit", ((64, (7, 7)),), classes=2),
    ]


@pytest.mark.parametrize("case", in_larger_grids(), ids=str)
def test_equal_samples_have_equal_logits_with_several_threads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate F4 to the last bit: what a row becomes does not depend on its place in the micro-batch."""
    options = {"order": "raster", "steps": 49, "schedule": "linear"} if case.type == "maskgit" else {}
    seen, module = 0, decoding if case.type == "maskgit" else autoregressive_priors

    def watched(logits: torch.Tensor, numbers: torch.Tensor, how: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        rows = logits.view(32, -1)
        assert torch.equal(rows, rows[:1].expand_as(rows)), f"draw {seen}"
        return draw(logits, numbers, how)

    monkeypatch.setattr(module, "draw", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cond = Cond(label=torch.ones(32, dtype=torch.int64))
        (out, *_) = case.build().sample(torch.full((32,), 7), cond=cond, micro_batch=32, **options)
    finally:
        torch.set_num_threads(before)
    assert seen >= 32 and len(out.flatten(1).unique(dim=0)) == 1


@pytest.mark.parametrize("case", [c for c in CASES if c.classes and issubclass(PRIORS.get(c.type), AutoregressivePrior)], ids=str)
def test_a_guidance_schedule_ends_at_the_last_position_of_each_level(case: Case) -> None:
    prior = case.build()
    upper = [c[:4] for c in case.codes(4)[: prior.levels.start]]
    seen: list[list[float]] = [[] for _ in prior.own]

    class Recorded(Guidance):
        def at(self, progress: float) -> float:
            seen[int(self.stop)].append(progress)
            return super().at(progress)

    options = {level.name: Recorded(1.5, i) for i, level in enumerate(prior.own)}
    prior.sample(torch.arange(4), upper=upper, cond=case.cond(4), seed=0, guidance=options)
    for found, level in zip(seen, prior.own, strict=True):
        once = list(dict.fromkeys(found))  # the digits of a code share its guidance
        assert once == pytest.approx([i / max(1, level.positions - 1) for i in range(level.positions)])


@pytest.mark.parametrize("case", [c for c in CASES if c.classes and issubclass(PRIORS.get(c.type), AutoregressivePrior)], ids=str)
def test_in_a_completion_a_guidance_schedule_counts_a_samples_own_draws(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    n, start, length = 5, prior.levels.start, len(prior.layout)
    codes, labels = case.codes(n), torch.arange(n) % case.classes
    prefix = torch.arange(length)[None] < torch.tensor([0, 1, length // 2, length - 1, length - 2])[:, None]
    keep = [k.reshape(n, *level.shape) for k, level in zip(prior.layout.split(prefix), prior.own, strict=True)]
    strengths = list[Any]()
    monkeypatch.setattr(autoregressive_priors, "guide", lambda cond, null, g: strengths.append(g) or guide(cond, null, g))

    def drawn(rows: slice, model: Prior = prior, **given: Any) -> list[torch.Tensor]:
        given |= {"upper": [u[rows] for u in codes[:start]], "cond": Cond(label=labels[rows]), "guidance": {"start": 1.5, "stop": 3.0}}
        return model.sample(torch.arange(n)[rows], seed=1, micro_batch=8, **given)

    def known(rows: slice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [c[rows] for c in codes[start:]], [k[rows] for k in keep]

    out = drawn(slice(n), known=known(slice(n)))
    found = torch.cat(strengths, 1)[:n].double()
    for row in range(n):
        for i, k in enumerate(keep):
            places = (~k[row].flatten()).nonzero()[:, 0].tolist()
            for place, (level, position, _) in enumerate(prior.draws):
                if level == i and position in places:
                    expected = 1.5 + 1.5 * places.index(position) / max(1, len(places) - 1)
                    assert float(found[row, place]) == pytest.approx(expected, abs=1e-6)
        alone = drawn(slice(row, row + 1), known=known(slice(row, row + 1)))
        assert all(torch.equal(a[0], o[row]) for a, o in zip(alone, out, strict=True))
    nothing = [torch.zeros_like(k) for k in keep]
    for model in (prior, copy.deepcopy(prior).to(torch.bfloat16)):
        free, same = drawn(slice(n), model), drawn(slice(n), model, known=(codes[start:], nothing))
        assert all(torch.equal(a, b) for a, b in zip(free, same, strict=True))


@one_of_each
def test_a_type_that_does_not_keep_what_is_known_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = case.build()
    codes, cond = case.codes(4), case.cond(4)
    upper, own = codes[: prior.levels.start], codes[prior.levels.start :]
    keep = [torch.zeros_like(c, dtype=torch.bool) for c in own]
    keep[0].view(4, -1)[2:, 0] = True
    honest = prior._sample
    monkeypatch.setattr(prior, "_sample", lambda ids, upper, label, seed, known, how: honest(ids, upper, label, seed, None, how))
    free = prior.sample(torch.arange(4), upper=upper, cond=cond)
    same = prior.sample(torch.arange(4), upper=upper, cond=cond, known=(free, keep))
    assert all(torch.equal(a, b) for a, b in zip(same, free, strict=True))
    other = [torch.where(k, (f + 1) % level.vocab, f) for k, f, level in zip(keep, free, prior.own, strict=True)]
    said = f"known: this {case.type} prior changed 2 kept codes of level '{prior.own[0].name}', the first of them of sample 2; its _sample"
    with pytest.raises(ValueError, match=said):
        prior.sample(torch.arange(4), upper=upper, cond=cond, known=(other, keep))


@one_of_each
def test_seed_and_id_decide_the_draws(case: Case) -> None:
    prior = case.build()
    upper = [c[:1].expand(8, *c.shape[1:]) for c in case.codes(1)[: prior.levels.start]]
    cond = Cond(label=torch.zeros(8, dtype=torch.int64))
    a, b, again = (prior.sample(torch.arange(8), upper=upper, cond=cond, seed=s) for s in (0, 1, 0))
    huge = prior.sample(torch.tensor([2**62, -5, 0, 1, 2, 3, 4, 5]), upper=upper, cond=cond, seed=0)
    assert all(torch.equal(x, y) for x, y in zip(a, again, strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(x[2:], y[:6]) for x, y in zip(huge, a, strict=True))
    assert len(torch.cat([x.flatten(1) for x in a], 1).unique(dim=0)) > 4


@autoregressive
def test_what_is_known_is_kept_and_the_rest_is_drawn_given_it(case: Case) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    n, start = 6, prior.levels.start
    codes, cond = case.codes(n), case.cond(n)
    upper, own = codes[:start], codes[start:]
    length = len(prior.layout)
    prefix = torch.arange(length)[None] < torch.tensor([0, 1, length // 2, length - 1, length, 3])[:, None]  # a length per sample
    keep = [k.reshape(n, *level.shape) for k, level in zip(prior.layout.split(prefix), prior.own, strict=True)]
    garbage = [torch.where(k, c, 10**6) for k, c in zip(keep, own, strict=True)]  # what is not kept is not looked at
    free = prior.sample(torch.arange(n), upper=upper, cond=cond, seed=1)
    out = prior.sample(torch.arange(n), upper=upper, cond=cond, seed=1, known=(garbage, keep))
    for o, c, k in zip(out, own, keep, strict=True):
        assert torch.equal(o[k], c[k])
    assert all(torch.equal(o[0], f[0]) for o, f in zip(out, free, strict=True))  # nothing kept
    again = prior.sample(torch.arange(n), upper=upper, cond=cond, seed=1, known=(free, keep))
    assert all(torch.equal(a, f) for a, f in zip(again, free, strict=True))  # what it would have drawn anyway
    whole = [torch.ones_like(k) for k in keep]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior, "_begin", lambda *_: pytest.fail("a micro-batch of which all is kept was begun"))
        out = prior.sample(torch.arange(n), upper=upper, cond=cond, known=(own, whole))
    assert all(torch.equal(o, c) and o.data_ptr() != c.data_ptr() for o, c in zip(out, own, strict=True))
    hole = torch.ones(n, length, dtype=torch.bool)
    hole[4, 1] = False
    keep = [k.reshape(n, *level.shape) for k, level in zip(prior.layout.split(hole), prior.own, strict=True)]
    with pytest.raises(ValueError, match="known: what is kept of sample 4 is no prefix of the order"):
        prior.sample(torch.arange(n), upper=upper, cond=cond, known=(own, keep))


@one_of_each
def test_temperature_0_takes_the_most_probable_code_of_every_step(case: Case) -> None:
    prior = case.build()
    upper, cond = case.codes(4)[: prior.levels.start], case.cond(4)
    a, b = (prior.sample(torch.arange(4), upper=upper, cond=cond, seed=s, temperature=0) for s in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(prior, AutoregressivePrior):
        best = prior.logits([*upper, *a], cond)
        assert all(torch.equal(logits.argmax(-1), x.flatten(1)) for logits, x in zip(best, a, strict=True))


@one_of_each
def test_sampling_and_nll_leave_mode_and_gradients_alone(case: Case) -> None:
    prior = case.build().train()
    codes, cond = case.codes(2), case.cond(2)
    drawn = prior.sample(torch.arange(2), upper=codes[: prior.levels.start], cond=cond)
    prior.nll(codes, cond).sum().backward()
    assert prior.training and not any(d.is_inference() for d in drawn)


@one_of_each
def test_logits_that_are_not_finite_are_an_error(case: Case) -> None:
    prior = case.build()
    next(iter(prior.parameters())).data.fill_(math.nan)
    with pytest.raises(ValueError, match="logits of this .* prior are not finite"):
        prior.sample(torch.arange(2), upper=case.codes(2)[: prior.levels.start], cond=case.cond(2))


@pytest.mark.parametrize("case", [c for c in CASES if c.type in ("gpt", "pixelcnn", "rq")], ids=str)
def test_finite_logits_whose_sum_is_not_are_drawn_from_and_one_that_is_not_finite_is_an_error(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    step, one = prior.step, {"logit": 3e38}

    def huge(state: Any, previous: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        last = state.index == len(prior.draws) - 1
        logits, after = step(state, previous)
        logits = torch.full_like(logits, 3e38)
        if last:
            logits[-1, -1] = one["logit"]
        return logits, after

    monkeypatch.setattr(prior, "step", huge)
    arguments = {"upper": case.codes(4)[: prior.levels.start], "cond": case.cond(4), "micro_batch": 4}
    drawn = prior.sample(torch.arange(4), **arguments)
    assert all(len(level.unique()) > 1 for level in drawn)
    for one["logit"] in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sample: the logits of this {case.type} prior are not finite"):
            prior.sample(torch.arange(4), **arguments)


# Precision, saving -----------------------------------------------------------------------------------------------
@every_case
def test_float64_and_bf16_weights_work(case: Case) -> None:
    prior = case.build()
    codes, cond = case.codes(3), case.cond(3)
    single = prior.nll(codes, cond)
    wide = copy.deepcopy(prior).double()
    assert wide.nll(codes, cond).dtype == torch.float64
    torch.testing.assert_close(wide.nll(codes, cond), single.double(), atol=1e-4, rtol=0)
    narrow = copy.deepcopy(prior).to(torch.bfloat16)
    assert narrow.nll(codes, cond).dtype == torch.float32
    torch.testing.assert_close(narrow.nll(codes, cond), single, atol=0.3, rtol=0.1)
    for model in (wide, narrow):
        drawn = model.sample(torch.arange(3), upper=codes[: prior.levels.start], cond=cond)
        assert all(d.min() >= 0 and d.max() < level.vocab for d, level in zip(drawn, prior.own, strict=True))


@every_case
def test_a_saved_prior_loads_with_the_same_bits(case: Case, tmp_path: Path) -> None:
    prior = case.build()
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert type(loaded) is type(prior) and loaded.config == prior.config and loaded.spec == prior.spec
    codes, cond = case.codes(3), case.cond(3)
    assert torch.equal(loaded.nll(codes, cond), prior.nll(codes, cond))
    ids, upper = torch.arange(3), codes[: prior.levels.start]
    a, b = (model.sample(ids, upper=upper, cond=cond) for model in (loaded, prior))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(p.is_meta for p in build_on_meta(type(prior), prior.config, prior.spec).parameters())


@one_of_each
@pytest.mark.parametrize("name", ["start", "stop", "shape"])
def test_levels_named_as_a_part_of_a_schedule_are_refused(case: Case, name: str) -> None:
    prior = case.build()
    levels = (*prior.spec.levels[:-1], replace(prior.spec.levels[-1], name=name))
    with pytest.raises(ConfigError, match=f"prior.levels: level '{name}' has a word of a guidance schedule"):
        PRIORS.build(prior.config, replace(prior.spec, levels=levels))


# Bad arguments ---------------------------------------------------------------------------------------------------
@one_of_each
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(0, dtype=torch.int64)}, r"ids: torch.int64 \(0,\); expected"),
        ({"ids": torch.zeros(3)}, r"ids: torch.float32 \(3,\); expected"),
        ({"ids": [0, 1, 2]}, "ids: a list; expected"),
        ({"seed": -1}, "seed: -1; expected"),
        ({"seed": 1.0}, "seed: 1.0; expected"),
        ({"micro_batch": 0}, "micro_batch: 0; expected"),
        ({"temperature": -1.0}, "temperature: -1.0; expected"),
        ({"temperature": math.nan}, "temperature: nan; expected"),
        ({"temperature": {}}, "temperature: {}; expected a value, or values by level of level"),
        ({"guidance": {}}, "guidance: {}; expected a value, or values by level of level"),
        ({"top_k": 0}, "top_k: 0; expected"),
        ({"top_k": 10**6}, "top_k: 1000000; expected at most the vocabulary"),
        ({"top_p": 0.0}, "top_p: 0.0; expected"),
        ({"guidance": math.inf}, "guidance: inf; expected"),
        ({"guidance": 2.0, "cond": None}, "guidance: 2.0 needs a label"),
        ({"beams": 8}, "beams: .* has no such sampling option; it has temperature, top_k"),
        ({"cond": Cond(label=torch.tensor([0, 1, 99]))}, r"cond.label: values in \[0, 99\]; expected \[0, "),
        ({"cond": Cond(label=torch.tensor([0, 1, -1]))}, r"cond.label: values in \[-1, 1\]; expected \[0, "),
        ({"cond": Cond(label=torch.tensor([0, 1]))}, r"cond.label: torch.int64 \(2,\); expected torch.int64 \(3,\)"),
        ({"cond": Cond(label=torch.zeros(3))}, "cond.label: torch.float32"),
        ({"cond": Cond(text=torch.zeros(3, 2, 2))}, "cond.text: .* has no use for text"),
        ({"upper": [torch.zeros(3, 9, 9, dtype=torch.int64)] * 7}, "upper: 7 levels of codes; expected"),
        ({"known": ([], [])}, "known: 0 levels of codes and 0 masks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_refused_by_name(case: Case, change: dict, message: str) -> None:
    prior = case.build()
    arguments = {"ids": torch.arange(3), "upper": case.codes(3)[: prior.levels.start], "cond": case.cond(3)} | change
    with pytest.raises(ValueError, match=message):
        prior.sample(arguments.pop("ids"), **arguments)


@every_case
def test_wrong_codes_are_refused_with_level_and_values(case: Case) -> None:
    prior = case.build()
    codes, cond = case.codes(3), case.cond(3)
    name, vocab = prior.own[-1].name, prior.own[-1].vocab
    with pytest.raises(ValueError, match=f"codes: {len(codes) - 1} levels of codes; expected {len(codes)}"):
        prior.nll(codes[:-1], cond)
    with pytest.raises(ValueError, match=f"codes: level '{name}' is torch.int32"):
        prior([*codes[:-1], codes[-1].int()], cond)
    for wrong in (-1, vocab):
        bad = codes[-1].clone()
        bad.view(-1)[-1] = wrong
        with pytest.raises(ValueError, match=rf"codes: level '{name}' holds values in .*; expected \[0, {vocab - 1}\]"):
            prior.nll([*codes[:-1], bad], cond)
    if prior.upper:
        with pytest.raises(ValueError, match=r"upper: 0 levels of codes; expected \d \(level0"):
            prior.sample(torch.arange(3), cond=cond)


@one_of_each
def test_conditions_that_training_did_not_have_are_refused(case: Case) -> None:
    codes = case.codes(2)
    always = Case(case.type, case.shapes, case.levels, case.classes, case.config | {"cond_dropout": 0.0}).build()
    upper = codes[: always.levels.start]
    with pytest.raises(ValueError, match="cond: None, but this prior was trained with cond_dropout 0"):
        always.nll(codes)
    with pytest.raises(ValueError, match=r"guidance: 1.5; this prior was trained with cond_dropout 0 and has only 1"):
        always.sample(torch.arange(2), upper=upper, cond=case.cond(2), guidance=1.5)
    for never in (
        Case(case.type, case.shapes, case.levels, 0, case.config),
        Case(case.type, case.shapes, case.levels, case.classes, case.config | {"cond_dropout": 1.0}),
    ):
        prior = never.build()
        with pytest.raises(ValueError, match=r"cond.label: this prior was trained without labels"):
            prior.nll(codes, case.cond(2))
        with pytest.raises(ValueError, match=r"guidance: 1.5; a prior without conditions has only 1"):
            prior.sample(torch.arange(2), upper=upper, guidance=1.5)


@one_of_each
@pytest.mark.parametrize("levels", ["0:9", "1:1", "2:1"])
def test_levels_outside_the_codes_are_refused_with_both(case: Case, levels: str) -> None:
    with pytest.raises(ConfigError, match=rf"prior.levels: '{levels}' is no range within the \d levels of the codes"):
        Case(case.type, case.shapes, levels, case.classes, case.config).build()


@one_of_each
@pytest.mark.parametrize("levels", ["1", "a:b", "1:", "-1:2"])
def test_levels_that_are_no_range_are_refused(case: Case, levels: str) -> None:
    with pytest.raises(ConfigError, match='levels: expected "start:stop"'):
        PRIORS.config(case.type).from_dict({"levels": levels})
