"""Figures of tokenizers against scikit-image and counting by hand, and sums that add up over batches and ranks."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from intarsia.distributed import comm
from intarsia.specs import LevelSpec
from stage1_tokenizer.metrics import CodeMetrics, ReconstructionMetrics, code_statistics, psnr, ssim, unit


def pair(*shape, noise=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    return x, (x + noise * torch.randn(shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (3, 3, 11, 17), (2, 3, 64, 40)])
def test_ssim_and_psnr_equal_scikit_image(shape):
    x, y = pair(*shape)
    x[0, :, : shape[2] // 2] = 0.3  # a flat area, where variances are differences of nearly equal numbers
    y[0, :, : shape[2] // 2] = 0.3001
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "channel_axis": 0}
    for i in range(shape[0]):
        a, b = x[i].double().numpy(), y[i].double().numpy()
        assert abs(ssim(x, y)[i].item() - structural_similarity(a, b, **options)) < 1e-6
        assert abs(psnr(x, y)[i].item() - peak_signal_noise_ratio(a, b, data_range=1)) < 1e-9


def test_ssim_of_an_image_does_not_depend_on_its_batch_and_is_one_for_itself():
    x, y = pair(600, 1, 28, 28)  # more than one part
    assert torch.equal(ssim(x, y)[550:], ssim(x[550:], y[550:]))
    assert torch.equal(ssim(x, x), torch.ones(600, dtype=torch.float64))


def test_ssim_refuses_what_its_window_does_not_fit():
    for shape in [(1, 1, 10, 28), (1, 1, 28), (1, 1, 4, 28, 28)]:
        x, y = pair(*shape)
        with pytest.raises(ValueError, match="at least 11 pixels"):
            ssim(x, y)


@pytest.mark.parametrize("axes", [(50,), (9, 7), (3, 5, 4)])
def test_psnr_takes_any_axes_and_pooled_is_that_of_the_mean_error(axes):
    x, y = pair(6, 2, *axes)
    y[0] = x[0] + (y[0] - x[0]) * 0.01  # one sample is much better than the others: the two means part
    metrics = ReconstructionMetrics()
    metrics.update(x, y)
    got = metrics.compute()
    errors = [float(np.mean((x[i].double().numpy() - y[i].double().numpy()) ** 2)) for i in range(6)]
    assert got["samples"] == 6 and "ssim" not in got
    assert got["psnr"] == pytest.approx(np.mean([-10 * math.log10(e) for e in errors]), abs=1e-9)
    assert got["psnr_pooled"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-9)
    assert got["psnr"] > got["psnr_pooled"] + 1


def test_an_exact_sample_is_counted_and_does_not_make_the_mean_infinite():
    x, y = pair(3, 1, 12, 12)
    y[1] = x[1]
    metrics = ReconstructionMetrics()
    metrics.update(x, y)
    got = metrics.compute()
    others = psnr(x, y)[[0, 2]].sum().item()
    assert got["exact"] == 1 and got["psnr"] == pytest.approx((others + 100) / 3) and got["psnr_pooled"] < got["psnr"] - 20
    metrics = ReconstructionMetrics()
    metrics.update(x, x)
    assert (metrics.compute()["psnr"], metrics.compute()["psnr_pooled"]) == (100, 100) and psnr(x, x).tolist() == [100] * 3


def test_merged_accumulators_equal_the_whole_set():
    x, y = pair(37, 1, 28, 28)
    codes = [torch.randint(0, 7, (37, 3, 3)), torch.randint(0, 5, (37, 6))]
    levels = [LevelSpec("top", 7, (3, 3)), LevelSpec("bottom", 5, (6,))]
    whole, whole_codes = ReconstructionMetrics(), CodeMetrics(levels)
    whole.update(x, y)
    whole_codes.update(codes)
    merged, merged_codes = ReconstructionMetrics(), CodeMetrics(levels)
    for rows in (slice(30, 37), slice(0, 1), slice(1, 30)):
        part, part_codes = ReconstructionMetrics(), CodeMetrics(levels)
        part.update(x[rows], y[rows])
        part_codes.update([c[rows] for c in codes])
        merged.merge(part)
        merged_codes.merge(part_codes)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert merged_codes.compute() == whole_codes.compute()


def test_two_ranks_count_each_sample_once_even_where_one_has_none(ranks):
    x, y = pair(5, 1, 14, 14)
    codes = torch.arange(10).reshape(5, 2)
    level = LevelSpec("codes", 10, (2,))
    whole, whole_codes = ReconstructionMetrics(), CodeMetrics([level])
    whole.update(x, y)
    whole_codes.update([codes])

    def work(rank):
        shares = [(slice(0, 3), slice(3, 5)), (slice(0, 5), slice(0, 0))]
        found = []
        for share in shares:
            metrics, counts = ReconstructionMetrics(), CodeMetrics([level])
            rows = share[rank]
            if rows.stop > rows.start:
                metrics.update(x[rows], y[rows])
                counts.update([codes[rows]])
            found.append((metrics.all_reduce_(comm).compute(), counts.all_reduce_(comm).compute()))
        return found

    for found in ranks(work):
        for figures, statistics in found:
            assert figures == pytest.approx(whole.compute(), rel=1e-12)
            assert statistics == whole_codes.compute()


@pytest.mark.parametrize("ways", [1, 2])
def test_a_vocabulary_beyond_any_table_is_counted_all_the_same(ranks, ways):
    """2^31 codes, of which a table would take 17 GB."""
    level = LevelSpec("codes", 2**31, (3, 3))
    codes = torch.randint(2**31, (40,), generator=torch.Generator().manual_seed(0))[torch.randint(40, (30, 3, 3))]
    whole = CodeMetrics([level])
    for part in (codes[:20], codes[20:20], codes[20:]):
        whole.merge(counted(level, part))
    _, expected = codes.unique(return_counts=True)
    assert torch.equal(whole.tallies[0].occurred(), expected) and whole.compute() == [code_statistics(expected, level)]
    if ways == 2:
        shares = (codes[:7], codes[7:])
        for found in ranks(lambda rank: counted(level, shares[rank]).all_reduce_(comm).compute()):
            assert found == whole.compute()
    with pytest.raises(ValueError, match=r"codes of level 'codes': value -1; expected \[0, 2147483647\]"):
        whole.update([torch.tensor([[-1]])])


def counted(level, codes):
    found = CodeMetrics([level])
    found.update([codes])
    return found


def test_code_statistics_of_a_known_distribution():
    uniform = code_statistics(torch.full((8,), 5), LevelSpec("codes", 8, (2, 3)))
    assert uniform.perplexity == pytest.approx(8) and uniform.entropy_bits == pytest.approx(3) and uniform.usage == 1
    assert uniform.bits_per_image == pytest.approx(18) and uniform.nominal_bits_per_image == pytest.approx(18)
    one = code_statistics(torch.tensor([0, 9, 0, 0]), LevelSpec("codes", 4, (1,)))
    assert (one.used, one.usage, one.perplexity, one.entropy_bits) == (1, 0.25, 1, 0)
    assert f"{one.entropy_bits:.3f} {one.bits_per_image:.3f} {one.perplexity:.3f}" == "0.000 0.000 1.000"  # no -0.000
    skewed = code_statistics(torch.tensor([2, 1, 1, 0]), LevelSpec("codes", 4, (1,)))
    assert skewed.entropy_bits == pytest.approx(1.5) and skewed.perplexity == pytest.approx(2**1.5) and skewed.used == 3


def test_wrong_input_is_refused_with_both_values():
    x, _ = pair(2, 1, 12, 12)
    with pytest.raises(ValueError, match=r"\(2, 1, 12, 12\) and \(1, 1, 12, 12\)"):
        psnr(x, x[:1])
    with pytest.raises(ValueError, match="uint8"):
        psnr(x, (x * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="no samples"):
        ReconstructionMetrics().compute()
    counts = CodeMetrics([LevelSpec("codes", 4, (2,))])
    with pytest.raises(ValueError, match=r"value 4; expected \[0, 3\]"):
        counts.update([torch.tensor([[4, 1]])])
    with pytest.raises(ValueError, match="2 levels; expected 1"):
        counts.update([torch.tensor([[0, 1]])] * 2)
    with pytest.raises(ValueError, match="no codes"):
        counts.compute()


def test_unit_clamps_what_a_decoder_leaves_outside():
    assert unit(torch.tensor([-1.5, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0.5, 1, 1]
