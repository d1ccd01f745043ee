"""The order of training: each epoch a permutation, nothing dropped, a function of the step alone."""

import pytest
import torch
from scipy import stats

from intarsia.order import Order, share


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 5), (7, 1), (3, 10), (1, 4), (64, 64), (5, 13)])
def test_each_epoch_is_exactly_a_permutation_and_nothing_is_dropped(n, batch_size):
    order, epochs = Order(n, batch_size, 0), 6
    steps = -(-n * epochs // batch_size)
    indices = torch.cat([order.indices(s) for s in range(steps)])
    of = torch.cat([order.epochs(s) for s in range(steps)])
    assert indices.dtype == of.dtype == torch.int64 and all(len(order.indices(s)) == batch_size for s in range(steps))
    assert torch.equal(of, torch.arange(steps * batch_size) // n)
    for epoch in range(epochs):
        assert torch.equal(indices[of == epoch].sort().values, torch.arange(n))


def test_a_batch_is_a_function_of_the_step_alone():
    forward, backward, fresh = Order(11, 4, 5), Order(11, 4, 5), [Order(11, 4, 5) for _ in range(20)]
    expected = [forward.indices(s) for s in range(20)]
    for s in reversed(range(20)):
        assert torch.equal(backward.indices(s), expected[s]) and torch.equal(fresh[s].indices(s), expected[s])


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 200
    one = Order(n, n, 0)
    firsts = [one.indices(0), one.indices(1), Order(n, n, 1).indices(0)]
    assert not any(torch.equal(firsts[i], firsts[j]) for i in range(3) for j in range(i))


def test_the_first_place_is_uniform_over_the_samples():
    counts = torch.bincount(torch.cat([Order(8, 8, seed).indices(0)[:1] for seed in range(4000)]), minlength=8)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_a_batch_size_divides_the_same_stream():
    small, large = Order(10, 2, 3), Order(10, 6, 3)
    assert torch.equal(torch.cat([small.indices(s) for s in range(9)]), torch.cat([large.indices(s) for s in range(3)]))


@pytest.mark.parametrize(("n", "batch_size", "said"), [(0, 1, "data: 0 samples"), (3, 0, "batch_size: 0 must be positive")])
def test_an_empty_order_is_refused(n, batch_size, said):
    with pytest.raises(ValueError, match=said):
        Order(n, batch_size, 0)


@pytest.mark.parametrize("n", range(12))
@pytest.mark.parametrize("parts", range(1, 6))
def test_shares_are_contiguous_cover_everything_and_differ_by_at_most_one(n, parts):
    shares = [list(range(n))[share(n, part, parts)] for part in range(parts)]
    assert [i for one in shares for i in one] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("n", "part", "parts"), [(3, 2, 2), (3, -1, 2), (3, 0, 0), (-1, 0, 1)])
def test_a_share_that_is_none_is_refused(n, part, parts):
    with pytest.raises(ValueError, match="share: part"):
        share(n, part, parts)
