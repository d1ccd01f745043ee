"""Drawing codes from logits, against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from stage2_prior.sampling import DrawOptions, Guidance, choose_options, draw, filtered, guide, open_progress


def brute_force(logits: list[float], options: DrawOptions) -> list[float]:
    """The distribution that is drawn from, one row, in plain Python."""
    weights = [math.exp((x - max(logits)) / options.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if options.top_k is not None:
        order = [i for i in order if logits[i] >= logits[order[options.top_k - 1]]]
    if options.top_p is not None and options.top_p < 1:
        total, mass, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            if mass >= options.top_p:
                break
            kept.append(i)
            mass += weights[i] / total
        order = kept
    total = sum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 9])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.35, 0.8, 1.0])
def test_the_filtered_distribution_is_that_of_brute_force(temperature: float, top_k: int | None, top_p: float | None) -> None:
    options = DrawOptions(temperature, top_k, top_p)
    logits = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.softmax(filtered(logits, options), -1)
    expected = torch.tensor([brute_force(row, options) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("top_p", [None, 0.6])
def test_min_p_keeps_what_is_at_least_that_share_as_probable_as_the_best(min_p: float, top_p: float | None) -> None:
    logits = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = torch.softmax(filtered(logits, DrawOptions(0.7, top_p=top_p)), -1)
    expected = torch.where(before >= min_p * before.amax(-1, keepdim=True) * (1 - 1e-12), before, 0.0)
    got = torch.softmax(filtered(logits, DrawOptions(0.7, top_p=top_p, min_p=min_p)), -1)
    torch.testing.assert_close(got, expected / expected.sum(-1, keepdim=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "values"), [("linear", [1.0, 1.5, 2.0, 3.0]), ("cosine", [1.0, 2 - 0.5**0.5, 2.0, 3.0])])
def test_guidance_goes_from_start_to_stop_in_its_shape(shape: str, values: list[float]) -> None:
    schedule = Guidance(1.0, 3.0, shape)
    assert [schedule.at(u) for u in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values)


def test_numbers_of_numpy_are_numbers() -> None:
    logits = torch.randn(8, 9, generator=torch.Generator().manual_seed(4))
    plain, numpy = DrawOptions(0.5, 4, 0.75), DrawOptions(np.float32(0.5), np.int64(4), np.float32(0.75))
    assert torch.equal(filtered(logits, plain), filtered(logits, numpy))


def test_codes_that_tie_with_the_kth_are_kept() -> None:
    kept = filtered(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), DrawOptions(top_k=1)).isfinite()
    assert kept.tolist() == [[False, True, True, False]]


def test_top_p_keeps_no_more_than_the_codes_that_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    kept = filtered(logits, DrawOptions(top_p=0.5)).isfinite()
    assert kept.tolist() == [[True, False, False]] and filtered(logits, DrawOptions(top_p=0.75)).isfinite().sum() == 2


@pytest.mark.parametrize("options", [DrawOptions(top_p=1e-46), DrawOptions(top_p=5e-324), DrawOptions(temperature=1e-6)])
def test_the_smallest_options_leave_the_most_probable_code(options: DrawOptions) -> None:
    for size in (1.0, 1e33):  # logits after a huge guidance
        assert draw(torch.tensor([[1.0, 2.0, 3.0, 0.0]]) * size, torch.tensor([0.999]), options).item() == 2


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0, 1.0])
    options = DrawOptions(temperature=0.8, top_p=0.97)
    n = 200_000
    numbers = (torch.arange(n) + 0.5) / n
    counts = torch.bincount(draw(logits.expand(n, -1).contiguous(), numbers, options), minlength=6)
    expected = torch.tensor(brute_force(logits.tolist(), options)) * n
    assert (counts[expected == 0] == 0).all()
    # equally spaced numbers: every count is within one of its expectation, up to rounding of the float32 sum
    assert (counts - expected).abs().max() < 3
    random = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    counts = torch.bincount(draw(logits.expand(20_000, -1).contiguous(), random, options), minlength=6)
    live = expected > 0
    assert stats.chisquare(counts[live].numpy(), (expected[live] / n * 20_000).double().numpy(), sum_check=False).pvalue > 1e-3


def test_a_code_of_probability_zero_is_never_drawn() -> None:
    low, high = 2.0**-24, 1 - 2.0**-24  # the ends of what rng.uniform gives
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(2, -1).contiguous()
    assert draw(logits, torch.tensor([low, high]), DrawOptions()).tolist() == [1, 3]
    for vocab in (3, 512, 16384):
        logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab))
        logits[:, -1] = -math.inf
        assert draw(logits, torch.full((64,), high), DrawOptions()).max() < vocab - 1


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    assert filtered(torch.zeros(1, 3, dtype=torch.bfloat16), DrawOptions()).dtype == torch.float32
    assert filtered(torch.zeros(1, 3, dtype=torch.float64), DrawOptions()).dtype == torch.float64


def test_temperature_0_takes_the_most_probable_code() -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(logits, torch.rand(50), DrawOptions(temperature=0)), logits.argmax(-1))


def test_guidance_extrapolates_from_the_null_logits() -> None:
    cond, null = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 1.0]])
    assert torch.equal(guide(cond, null, 1.0), cond)
    assert torch.equal(guide(cond, null, 0.0), null)
    assert guide(cond, null, 3.0).tolist() == [[0.5 + 3 * 1.5, 1.0 - 3 * 2.0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-39),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("guidance", None),
    ],
)
def test_an_impossible_option_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        DrawOptions(**{name: value})  # type: ignore[arg-type]


def test_top_k_above_the_vocabulary_is_refused_with_both_values() -> None:
    DrawOptions(top_k=8).check_vocab(8)
    with pytest.raises(ValueError, match="top_k: 9; expected at most the vocabulary of level 'bottom', 8"):
        DrawOptions(top_k=9).check_vocab(8, "bottom")


def test_an_option_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="steps: a gpt prior has no such sampling option; it has temperature, top_k, top_p, min_p"):
        choose_options(DrawOptions, {"temperature": 1.0, "steps": 8}, "a gpt prior", ["codes"])


def test_progress_counts_the_open_positions_of_each_row() -> None:
    keep = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    found = open_progress(keep)
    assert found.dtype == torch.float64 and found[~keep].tolist() == [0, 0.5, 1, 0, 1, 0, 1, 0]
    assert ((found >= 0) & (found <= 1)).all()


def test_guidance_by_rows_keeps_the_dtype_of_the_logits_and_the_bits_of_one_number() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cond, null = (torch.randn(3, 50, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        rows = torch.full((3, 1), 1.7, dtype=torch.promote_types(dtype, torch.float32))
        assert torch.equal(guide(cond, null, rows), guide(cond, null, 1.7)) and guide(cond, null, rows).dtype == dtype


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_says_the_same_of_a_tensor_as_of_its_numbers(shape: str) -> None:
    schedule, progress = Guidance(1.0, 3.0, shape), torch.linspace(0, 1, 7, dtype=torch.float64)
    expected = torch.tensor([schedule.at(u) for u in progress.tolist()], dtype=torch.float64)
    torch.testing.assert_close(schedule.along(progress), expected, atol=1e-14, rtol=0)
