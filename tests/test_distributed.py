"""The collectives, in two real processes and in one."""

import pytest
import torch

from intarsia.distributed import comm


def test_in_one_process_collectives_change_nothing():
    t = torch.arange(6.0).reshape(2, 3)
    before = t.clone()
    assert (comm.world_size, comm.rank) == (1, 0)
    assert comm.all_reduce_sum_(t) is t and comm.broadcast_(t) is t and comm.gather_rows(t) is t
    comm.barrier()
    assert torch.equal(t, before)


def test_c0_two_ranks_are_two(ranks):
    assert ranks(lambda rank: (comm.world_size, comm.rank)) == [(2, 0), (2, 1)]


def test_all_reduce_sums_in_place_also_through_views_with_gaps(ranks):
    def work(rank):
        whole = torch.full((3, 4), float(rank + 1), dtype=torch.float64)
        column = whole[:, 1]
        assert comm.all_reduce_sum_(column) is column
        counts = comm.all_reduce_sum_(torch.tensor([rank, 10], dtype=torch.int64))
        least = comm.all_reduce_min_(torch.tensor([rank, -rank]))
        return whole, counts, least

    first, second = ranks(work)
    assert first[0][:, 1].tolist() == [3.0] * 3 and first[0][:, 0].tolist() == [1.0] * 3 and second[0][:, 0].tolist() == [2.0] * 3
    assert first[1].tolist() == second[1].tolist() == [1, 20]
    assert first[2].tolist() == second[2].tolist() == [0, -1]


def test_all_reduce_takes_a_parameter(ranks):
    def work(rank):
        parameter = torch.nn.Parameter(torch.full((2,), float(rank)))
        return comm.all_reduce_sum_(parameter).detach().tolist()

    assert ranks(work) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_gathered_rows_come_in_order_of_rank_whatever_their_number(ranks, dtype):
    counts = [(3, 1), (0, 2), (2, 0), (0, 0), (2, 2)]

    def rows(rank, n):
        return (torch.arange(n * 4).reshape(n, 2, 2) + 100 * rank).to(dtype)

    def work(rank):
        return [comm.gather_rows(rows(rank, pair[rank])) for pair in counts]

    first, second = ranks(work)
    for pair, a, b in zip(counts, first, second, strict=True):
        expected = torch.cat([rows(0, pair[0]), rows(1, pair[1])])
        assert a.dtype == dtype and torch.equal(a, expected) and torch.equal(b, expected)


def test_gather_rows_takes_transposed_rows(ranks):
    def work(rank):
        return comm.gather_rows((torch.arange(6.0).reshape(2, 3) + 10 * rank).T)

    expected = torch.cat([torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0).reshape(2, 3).T + 10])
    assert all(torch.equal(out, expected) for out in ranks(work))


def test_broadcast_copies_from_the_named_rank(ranks):
    def work(rank):
        grid = torch.full((2, 2), rank)
        comm.broadcast_(grid[:, 0], src=1)
        return grid.tolist()

    assert ranks(work) == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]


def test_the_harness_reports_a_rank_that_fails(ranks):
    def work(rank):
        if rank == 1:
            raise KeyError("the cause")

    with pytest.raises(AssertionError, match=r"rank 1(?s:.*)the cause"):
        ranks(work, timeout=5)
