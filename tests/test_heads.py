"""Codes as digits: their order, their vectors, heads that predict one after the other, and priors that use them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.specs import CodesSpec, Cond, LevelSpec
from stage2_prior.context import UpperCodes
from stage2_prior.digits import CodeTable, DigitTable, code_table, digit_sizes, sizes_of, to_digits, weights_of
from stage2_prior.heads import DigitHead, FullHead, code_head
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.gpt import GPTConfig, GPTPrior
from tests.tiny_priors import Case


# Digits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("factors", "sizes"),
    [
        ((2,) * 18, (512, 512)),  # the two sub-vocabularies of MAGVIT-v2
        ((8, 8, 8, 6, 5), (64, 240)),
        ((8, 8, 8, 5, 5, 5), (512, 125)),
        ((3, 2), (3, 2)),
        ((3, 2, 4), (6, 4)),
        ((2,) * 24, (256, 256, 256)),
        ((5000, 2), (5000, 2)),  # a factor is never taken apart
        ((5000, 2, 2), (5000, 2, 2)),
    ],
)
def test_factors_are_taken_together_to_the_fewest_digits_that_are_small(factors: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    assert digit_sizes(factors) == sizes
    assert math.prod(sizes) == math.prod(factors)


def test_the_first_factor_is_the_lowest_digit() -> None:
    sizes = (3, 2, 4)
    numbers = [tuple(reversed(word)) for word in itertools.product(*map(range, reversed(sizes)))]  # counting: the first turns fastest
    digits = to_digits(torch.arange(24), sizes)
    assert [tuple(int(d[i]) for d in digits) for i in range(24)] == numbers
    assert weights_of(sizes) == (1, 3, 6)
    assert torch.equal(sum(d * w for d, w in zip(digits, weights_of(sizes), strict=True)), torch.arange(24))


def test_digits_are_those_of_the_quantisers() -> None:
    """FSQ counts its first dimension as the lowest digit, and neighbouring factors make one digit of the same number."""
    from stage1_tokenizer.quantizers.fsq import FSQ, FSQConfig

    quantizer = FSQ(FSQConfig(levels=(8, 5, 3)))
    level = quantizer.level_specs("codes", (2, 2))[0]
    codes = torch.arange(level.vocab)
    assert torch.equal(torch.stack(to_digits(codes, level.factors), -1), quantizer.to_digits(codes))
    low, high = to_digits(codes, digit_sizes(level.factors))
    assert digit_sizes(level.factors) == (8, 15)
    expected = quantizer.to_digits(codes)
    assert torch.equal(low, expected[:, 0]) and torch.equal(high, expected[:, 1] + 5 * expected[:, 2])


def test_auto_takes_digits_where_one_softmax_would_be_too_large() -> None:
    small, large, plain = LevelSpec("a", 240, (2,), (8, 6, 5)), LevelSpec("b", 2**16, (2,), (2,) * 16), LevelSpec("c", 2**16, (2,))
    assert [sizes_of(level, "auto") for level in (small, large, plain)] == [(240,), (256, 256), (2**16,)]
    assert sizes_of(large, "full") == (2**16,) and sizes_of(small, "factorised") == (8, 30)
    with pytest.raises(ConfigError, match=r"prior.head: 'factorised' needs levels with factors; level 'c' has \(65536,\)"):
        sizes_of(plain, "factorised")


def test_the_vector_of_a_code_is_the_sum_of_its_digits() -> None:
    table = code_table((3, 2, 4), 6, 0.5)
    assert isinstance(table, DigitTable) and isinstance(code_table((24,), 6, 0.5), CodeTable)
    codes = torch.arange(24).view(4, 6)
    parts = [table.part(i, digit) for i, digit in enumerate(to_digits(codes, (3, 2, 4)))]
    torch.testing.assert_close(table(codes), parts[0] + parts[1] + parts[2])
    assert len({tuple(v) for v in table(codes).view(24, 6).tolist()}) == 24
    wide = code_table((64, 64, 64), 256, 0.5)(torch.randint(64**3, (400,)))
    assert abs(wide.std().item() - 0.5) < 0.03  # as large as that of an ordinary table


# Heads -----------------------------------------------------------------------------------------------------------
SIZES = (3, 2, 4)


def digit_head() -> DigitHead:
    torch.manual_seed(0)
    head = code_head(SIZES, 8)
    assert isinstance(head, DigitHead)
    for parameter in head.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return head


def test_the_probabilities_of_all_codes_sum_to_1_and_depend_on_the_features() -> None:
    head = digit_head()
    codes = torch.arange(24)

    def probabilities(features: torch.Tensor) -> torch.Tensor:
        logits = head.logits(features.expand(24, -1), codes).split(SIZES, 1)
        logs = [part.log_softmax(1).gather(1, d[:, None]) for part, d in zip(logits, to_digits(codes, SIZES), strict=True)]
        return torch.cat(logs, 1).sum(1).exp()

    a, b = probabilities(torch.randn(1, 8)), probabilities(torch.randn(1, 8))
    assert abs(a.sum().item() - 1) < 1e-5 and a.max() > 3 / 24 and (a - b).abs().max() > 0.05
    grid = a.view(4, 2, 3)
    independent = torch.einsum("i,j,k->ijk", grid.sum((1, 2)), grid.sum((0, 2)), grid.sum((0, 1)))
    assert (grid - independent).abs().max() > 0.01  # the digits of a code depend on each other


def test_a_digit_sees_those_before_it_and_no_others() -> None:
    head, features = digit_head(), torch.randn(1, 8)
    logits = head.logits(features, torch.tensor([0])).split(SIZES, 1)
    for changed, weight in enumerate(weights_of(SIZES)):
        other = head.logits(features, torch.tensor([weight])).split(SIZES, 1)
        assert [bool((a != b).any()) for a, b in zip(logits, other, strict=True)] == [i > changed for i in range(3)]


@torch.no_grad()
def test_digit_by_digit_a_head_gives_the_logits_of_all_at_once() -> None:
    head, features, codes = digit_head(), torch.randn(24, 8), torch.arange(24)
    draw, carried, previous = head.drawer(), features, None
    for i, (expected, digit) in enumerate(zip(head.logits(features, codes).split(SIZES, 1), to_digits(codes, SIZES), strict=True)):
        logits, carried = draw(i, carried, previous)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
        previous = digit
    full = code_head((24,), 8)
    assert isinstance(full, FullHead)
    torch.testing.assert_close(full.drawer()(0, features, None)[0], full.logits(features, codes))


# Priors ----------------------------------------------------------------------------------------------------------
BITS = CodesSpec((LevelSpec("codes", 2**18, (2, 2), (2,) * 18),), "none", ("a", "b"), (1, 1))


def test_a_prior_over_18_bits_holds_nothing_of_the_size_of_the_vocabulary() -> None:
    torch.manual_seed(0)
    prior = GPTPrior(GPTConfig(width=16, depth=1, heads=2), BITS).eval()
    assert prior.digits == ((512, 512),)
    assert sum(p.numel() for p in prior.parameters()) < 2**17
    codes = torch.randint(2**18, (3, 2, 2))
    cond = Cond(label=torch.tensor([0, 1, 0]))
    assert prior.nll([codes], cond).shape == (3, 4) and prior.logits([codes], cond)[0].shape == (3, 4, 1024)
    drawn = prior.sample(torch.arange(64), cond=Cond(label=torch.arange(64) % 2), guidance=2.0, top_k=512, top_p=0.99)[0]
    assert drawn.max() > 2**17 and drawn.min() >= 0 and drawn.max() < 2**18
    keep = torch.tensor([True, True, False, False]).view(1, 2, 2).expand(3, -1, -1)
    assert torch.equal(prior.sample(torch.arange(3), cond=cond, known=([codes], [keep]))[0][:, 0], codes[:, 0])


def test_training_learns_digits_that_depend_on_each_other() -> None:
    """All 18 bits of a code are equal, and each code follows from the one before: 1 bit for the first code, 0 for the rest."""
    torch.manual_seed(0)
    prior = GPTPrior(GPTConfig(width=16, depth=1, heads=2, cond_dropout=1.0), BITS)
    start = torch.arange(32)[:, None] % 2
    codes = ((start + torch.arange(4)) % 2).view(32, 2, 2) * (2**18 - 1)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    for _ in range(60):
        loss, _ = prior([codes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = prior.nll([codes]).mean(0) / math.log(2)
    assert 0.9 < bits[0] < 1.2 and (bits[1:] < 0.1).all()
    drawn = prior.sample(torch.arange(32))[0]
    assert torch.isin(drawn, torch.tensor([0, 2**18 - 1])).float().mean() > 0.95


def test_upper_codes_of_a_large_vocabulary_have_vectors_by_digits() -> None:
    upper = UpperCodes(BITS.levels, [LevelSpec("bottom", 8, (4, 4))], 6)
    assert isinstance(upper.tables[0], DigitTable)
    assert upper([torch.randint(2**18, (2, 2, 2))])[0].shape == (2, 16, 6)


def test_top_k_counts_digits_and_may_not_exceed_the_largest() -> None:
    case = Case("gpt", (((3, 2), (2, 2)),), config={"head": "factorised"})
    prior, full = case.build(), Case("gpt", (((3, 2), (2, 2)),), config={"head": "full"}).build()
    with pytest.raises(ValueError, match=r"top_k: 4; the codes of level 'level0' are drawn in digits of \(3, 2\): expected at most 3"):
        prior.sample(torch.arange(2), top_k=4)
    ids = torch.arange(200)
    assert torch.equal(prior.sample(ids, top_k=3)[0], prior.sample(ids)[0])  # all of both digits
    assert full.sample(ids, top_k=4)[0].max() < 6
    assert len(prior.sample(ids, top_k=1)[0].flatten(1).unique(dim=0)) == 1


def test_draws_are_the_schedule_digit_by_digit() -> None:
    shapes = ((4, (2,)), ((3, 2), (2,)))
    prior = Case("gpt", shapes, config={"order": "position", "head": "auto"}).build()
    assert isinstance(prior, AutoregressivePrior)
    assert prior.draws == ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0))
    prior = Case("gpt", (((2, 2), (2,)), ((3, 2), (2,))), config={"order": "position", "head": "factorised"}).build()
    assert isinstance(prior, AutoregressivePrior)
    assert prior.draws == tuple((level, position, digit) for position in range(2) for level in range(2) for digit in range(2))
    assert prior.schedule == ((0, 0), (1, 0), (0, 1), (1, 1))
