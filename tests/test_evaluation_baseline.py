"""The baseline draws the training frequencies, independently; its bits are those of a proper distribution."""

import math

import pytest
import scipy.stats
import torch

from intarsia.specs import LevelSpec
from pipelines.evaluation.baseline import IndependentCodes

LEVELS = (LevelSpec("top", 3, (2,)), LevelSpec("bottom", 4, (2, 2)))


def training(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    labels[0] = 1  # classes 0, 1, 2 all occur
    codes = [(torch.rand(n, *level.shape, generator=g) ** 2 * level.vocab).long() for level in LEVELS]
    codes[1][labels == 2] = 3
    return codes, labels


def test_drawn_codes_follow_the_frequencies_of_each_class_and_position_by_chi_square():
    codes, labels = training()
    baseline = IndependentCodes(LEVELS, codes, labels, 3)
    n = 4000
    worst = 1.0
    for c in range(3):
        drawn = baseline.sample(torch.arange(n), torch.full((n,), c), seed=c)
        for level, train, found in zip(LEVELS, codes, drawn, strict=True):
            assert found.shape == (n, *level.shape) and found.dtype == torch.int64
            for j in range(level.positions):
                p = torch.bincount(train[labels == c].flatten(1)[:, j], minlength=level.vocab).double()
                seen = torch.bincount(found.flatten(1)[:, j], minlength=level.vocab)
                assert (seen[p == 0] == 0).all()
                if (p > 0).sum() > 1:
                    expected = (p / p.sum() * n)[p > 0]
                    worst = min(worst, scipy.stats.chisquare(seen[p > 0].numpy(), expected.numpy()).pvalue)
    assert worst > 1e-3


def test_positions_are_drawn_independently():
    """Training codes whose positions are always equal: drawn ones are not."""
    equal = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(1))
    baseline = IndependentCodes([LevelSpec("codes", 4, (2,))], [equal[:, None].expand(-1, 2).contiguous()])
    drawn = baseline.sample(torch.arange(5000))[0]
    table = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).view(4, 4)
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_levels_are_drawn_independently():
    levels = [LevelSpec("a", 50, (1,)), LevelSpec("b", 50, (1,))]
    codes = torch.arange(50)[:, None]
    a, b = IndependentCodes(levels, [codes, codes]).sample(torch.arange(2000))
    assert (a == b).double().mean() < 0.05


def test_a_sample_is_a_function_of_seed_and_index_alone():
    codes, labels = training()
    baseline = IndependentCodes(LEVELS, codes, labels, 3)
    ids, label = torch.arange(20), torch.arange(20) % 3
    whole = baseline.sample(ids, label, seed=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = baseline.sample(order, label[order], seed=5)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))
    other = baseline.sample(ids, label, seed=6)
    assert any(not torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_bits_are_those_of_a_distribution_that_sums_to_one_and_gives_every_code_a_chance():
    codes, labels = training()
    baseline = IndependentCodes(LEVELS, codes, labels, 4)  # class 3 has no training row
    for c in range(4):
        for number, level in enumerate(LEVELS):
            every = torch.arange(level.vocab).view(-1, *[1] * len(level.shape)).expand(-1, *level.shape)
            given = [torch.zeros(level.vocab, *other.shape, dtype=torch.int64) for other in LEVELS]
            given[number] = every
            bits = baseline.bits(given, torch.full((level.vocab,), c))[number]
            assert bits.shape == (level.vocab, level.positions) and torch.isfinite(bits).all()
            assert torch.allclose(torch.exp2(-bits).sum(0), torch.ones(level.positions).double())


def test_bits_approach_the_entropy_of_what_was_seen_often():
    n = 40_000
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    codes = p.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(0))[:, None]
    baseline = IndependentCodes([LevelSpec("codes", 4, (1,))], [codes])
    assert baseline.bits([codes])[0].mean().item() == pytest.approx(1.75, abs=0.01)
    rare = baseline.bits([torch.tensor([[3]])])[0].item()
    assert rare == pytest.approx(3, abs=0.1)


def test_unlabelled_codes_have_one_class_and_a_label_is_refused():
    codes, labels = training()
    baseline = IndependentCodes(LEVELS, codes)
    assert baseline.draw_labels(torch.arange(3)) is None
    assert baseline.sample(torch.arange(3))[1].shape == (3, 2, 2)
    with pytest.raises(ValueError, match="one is given, but the training codes are unlabelled"):
        baseline.sample(torch.arange(3), labels[:3])
    with pytest.raises(ValueError, match="none is given, but the training codes are labelled"):
        IndependentCodes(LEVELS, codes, labels, 3).sample(torch.arange(3))
    with pytest.raises(ValueError, match=r"level 'bottom': shape \(60, 2\); expected \(60, 2, 2\)"):
        IndependentCodes(LEVELS, [codes[0], codes[0]])


def test_drawn_labels_follow_the_training_frequencies():
    codes, labels = training()
    drawn = IndependentCodes(LEVELS, codes, labels, 3).draw_labels(torch.arange(6000), seed=2)
    expected = torch.bincount(labels).double() / len(labels) * 6000
    assert scipy.stats.chisquare(torch.bincount(drawn).numpy(), expected.numpy()).pvalue > 1e-3


def test_a_code_that_was_never_seen_costs_more_the_fewer_codes_were_seen():
    """Witten and Bell: among 10 equal codes the weight of the unseen is 1 / 11, shared by backing off to uniform."""
    baseline = IndependentCodes([LevelSpec("codes", 8, (1,))], [torch.zeros(10, 1, dtype=torch.int64)])
    p = (10 + (10 + 1 / 8) / 11) / 11, (0 + (0 + 1 / 8) / 11) / 11
    bits = baseline.bits([torch.tensor([[0], [5]])])[0].flatten().tolist()
    assert bits == pytest.approx([-math.log2(p[0]), -math.log2(p[1])])


def test_bits_need_no_table_of_the_vocabulary_and_equal_those_of_one():
    g = torch.Generator().manual_seed(3)
    train, held = torch.randint(0, 6, (40, 3), generator=g), torch.randint(0, 8, (25, 3), generator=g)
    labels, label = torch.randint(0, 3, (40,), generator=g), torch.randint(0, 4, (25,), generator=g)
    found = IndependentCodes([LevelSpec("codes", 8, (3,))], [train], labels, 4).bits([held], label)[0]

    def smoothed(rows: torch.Tensor, code: int, wider: float) -> float:
        counts = torch.bincount(rows, minlength=8)
        total, distinct = int(counts.sum()), int((counts > 0).sum())
        return (int(counts[code]) + distinct * wider) / (total + distinct) if total else wider

    for i in range(25):
        for j in range(3):
            p = smoothed(train[:, j], int(held[i, j]), 1 / 8)
            p = smoothed(train[labels == label[i], j], int(held[i, j]), p)
            assert found[i, j].item() == pytest.approx(-math.log2(p), rel=1e-12)
    huge = LevelSpec("codes", 2**40, (1,))  # a table would take 8 TB
    bits = IndependentCodes([huge], [torch.tensor([[2**40 - 1], [5]])], torch.tensor([0, 1]), 2).bits(
        [torch.tensor([[2**40 - 1], [7]])], torch.tensor([0, 0])
    )[0]
    assert bits[0] < 2 < 38 < bits[1]


def test_a_class_that_training_lacks_is_drawn_by_the_frequencies_of_all():
    codes, labels = training()
    model = IndependentCodes(LEVELS, codes, labels, classes=5)
    ids = torch.arange(4000)
    unseen = model.sample(ids, torch.full((4000,), 4))
    for level, drawn, seen in zip(LEVELS, unseen, codes, strict=True):
        for j in range(level.positions):
            found, wanted = (torch.bincount(c.flatten(1)[:, j], minlength=level.vocab) / len(c) for c in (drawn, seen))
            assert torch.allclose(found, wanted, atol=0.04)
    known = labels[ids % 60]
    assert torch.equal(model.sample(ids, known)[0], IndependentCodes(LEVELS, codes, labels, classes=3).sample(ids, known)[0])
