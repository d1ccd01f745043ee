"""Frechet distance against scipy, precision and recall against brute force, intervals against repeated experiments."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pipelines.evaluation.bootstrap import Strata, draw_counts, interval, mean_estimate, ratio_of_means
from pipelines.evaluation.distances import FeatureSet, Gaussian, fit_gaussian, frechet, frechet_table, precision_recall
from pipelines.evaluation.neighbours import Nearest, kth_neighbour, squared_distance_blocks, within


def normal(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / d**0.5
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix.double() * scale + shift


def by_scipy(a, b):
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root))


# Frechet distance -----------------------------------------------------------------------------------------------
def test_moments_equal_numpy_and_counts_equal_repeated_rows():
    x = normal(50, 6, 0)
    found = fit_gaussian(x.float())
    assert torch.allclose(found.mean, x.float().double().mean(0))
    assert torch.allclose(found.covariance, torch.from_numpy(np.cov(x.float().double().numpy().T)), atol=1e-12)
    counts = torch.tensor([0, 1, 2, 3] * 12 + [1, 1])
    a, b = fit_gaussian(x, counts), fit_gaussian(x.repeat_interleave(counts, 0))
    assert torch.allclose(a.mean, b.mean) and torch.allclose(a.covariance, b.covariance)


@pytest.mark.parametrize("d", [1, 7, 40])
def test_frechet_equals_scipys_matrix_root(d):
    a, b = fit_gaussian(normal(300, d, 1)), fit_gaussian(normal(200, d, 2, scale=1.7, shift=0.4))
    assert frechet(a, b) == pytest.approx(by_scipy(a, b), rel=1e-8)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)


def test_frechet_is_right_where_a_covariance_is_singular():
    """Fewer rows than features: the root of the product would be complex; commuting covariances have a closed form."""
    variance_a, variance_b = torch.tensor([4.0, 1, 0, 0, 9]).double(), torch.tensor([1.0, 0, 0, 16, 9]).double()
    rotation = torch.linalg.qr(normal(5, 5, 3))[0]
    a = Gaussian(torch.zeros(5).double(), rotation @ variance_a.diag() @ rotation.T)
    b = Gaussian(torch.ones(5).double(), rotation @ variance_b.diag() @ rotation.T)
    assert frechet(a, b) == pytest.approx(5 + (variance_a.sqrt() - variance_b.sqrt()).square().sum().item(), abs=1e-6)
    few = fit_gaussian(normal(10, 40, 4))
    assert frechet(few, few) == pytest.approx(0, abs=1e-6)


def test_a_table_repeats_itself_and_draws_the_reference_jointly():
    reference, near, far = FeatureSet("r", normal(200, 5, 0)), FeatureSet("a", normal(200, 5, 1)), FeatureSet("b", normal(200, 5, 2, 2.0))
    table, again = (frechet_table(reference, [near, far], 30, seed) for seed in (7, 7))
    assert table.estimate("a") == again.estimate("a") and table.ratio("a", "b") == again.ratio("a", "b")
    assert table.estimate("a") != frechet_table(reference, [near, far], 30, 8).estimate("a")
    assert torch.equal(table.replicates["b"], frechet_table(reference, [far], 30, 7).replicates["b"])
    assert table.ratio("b", "b").value == 1 and table.ratio("b", "b").high == pytest.approx(1)
    with pytest.raises(ValueError, match="not all different"):
        frechet_table(reference, [near, FeatureSet("r", near.features)], 2, 0)


# Bootstrap ------------------------------------------------------------------------------------------------------
def test_intervals_of_the_frechet_distance_cover_its_expectation_on_known_gaussians():
    """95 % intervals around the distance of n samples, over 100 experiments; the expectation is taken over 600 others."""
    n, d = 150, 3

    def sets(seed):
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(n, d, generator=g, dtype=torch.float64) * s + m for s, m in ((1, 0), (1.5, 0.7))]

    expected = np.mean([frechet(*map(fit_gaussian, sets(10_000 + i))) for i in range(600)])
    covered = 0
    for i in range(100):
        a, b = sets(i)
        found = frechet_table(FeatureSet("a", a), [FeatureSet("b", b)], 50, i).estimate("b")
        covered += found.low <= expected <= found.high
    assert 0.86 <= covered / 100 <= 0.995, covered


def test_the_interval_of_a_share_stays_a_share() -> None:
    rare = torch.arange(150) < 2
    as_numbers, low, high = (mean_estimate(v, 200, 0, "share") for v in (rare.double(), rare, ~rare))
    assert as_numbers.low < 0 == low.low and low.high == as_numbers.high and high.high == 1 and high.low == pytest.approx(1 - low.high)



def test_intervals_of_a_share_cover_it_and_follow_the_binomial_width():
    g = torch.Generator().manual_seed(0)
    found = [mean_estimate(torch.rand(400, generator=g) < 0.3, 80, i, "share") for i in range(120)]
    assert 0.86 <= np.mean([e.low <= 0.3 <= e.high for e in found]) <= 0.99
    assert np.mean([e.high - e.low for e in found]) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.1)


def test_intervals_of_a_balanced_set_leave_out_what_classes_differ_by():
    labels = torch.arange(400) % 2
    right = torch.where(labels == 0, torch.arange(400) % 8 != 0, torch.arange(400) % 8 == 1)  # 3/4 and 1/4
    width = {}
    for name, kept in (("free", None), ("balanced", labels)):
        found = mean_estimate(right, 300, 0, "share", kept)
        share = ratio_of_means(right.double(), torch.ones(7), 300, 0, ("share", "other"), (kept, None))
        assert found.value == pytest.approx(0.5) and share.high - share.low == pytest.approx(found.high - found.low, rel=1e-6)
        width[name] = found.high - found.low
    assert width["balanced"] == pytest.approx(width["free"] * (0.75 * 0.25 / 0.25) ** 0.5, rel=0.12)


def test_draws_keep_the_number_of_rows_per_class():
    labels = torch.tensor([0, 2, 2, 0, 2, 5, 2, 5] + [7] * 12)
    counts = torch.stack([draw_counts(20, b, 0, "x", labels) for b in range(200)])
    for c in (0, 2, 5, 7):
        assert torch.allclose(counts[:, labels == c].sum(1), (labels == c).sum().double())
    assert (counts[:, labels == 7] % 1 == 0).all() and (counts[:, labels == 7] > 1).any()
    plain = torch.stack([draw_counts(7, b, 0, "x") for b in range(2000)])
    assert (plain.sum(1) == 7).all() and torch.allclose(plain.mean(0), torch.ones(7).double(), atol=0.1)
    assert torch.allclose(plain.var(0), torch.full((7,), 6 / 7).double(), atol=0.15)  # binomial(7, 1/7)


@pytest.mark.parametrize(("each", "variance"), [(2, 1.0), (3, 1.0), (9, 1.0), (10, 0.9), (40, 39 / 40)])
def test_a_mean_over_a_balanced_set_varies_as_it_should_with_few_rows_of_each_class_too(each: int, variance: float) -> None:
    classes = 40
    labels = torch.arange(classes * each) % classes
    values = torch.randn(classes * each, generator=torch.Generator().manual_seed(each), dtype=torch.float64)
    draws = torch.stack([draw_counts(len(values), b, 0, "x", labels) for b in range(1500)])
    assert torch.allclose(draws.view(1500, each, classes).sum(1), torch.full((), each, dtype=torch.float64))
    within = values.view(each, classes).var(0).mean().item() / len(values)  # of the mean, unbiased
    assert (draws @ values / len(values)).var().item() == pytest.approx(variance * within, rel=0.1)


def test_one_row_of_a_class_tells_nothing_of_what_varies_within_it() -> None:
    with pytest.raises(ValueError, match="labels: class 3 has 1 row; expected at least 2 of each class"):
        mean_estimate(torch.rand(5), 10, 0, "x", torch.tensor([0, 0, 3, 1, 1]))


def test_strata_pick_only_rows_of_the_class_and_name_an_empty_one():
    labels = torch.tensor([1, 0, 1, 3, 1])
    strata = Strata.of(labels, 5, 4)
    u = torch.linspace(0.001, 0.999, 50).double()
    assert set(strata.pick(torch.full((50,), 1), u).tolist()) == {0, 2, 4}
    with pytest.raises(ValueError, match="class 2 has no rows"):
        strata.pick(torch.tensor([1, 2]), u[:2])


def test_intervals_are_centred_on_the_figure():
    found = interval(10.0, torch.arange(1001).double())  # biased upwards by 490
    assert found.value == 10 and found.low == pytest.approx(10 - 475) and found.high == pytest.approx(10 + 475)
    ones = ratio_of_means(torch.ones(5), torch.full((4,), 2.0), 10, 0, ("a", "b"))
    assert (ones.value, ones.low, ones.high) == (0.5, 0.5, 0.5)


# Neighbours -----------------------------------------------------------------------------------------------------
def brute(real, samples, k):
    def radius(x):
        d = ((x[:, None] - x[None]) ** 2).sum(-1)
        return np.sort(d, 1)[:, k]  # the row itself comes first

    def covered(points, centres):
        return (((points[:, None] - centres[None]) ** 2).sum(-1) <= radius(centres)[None]).any(1)

    return covered(samples, real), covered(real, samples)


@pytest.mark.parametrize(("n", "m", "k"), [(40, 40, 5), (30, 55, 1), (25, 20, 3)])
def test_precision_and_recall_equal_brute_force(n, m, k, monkeypatch):
    monkeypatch.setattr("pipelines.evaluation.neighbours.BLOCK", 100)  # several blocks
    real, samples = normal(n, 4, 1), normal(m, 4, 2, 1.3, 1.2)
    found = precision_recall(real.float(), samples.float(), k)
    in_real, in_samples = brute(real.float().double().numpy(), samples.float().double().numpy(), k)
    assert found.in_real.tolist() == in_real.tolist() and found.in_samples.tolist() == in_samples.tolist()
    assert 0 < in_real.mean() < 1 and 0 < in_samples.mean() < 1


def test_precision_and_recall_tell_apart_what_they_should():
    real = normal(200, 3, 0)
    same, far, narrow = normal(200, 3, 1), normal(200, 3, 2) + 100, normal(200, 3, 3) * 0.05
    precision, recall = precision_recall(real, same).estimates(20, 0)
    assert precision.value > 0.8 and recall.value > 0.8
    assert [e.value for e in precision_recall(real, far).estimates(20, 0)] == [0, 0]
    precision, recall = precision_recall(real, narrow).estimates(20, 0)
    assert precision.value == 1 and recall.value < 0.2  # good, but all alike


def test_kth_neighbour_refuses_more_neighbours_than_rows():
    with pytest.raises(ValueError, match="k: 5; expected 1 to 4 for 5 rows"):
        kth_neighbour(torch.zeros(5, 2), 5)
    assert within(torch.zeros(3, 2), torch.ones(2, 2), torch.tensor([1.9, 1.0])).tolist() == [False] * 3


def test_blocks_hold_all_squared_distances(monkeypatch):
    monkeypatch.setattr("pipelines.evaluation.neighbours.BLOCK", 30)
    x, y = normal(23, 4, 0), normal(11, 4, 1)
    whole = torch.cat([d for _, d in squared_distance_blocks(x, y)])
    assert torch.allclose(whole, torch.cdist(x, y) ** 2, atol=1e-10)


def test_the_nearest_key_does_not_depend_on_how_the_keys_arrive_and_a_copy_has_distance_zero():
    keys, queries = normal(120, 6, 0).float() + 50, normal(30, 6, 1).float() + 50
    queries[7], queries[21] = keys[100], keys[3]
    once, parts = Nearest(queries), Nearest(queries)
    once.update(keys)
    for part in keys.split([1, 50, 9, 60]):
        parts.update(part)
    exact = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert once.index.tolist() == parts.index.tolist() == exact.argmin(1).tolist()
    assert torch.allclose(parts.distance, exact.min(1).values) and parts.distance[[7, 21]].tolist() == [0, 0]
    assert parts.index[[7, 21]].tolist() == [100, 3]
    with pytest.raises(ValueError, match=r"keys: shape \(2, 5\); expected \(rows, 6\)"):
        parts.update(torch.zeros(2, 5))
