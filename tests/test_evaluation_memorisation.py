"""Memorisation: planted copies are seen, honest samples are not accused."""

import pytest
import torch

from pipelines.evaluation.memorisation import QUANTILES, memorisation, pixel_vectors
from pipelines.evaluation.neighbours import Nearest


def world(seed=0):
    """Train, held-out and sampled points of one distribution, in 8 dimensions; reconstructions carry a little noise."""
    g = torch.Generator().manual_seed(seed)
    train, held, samples = (torch.randn(n, 8, generator=g) for n in (2000, 400, 600))
    return train, held + 0.05 * torch.randn(held.shape, generator=g), samples


def figures(train, reconstructions, samples):
    search = Nearest(torch.cat([samples, reconstructions]))
    for part in train.split(300):
        search.update(part)
    return memorisation(search.distance[: len(samples)], search.distance[len(samples) :], 100, 0)


def test_honest_samples_lie_as_far_from_the_training_set_as_reconstructions():
    found = figures(*world())
    for q in QUANTILES[1:]:
        assert found.ratio[q].low < 1.05 and found.ratio[q].high > 0.95
    assert found.nearer.low <= 0.01 <= found.nearer.high + 0.005


@pytest.mark.parametrize(("share", "noise"), [(0.05, 0.0), (0.2, 0.02)])
def test_planted_copies_are_detected(share, noise):
    train, reconstructions, samples = world()
    copies = int(share * len(samples))
    samples[:copies] = train[100 : 100 + copies] + noise * torch.randn(copies, 8, generator=torch.Generator().manual_seed(9))
    found = figures(train, reconstructions, samples)
    assert found.ratio[0.01].high < 0.3
    assert found.nearer.low > 0.02 and found.nearer.value >= share - 0.01
    honest = figures(*world())
    assert found.samples[0.01] < honest.samples[0.01]


@pytest.mark.parametrize("varied", ["samples", "reconstructions"])
def test_intervals_hold_what_the_choice_of_either_set_adds(varied):
    sets = {name: torch.ones(60) for name in ("samples", "reconstructions")}
    sets[varied] = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.5
    found = memorisation(**sets, replicates=100, seed=0).ratio[0.5]
    assert found.low < found.value < found.high


def test_a_set_of_copies_is_at_no_distance_at_all():
    train, reconstructions, _ = world()
    found = figures(train, reconstructions, train[:50].clone())
    assert found.samples[0.5] == 0 and found.ratio[0.5].value == 0 and found.nearer.value == 1
    assert set(found.to_dict()["quantiles"]) == {"0.01", "0.05", "0.5"}


def test_pixel_vectors_keep_small_images_and_average_large_ones():
    small = torch.rand(2, 3, 28, 20)
    assert torch.equal(pixel_vectors(small), small.flatten(1))
    large = torch.rand(2, 1, 64, 96)
    assert torch.allclose(pixel_vectors(large).view(2, 32, 32)[0, 3, 5], large[0, 0, 6:8, 15:18].mean(), atol=1e-6)
