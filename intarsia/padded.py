"""Fixed-size, padded micro-batches: what a network returns for a sample then has the same bits in any batch.

Kernels sum in another order for other batch sizes, so that the last bits, and with them an argmin, depend on the batch.
At one fixed size a row's result depends neither on its place nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def padded_batches(n: int, size: int) -> Iterator[slice]:
    """The ranges of ``n`` rows in micro-batches of ``size``; the last may be short and is to be padded."""
    if size < 1:
        raise ValueError(f"micro_batch: {size} must be positive")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def pad_rows(rows: Tensor, size: int) -> Tensor:
    """(n, ...) -> (size, ...) with zero rows appended."""
    return rows if rows.shape[0] == size else torch.cat([rows, rows.new_zeros((size - rows.shape[0], *rows.shape[1:]))])


def run_padded(fn: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """``fn(*micro_batch) -> tensors`` over fixed-size micro-batches; the results of the real rows, concatenated.

    For no rows at all, ``fn`` runs once on padding, so that shapes and dtypes are right.
    """
    n = tensors[0].shape[0]
    if any(t.shape[0] != n for t in tensors):
        raise ValueError(f"rows: {[t.shape[0] for t in tensors]} differ between the tensors of one batch")
    parts = [
        [out[: s.stop - s.start] for out in fn(*[pad_rows(t[s], size) for t in tensors])]
        for s in (list(padded_batches(n, size)) or [slice(0, 0)])
    ]
    return [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]
