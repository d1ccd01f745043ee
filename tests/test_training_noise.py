"""The noise of a prior's training: how often, of what size, and that it reaches what it is meant for."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage2_prior.corruption import corrupted
from stage2_prior.priors.base import Prior
from tests.tiny_priors import CASES, Case

N = 4000


def rng() -> StepRng:
    return StepRng(3, 7, torch.arange(N))


def prior_with(**config: float) -> Prior:
    return Case("gpt", ((5, (3, 4)),), classes=3, config=config).build().train()


def test_labels_are_dropped_as_often_as_the_field_says() -> None:
    labels = torch.arange(N) % 3
    dropped = prior_with(cond_dropout=0.3)._drop_label(labels, rng())
    assert dropped is not None and set(dropped[dropped != labels].tolist()) == {3}
    assert stats.binomtest(int((dropped == 3).sum()), N, 0.3).pvalue > 1e-3


def test_dropout_factors_have_mean_1() -> None:
    keep = prior_with(dropout=0.25)._keep(rng(), 6)
    assert keep is not None and keep.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert stats.binomtest(int((keep == 0).sum()), 6 * N, 0.25).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_corruption_replaces_that_share_by_codes_that_are_uniform_wherever_they_stand(rate: float) -> None:
    vocab, positions = 8, 6
    clean = torch.full((N, positions), vocab)  # a code that is never drawn, so that every replacement shows
    (found,) = corrupted([clean], [LevelSpec("a", vocab, (positions,))], rate, rng(), "test")
    replaced = found != clean
    assert stats.binomtest(int(replaced.sum()), N * positions, rate).pvalue > 1e-3
    assert stats.chisquare(replaced.sum(0).numpy()).pvalue > 1e-3
    for codes in (found[replaced], found[:, 0][replaced[:, 0]], found[:, -1][replaced[:, -1]]):
        assert stats.chisquare(torch.bincount(codes, minlength=vocab).numpy()).pvalue > 1e-3


def test_corruption_reaches_every_bit_of_a_large_vocabulary() -> None:
    (found,) = corrupted([torch.zeros(N, 6, dtype=torch.int64)], [LevelSpec("a", 1 << 30, (6,))], 1.0, rng(), "test")
    for bit in range(30):
        assert stats.binomtest(int((found >> bit & 1).sum()), 6 * N, 0.5).pvalue > 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case.levels and not case.levels.startswith("0")], ids=str)
def test_corruption_reaches_the_levels_above(case: Case) -> None:
    """Where every code is replaced, other codes above train as the same ones do; without corruption they do not."""
    start = case.build().levels.start
    codes, cond, draws = case.codes(16), case.cond(16), StepRng(0, 0, torch.arange(16))
    other = [*case.codes(16, seed=1)[:start], *codes[start:]]
    for rate, same in ((0.9999999, True), (0.0, False)):
        prior = Case(case.type, case.shapes, case.levels, case.classes, case.config | {"corruption": rate}).build().train()
        assert torch.equal(prior(codes, cond, draws)[0], prior(other, cond, draws)[0]) is same


@pytest.mark.parametrize("case", CASES, ids=str)
def test_corruption_leaves_what_is_to_be_predicted(case: Case) -> None:
    """With all codes that are seen replaced, the loss still depends on the codes themselves: they are the targets."""
    prior = Case(case.type, case.shapes, case.levels, case.classes, case.config | {"corruption": 0.9999999}).build().train()
    codes, cond, draws = case.codes(16), case.cond(16), StepRng(0, 0, torch.arange(16))
    last = prior.levels.stop - 1
    other = [(c + 1) % level.vocab if i == last else c for i, (c, level) in enumerate(zip(codes, prior.spec.levels, strict=False))]
    assert abs(prior.loss(codes, cond, draws)[0].item() - prior.loss(other, cond, draws)[0].item()) > 1e-3
