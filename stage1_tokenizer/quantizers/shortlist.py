"""Exact nearest codes where a processor multiplies bfloat16 faster than float32: a shortlist in bfloat16, then float32 among it.

Rounding moves a score by less than a bound that is known beforehand, so that the best code cannot be missing from those within
twice the bound of the highest score: a code or two of thousands, as a rule. Rows and codes are taken from the codebook's mean,
which changes no distance and keeps the bound small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_UNIT = 2.0**-8  # what rounding to bfloat16 changes at most, relatively
_LEAST = 1e-30  # what the unit that multiplies loses at most by taking the smallest numbers for 0
_TILE = 1 << 20  # scores at once: 2 MB
BLOCK = 64  # codes whose highest score is looked at first
_MOST = 16  # codes of a row's shortlist, which bounds memory
_ROWS, _WORK = 512, 1 << 17  # rows, and numbers in the codebook, from which on it pays


def pays(rows: int, codes: int, dim: int) -> bool:
    """Whether a search of that size is faster so, on a processor that computes in bfloat16."""
    return rows >= _ROWS and codes >= 1024 and codes * dim >= _WORK and dim >= 32


def offsets(codes: Tensor, cost: Tensor | None) -> Tensor:
    """(K,) -(|e_k|^2 + cost_k) / 2, what is added to z . e_k for the code of least distance and cost to have the highest score."""
    squares = codes.square().sum(1)
    return (squares if cost is None else squares + cost).mul(-0.5)


def shortlisted(rows: Tensor, codebook: Tensor, cost: Tensor | None, search: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``search.nearest`` gives, on a CPU with oneDNN's packed products.

    The scores are z . e + b with b raised so that the least is 0: the best are positive then, as a rule. With z', e', b' for what
    rounding makes of them, one is off by at most |z - z'| |e| + |z'| |e - e'| + |b - b'|, by what adding up in float32 loses, and by the
    rounding of the result, which ``_best`` takes into account.

    Args:
        rows: (N, D) float32; codebook: (K, D); cost: (K,) or None.
        search: ``rows -> codes`` in float32, for rows whose best score is not told from 0 in bfloat16, such as those with a NaN, and
            for those with a long shortlist.
    """
    mean = codebook.mean(0)
    codes = codebook - mean
    bias = offsets(codes, cost)
    over = -len(codes) % BLOCK  # whole blocks: codes that never win
    codes, bias = F.pad(codes, (0, 0, 0, over)), F.pad(bias, (0, over), value=float("-inf"))
    raised = bias + torch.where(bias.isfinite(), bias.abs(), 0.0).amax()
    short, short_bias = codes.bfloat16(), raised.bfloat16()
    length, lost = _length(codes).amax(), _length(codes - short).amax()
    lost_bias = torch.where(bias.isfinite(), (raised - short_bias).abs(), 0.0).amax()
    laid_out = torch.ops.mkldnn._reorder_linear_weight(short, None)
    found = []
    for part in rows.split(max(1, _TILE // len(codes))):
        z = part - mean
        near = z.bfloat16()
        summed = codebook.shape[1] * 2.0**-23 * _length(z) * length
        bound = 1.05 * (_length(z - near) * length + _length(near.float()) * lost + lost_bias + summed) + _LEAST
        scores = torch.ops.mkldnn._linear_pointwise(near, laid_out, short_bias, "relu", [], "")
        found.append(_best(scores, z, bound, codes, bias))
    out = torch.cat(found)
    rest = (out < 0).nonzero()[:, 0]
    if len(rest):
        out[rest] = search(rows[rest])
    return out


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _best(scores: Tensor, z: Tensor, bound: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """(n,) the best code of each row, the first of equals; -1 where the shortlist does not tell.

    Args:
        scores: (n, K) bfloat16, none below 0; z: (n, D); bound: (n,) of what they were off by before they were rounded.
    """
    n, k = scores.shape
    blocks = scores.view(torch.int16).view(n, k // BLOCK, BLOCK)  # in the order of the numbers, and quicker to compare
    tops = blocks.amax(2)
    high = tops.amax(1).view(torch.bfloat16).float()
    least = high * (1 - 4 * _UNIT) - 2 * bound  # for the rounding of the highest, of the best, and of this limit
    told = (least > 0) & high.isfinite()
    limit = torch.where(told, least, float("inf")).bfloat16().view(torch.int16)[:, None]
    near = tops >= limit
    told &= near.sum(1) <= _MOST
    row, block = (near & told[:, None]).nonzero().unbind(1)
    near = blocks[row, block] >= limit[row]
    told &= row.new_zeros(n).index_add_(0, row, near.sum(1)) <= _MOST
    which, place = (near & told[row, None]).nonzero().unbind(1)
    row, code = row[which], block[which] * BLOCK + place
    exact = torch.linalg.vecdot(z.index_select(0, row), codes.index_select(0, code)) + bias.index_select(0, code)
    best = exact.new_full((n,), float("-inf")).scatter_reduce_(0, row, exact, "amax")
    won = exact == best[row]
    first = code.new_full((n,), k).scatter_reduce_(0, row[won], code[won], "amin")
    return torch.where(told & (first < k), first, -1)
