"""Fixed-size, padded micro-batches: a row's bits do not depend on the batch that it is in."""

import pytest
import torch

from intarsia.padded import pad_rows, padded_batches, run_padded


@pytest.mark.parametrize("n", range(10))
@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_cover_every_row_once(n, size):
    slices = list(padded_batches(n, size))
    assert [i for s in slices for i in range(n)[s]] == list(range(n))
    assert all(0 < s.stop - s.start <= size for s in slices)


def test_the_function_sees_one_size_only_and_padding_is_zero():
    seen = []

    def fn(x, y):
        seen.append((x.clone(), y.clone()))
        return x + 1, y[:, 0]

    x, y = torch.arange(1, 6), torch.arange(10.0).reshape(5, 2) + 1
    a, b = run_padded(fn, [x, y], 4)
    assert torch.equal(a, x + 1) and torch.equal(b, y[:, 0])
    assert [s[0].shape[0] for s in seen] == [4, 4] and seen[1][0].tolist() == [5, 0, 0, 0] and seen[1][1][1:].abs().sum() == 0
    assert seen[0][0].dtype == torch.int64


def test_no_rows_keep_shape_and_dtype():
    (out,) = run_padded(lambda x: [x.double()[:, None]], [torch.zeros(0, 3)], 4)
    assert out.shape == (0, 1, 3) and out.dtype == torch.float64


def test_the_bits_of_a_row_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 33))
    x = torch.randn(37, 3, 8, 8)
    with torch.no_grad():
        (whole,) = run_padded(lambda x: [net(x)], [x], 8)
        for rows in ([0], [36], list(range(5, 18)), list(range(36, -1, -1)), [3, 3, 3]):
            assert torch.equal(run_padded(lambda x: [net(x)], [x[rows]], 8)[0], whole[rows])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="micro_batch: 0 must be positive"):
        run_padded(lambda x: [x], [torch.zeros(2)], 0)
    with pytest.raises(ValueError, match=r"rows: \[2, 3\] differ"):
        run_padded(lambda x, y: [x], [torch.zeros(2), torch.zeros(3)], 4)


def test_pad_rows_leaves_a_full_batch_as_it_is():
    full = torch.ones(4, 2)
    assert pad_rows(full, 4) is full and pad_rows(full[:1], 3).tolist() == [[1, 1], [0, 0], [0, 0]]
