"""Hierarchies: any prior as any level, given all levels above, is exact. Two and three levels small enough to enumerate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from intarsia.order import share
from intarsia.rng import uniform
from intarsia.specs import Cond
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.base import Prior
from stage2_prior.priors.maskgit import MaskGITPrior
from stage2_prior.sampling import DrawOptions, draw
from tests.tiny_priors import Case, Leaves, all_grids

CLASSES = 2
TWO = ((2, (1, 2)), (3, (2, 2)))
THREE = ((3, (1, 1)), (2, (1, 2)), (2, (2, 2)))
DEPTHS = ((2, (1, 2)), (3, (1, 2)), (2, (1, 2)))
ATTENTION = {"attention": 1, "heads": 2}


@dataclass(frozen=True)
class Hierarchy:
    """Priors, each (type, levels, config), over levels of (vocabulary, shape)."""

    name: str
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    parts: tuple[tuple[str, str, dict[str, Any]], ...]

    def build(self) -> list[Prior]:
        return [Case(kind, self.shapes, levels, CLASSES, config).build(seed=i) for i, (kind, levels, config) in enumerate(self.parts)]

    def __str__(self) -> str:
        return self.name


HIERARCHIES = [
    Hierarchy("gpt, pixelcnn", TWO, (("gpt", "0:1", {}), ("pixelcnn", "1:2", {}))),
    Hierarchy("pixelcnn with attention, maskgit", TWO, (("pixelcnn", "0:1", ATTENTION), ("maskgit", "1:2", {}))),
    Hierarchy("maskgit, pixelcnn with attention", TWO, (("maskgit", "0:1", {}), ("pixelcnn", "1:2", ATTENTION))),
    Hierarchy("pixelcnn, gpt", TWO, (("pixelcnn", "0:1", {}), ("gpt", "1:2", {"positions": "rotary"}))),
    Hierarchy("gpt over both", TWO, (("gpt", "0:2", {}),)),
    Hierarchy("maskgit over both", TWO, (("maskgit", "0:2", {}),)),
    Hierarchy("gpt, pixelcnn, maskgit", THREE, (("gpt", "0:1", {}), ("pixelcnn", "1:2", ATTENTION), ("maskgit", "2:3", {}))),
    Hierarchy("maskgit, gpt, pixelcnn", THREE, (("maskgit", "0:1", {}), ("gpt", "1:2", {}), ("pixelcnn", "2:3", {}))),
    Hierarchy("pixelcnn, gpt over two", THREE, (("pixelcnn", "0:1", {}), ("gpt", "1:3", {}))),
    Hierarchy("gpt over three, by position", DEPTHS, (("gpt", "0:3", {"order": "position"}),)),
    Hierarchy("pixelcnn, gpt by position", DEPTHS, (("pixelcnn", "0:1", {}), ("gpt", "1:3", {"order": "position"}))),
    Hierarchy("gpt, rq", DEPTHS, (("gpt", "0:1", {}), ("rq", "1:3", {}))),
]
every_hierarchy = pytest.mark.parametrize("hierarchy", HIERARCHIES, ids=str)


def labels(label: int | None, n: int) -> Cond | None:
    return None if label is None else Cond(label=torch.full((n,), label))


def options(prior: Prior) -> dict[str, Any]:
    """One code in each step and in a fixed order: then what MaskGIT draws has a likelihood that can be computed."""
    return {"order": "raster", "steps": {level.name: level.positions for level in prior.own}} if isinstance(prior, MaskGITPrior) else {}


def chained(priors: Sequence[Prior], ids: Tensor, cond: Cond | None, seed: int = 0, micro_batch: int = 16, **more: Any) -> list[Tensor]:
    """Codes of all levels: each prior is given what those before it drew."""
    codes: list[Tensor] = []
    for prior in priors:
        codes += prior.sample(ids, upper=codes, cond=cond, seed=seed, micro_batch=micro_batch, **options(prior), **more)
    return codes


def one_by_one(prior: MaskGITPrior, codes: Sequence[Tensor], cond: Cond | None) -> list[tuple[int, int, Tensor]]:
    """(level, position, logits (n, vocab)) in the order in which ``options`` draws: what is later is masked."""
    out = []
    for level in prior.levels:
        for position in range(prior.spec.levels[level].positions):
            masked = (torch.arange(prior.spec.levels[level].positions) >= position).view(1, *codes[level].shape[1:]).expand_as(codes[level])
            out.append((level, position, prior.logits(codes[: level + 1], masked, cond)[:, position]))
    return out


def log_likelihood(prior: Prior, codes: Sequence[Tensor], cond: Cond | None) -> Tensor:
    """(n,) float64 log-probability of a prior's own levels given those above."""
    if isinstance(prior, AutoregressivePrior):
        return -prior.nll(codes[: prior.levels.stop], cond).double().sum(1)
    assert isinstance(prior, MaskGITPrior)
    total = torch.zeros(len(codes[0]), dtype=torch.float64)
    for level, position, logits in one_by_one(prior, codes, cond):
        total += logits.double().log_softmax(1).gather(1, codes[level].flatten(1)[:, position : position + 1])[:, 0]
    return total


@torch.no_grad()
def joint(priors: Sequence[Prior], label: int | None) -> tuple[list[Tensor], Tensor]:
    """Every grid of all levels and its probability: the product over the priors."""
    grids = all_grids(priors[0].spec.levels)
    cond = labels(label, len(grids[0]))
    return grids, sum((log_likelihood(prior, grids, cond) for prior in priors), torch.zeros(())).exp()


@every_hierarchy
@pytest.mark.parametrize("label", [0, 1, None])
def test_the_probabilities_of_all_grids_of_all_levels_sum_to_1(hierarchy: Hierarchy, label: int | None) -> None:
    _, p = joint(hierarchy.build(), label)
    assert abs(p.sum().item() - 1) < 1e-5
    assert p.max() > 3 * p.mean()  # far from uniform, so that the sum says something


@every_hierarchy
def test_what_the_chained_samplers_draw_follows_the_joint_likelihood(hierarchy: Hierarchy) -> None:
    priors, n = hierarchy.build(), 6000
    grids, p = joint(priors, 1)
    drawn = chained(priors, torch.arange(n), labels(1, n), seed=5, micro_batch=1000)
    index = {tuple(row): i for i, row in enumerate(torch.cat([g.flatten(1) for g in grids], 1).tolist())}
    found = torch.tensor([index[tuple(row)] for row in torch.cat([g.flatten(1) for g in drawn], 1).tolist()])
    counts, expected = torch.bincount(found, minlength=len(p)).double(), p * n
    rare = expected < 5  # grids too rare for the test are pooled
    bins = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    live = bins[1] > 1e-9
    assert live.sum() > 5
    result = stats.chisquare(bins[0][live].numpy(), bins[1][live].numpy(), sum_check=False)
    assert result.pvalue > 1e-3, f"p = {result.pvalue}"


# What sees what --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hierarchy", [h for h in HIERARCHIES if not all(kind == "maskgit" for kind, _, _ in h.parts)], ids=str)
def test_no_position_of_any_level_sees_its_future_and_each_sees_its_whole_past(hierarchy: Hierarchy) -> None:
    """By gradient: all upper codes, and of its own levels those before it in the order of ``schedule``, alone."""
    for prior in hierarchy.build():
        if not isinstance(prior, AutoregressivePrior):
            continue
        codes = Case("", hierarchy.shapes).codes(1)[: prior.levels.stop]
        own = prior.codes if isinstance(prior.codes, torch.nn.ModuleList) else [prior.codes]
        above = [] if prior.context.upper is None else list(prior.context.upper.tables)
        with Leaves(above) as upper, Leaves(list(own)) as before:
            logits = prior.layout.join([scores[..., :2] for scores in prior.logits(codes, labels(0, 1))])
        assert len(upper.found) == len(prior.upper) and len(before.found) == len(prior.own)
        for i in range(len(prior.schedule)):
            leaves = upper.found + before.found
            found = torch.autograd.grad(logits[0, i].square().sum(), leaves, retain_graph=True, allow_unused=True)
            seen = [(torch.zeros_like(x) if g is None else g).abs().amax(2)[0] > 0 for g, x in zip(found, leaves, strict=True)]
            assert all(level.all() for level in seen[: len(above)]), f"{prior.type_name}, step {i}"
            past = prior.layout.join([level[None] for level in seen[len(above) :]])[0]
            assert past.tolist() == [j < i for j in range(len(past))], f"{prior.type_name}, step {i}"


@torch.no_grad()
def test_maskgit_sees_what_is_not_masked_and_every_upper_code_and_nothing_else() -> None:
    case = Case("maskgit", ((3, (1, 2)), (2, (2, 2)), (4, (3, 4))), "1:3")
    prior, codes = case.build().double(), case.codes(1)
    assert isinstance(prior, MaskGITPrior)
    masked = (torch.arange(12) * 5 % 12 < 6).view(1, 3, 4)
    logits = prior.logits(codes, masked)
    for level, spec in enumerate(prior.spec.levels):
        for place in range(spec.positions):
            changed = [c.clone() for c in codes]
            changed[level].view(-1)[place] = (changed[level].view(-1)[place] + 1) % spec.vocab
            hidden = level == 2 and bool(masked.flatten()[place])
            assert torch.equal(prior.logits(changed, masked), logits) == hidden, f"level {level}, position {place}"


# The samplers ----------------------------------------------------------------------------------------------------
@every_hierarchy
@torch.no_grad()
def test_caches_change_no_draw(hierarchy: Hierarchy) -> None:
    """Level after level the codes are those of a sampler that runs the whole network for every code, under the same numbers."""
    priors, ids = [prior.double() for prior in hierarchy.build()], torch.arange(12) + 7
    cond = Cond(label=ids % CLASSES)
    codes = [torch.zeros(12, *level.shape, dtype=torch.int64) for level in priors[0].spec.levels]
    for prior in priors:
        if isinstance(prior, AutoregressivePrior):
            for level, position in prior.schedule:
                logits = prior.logits(codes[: prior.levels.stop], cond)[level - prior.levels.start][:, position]
                number = uniform(3, "sample", ids, level, position, dtype=torch.float64)
                codes[level].view(12, -1)[:, position] = draw(logits, number, DrawOptions())
            continue
        assert isinstance(prior, MaskGITPrior)
        for level in prior.levels:
            for position in range(prior.spec.levels[level].positions):
                logits = next(scores for i, j, scores in one_by_one(prior, codes, cond) if (i, j) == (level, position))
                number = uniform(3, "sample/code", ids, level, position, position, torch.float64)
                codes[level].view(12, -1)[:, position] = draw(logits, number, DrawOptions())
    assert all(torch.equal(a, b) for a, b in zip(chained(priors, ids, cond, seed=3, micro_batch=5), codes, strict=True))


@pytest.mark.parametrize("hierarchy", [h for h in HIERARCHIES if "attention" in h.name or len(h.shapes) > max(2, len(h.parts))], ids=str)
def test_f4_sample_i_is_the_same_in_any_batch_in_any_order_and_in_two_processes(hierarchy: Hierarchy, ranks: Any) -> None:
    priors, n = hierarchy.build(), 256

    def drawn(ids: Tensor, batch: int) -> list[Tensor]:
        parts = [chained(priors, rows, Cond(label=rows % CLASSES), seed=9, guidance=1.7) for rows in ids.split(batch)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    everything = torch.arange(n)
    whole = drawn(everything, n)
    assert len(torch.cat([level.flatten(1) for level in whole], 1).unique(dim=0)) > 8
    for batch in (7, 32):
        assert all(torch.equal(a, b) for a, b in zip(drawn(everything, batch), whole, strict=True)), f"batches of {batch}"
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(drawn(everything.flip(0), n), whole, strict=True)), "reversed"
    some = everything[3::17]  # batches of 1 cost a whole padded micro-batch each
    assert all(torch.equal(a, b[3::17]) for a, b in zip(drawn(some, 1), whole, strict=True)), "batches of 1"

    def work(rank: int) -> list[Tensor]:
        return drawn(everything[share(n, rank, 2)], 50)

    halves = ranks(work)
    assert all(torch.equal(torch.cat(parts), b) for *parts, b in zip(*halves, whole, strict=True)), "two processes"


# Grids -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gpt", "pixelcnn", "maskgit"])
@torch.no_grad()
def test_a_grid_that_the_one_above_does_not_divide_hears_of_each_of_its_codes(kind: str) -> None:
    case = Case(kind, ((3, (2, 3)), (4, (3, 3)), (4, (5, 4))), "2:3")
    prior, codes = case.build().double(), case.codes(1)
    said = log_likelihood(prior, codes, None)
    for level in range(2):
        for place in range(codes[level].numel()):
            changed = [c.clone() for c in codes]
            changed[level].view(-1)[place] = (changed[level].view(-1)[place] + 1) % prior.spec.levels[level].vocab
            assert (log_likelihood(prior, changed, None) - said).abs() > 1e-6


@pytest.mark.parametrize("kind", ["gpt", "pixelcnn", "maskgit"])
def test_a_level_above_that_is_finer_along_an_axis_is_refused(kind: str) -> None:
    """Of such a grid only some codes would lie under a cell, and the others would be ignored without a word."""
    with pytest.raises(ValueError, match=r"prior.levels: 'level0' has a grid \(2, 4\), finer than \(4, 2\) below it"):
        Case(kind, ((3, (2, 4)), (4, (4, 2))), "1:2").build()
