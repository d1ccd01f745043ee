"""Exact nearest-code search without an N x K matrix, and k-means on top of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.inference import whole_float32
from intarsia.machine import cpu_computes_bf16
from intarsia.rng import StepRng, permutation
from stage1_tokenizer.quantizers.equal_rows import first_of_each
from stage1_tokenizer.quantizers.shortlist import BLOCK, offsets, pays, shortlisted

_TILE_FLOATS = {"cpu": 1 << 18}  # 1 MB of scores at once stays in a core's cache; elsewhere 256 MB
_CHUNK_FLOATS = 1 << 18  # likewise of codes, which every tile reads anew
_PACK_ROWS = 64  # laying the codebook out pays from about this many rows on


def nearest(rows: Tensor, codebook: Tensor, cost: Tensor | None = None) -> Tensor:
    """argmin_k |z - e_k|^2 + cost_k = argmax_k (z . e_k - (|e_k|^2 + cost_k) / 2) for each row; the first of equals.

    Decided in the dtype given, without TF32 or bf16, whatever the program around has set (``shortlist`` leaves out what cannot be
    the best). Memory: a tile of scores and the result. On a CPU the codebook is taken in chunks, each against all rows, as what a
    core's cache cannot hold would be read from memory for every tile.

    Args:
        rows: (N, D) float32 or float64.
        codebook: (K, D) of the same dtype.
        cost: (K,) of the same dtype, what a code costs beside its distance, inf for one that must not be taken; None for nothing.

    Returns:
        (N,) int64 in [0, K), for rows that are not finite too.
    """
    with whole_float32():
        if rows.dtype == torch.float32 and _packable(codebook) and pays(len(rows), *codebook.shape) and _shortens():
            return shortlisted(rows, codebook, cost, lambda rest: _nearest(rest, codebook, cost))
        return _nearest(rows, codebook, cost)


def _nearest(rows: Tensor, codebook: Tensor, cost: Tensor | None) -> Tensor:
    k, mean = codebook.shape[0], codebook.mean(0)
    codebook = codebook - mean  # from there distances are the same, and scores no larger than they must be, which is what rounding goes by
    bias = offsets(codebook, cost)
    wide = rows.device.type == "cpu" and codebook.shape[0] >= 4 * BLOCK
    if wide and (over := -codebook.shape[0] % BLOCK):  # whole blocks: codes that never win
        codebook, bias = F.pad(codebook, (0, 0, 0, over)), F.pad(bias, (0, over), value=float("-inf"))
    best = _best_in_blocks if wide else _best
    parts = _chunks(*codebook.shape) if wide else [slice(0, k)]
    out = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    highest = rows.new_full(rows.shape[:1], float("-inf"))
    for part in parts:
        score = scorer(codebook[part], bias[part], rows.shape[0])
        for tile in tiles(rows.shape[0], part.stop - part.start, rows.device):
            scores = score(rows[tile] - mean)
            codes = best(scores)
            if len(parts) > 1:
                found = scores.gather(1, codes[:, None])[:, 0]
                codes = torch.where(found > highest[tile], codes + part.start, out[tile])  # of equals, the one of an earlier chunk
                torch.maximum(highest[tile], found, out=highest[tile])
            out[tile] = codes
    return out.clamp_(max=k - 1)  # a NaN wins also where it comes from inf and the zeros of the padding


def _chunks(k: int, dim: int) -> list[slice]:
    """Slices of k codes, a multiple of the block, into whole blocks of about equal number that stay in a core's cache."""
    blocks = k // BLOCK
    count = -(-blocks // max(1, _CHUNK_FLOATS // (dim * BLOCK)))
    edges = [BLOCK * (blocks * i // count) for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def tiles(n: int, k: int, device: torch.device) -> list[slice]:
    """Slices of n rows such that a rows x k matrix of scores is small."""
    size = max(1, _TILE_FLOATS.get(device.type, 1 << 26) // k)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def scorer(codebook: Tensor, bias: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """``rows -> rows @ codebook.T + bias`` for about n rows in all, without gradients.

    On a CPU the codebook is laid out once for oneDNN's kernels, where torch has them: a half to a third of the time. Elsewhere
    the result lies in one buffer, which the next call overwrites.
    """
    if n >= _PACK_ROWS and _packable(codebook):
        laid_out = torch.ops.mkldnn._reorder_linear_weight(codebook, None)
        return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, laid_out, bias, "none", [], "")
    columns = codebook.t()
    buffer: list[Tensor] = []

    def product(rows: Tensor) -> Tensor:
        if not buffer:
            buffer.append(rows.new_empty((rows.shape[0], codebook.shape[0])))
        return torch.addmm(bias, rows, columns, out=buffer[0][: rows.shape[0]])

    return product


def _packable(codebook: Tensor) -> bool:
    plain = type(codebook.detach()) is Tensor and not torch.compiler.is_compiling()  # traced tensors know no packed layout
    return plain and codebook.device.type == "cpu" and codebook.dtype == torch.float32 and _packs()


@cache
def _shortens() -> bool:
    """Whether the processor, and oneDNN as it is set, multiply bfloat16 faster than float32."""
    return cpu_computes_bf16() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _packs() -> bool:
    """Whether oneDNN's packed product is there; torch's own compiler calls the same operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _best(scores: Tensor) -> Tensor:
    return scores.argmax(1)


def _best_in_blocks(scores: Tensor) -> Tensor:
    """argmax over the last axis in two steps, block maxima first: exact, and several times faster on a CPU."""
    n, k = scores.shape
    blocks = scores.view(n, k // BLOCK, BLOCK)
    best = blocks.amax(2).argmax(1)
    inside = blocks[torch.arange(n, device=scores.device), best].argmax(1)
    return best * BLOCK + inside


def kmeans(rows: Tensor, k: int, rng: StepRng, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k random rows that differ in value; an empty cluster moves to a random one of those.

    With fewer than k that differ, they are used again with a little noise, so that no two codes are equal (but for chance, in one
    dimension): by the standard deviation of those that differ, and where all are alike, by their root mean square.

    Args:
        rows: (N, D), N > 0, float32 or float64, the same on every rank.

    Returns:
        centres (k, D) and the number of rows nearest to each (k,), in the dtype of ``rows``.
    """
    differing = first_of_each(rows)
    m, turn = differing.shape[0], torch.arange(k, device=rows.device)

    def some(purpose: str, step: int) -> Tensor:
        """(k, D) rows in a random order, none twice before each was there."""
        return rows[differing[permutation(rng.seed, purpose, m, step).to(rows.device)[turn % m]]]

    centres = some("kmeans", rng.step)
    if m < k:
        slots = StepRng(rng.seed, rng.step, turn)
        least = (1e-3 * rows.square().mean().sqrt()).clamp_min(1e-6)  # far above what rounding tells apart
        size = 1e-2 * torch.maximum(rows[differing].std(correction=0), least)
        centres += size * slots.normal("kmeans/noise", rows.shape[1]).to(rows.dtype)
    precise = rows.dtype if m >= k else torch.float64  # the mean of equal rows must be that row, or it would pass from code to code
    counts = rows.new_zeros(k)
    for i in range(iterations):
        codes = nearest(rows, centres)
        counts = rows.new_zeros(k).index_add_(0, codes, rows.new_ones(rows.shape[0]))
        sums = torch.zeros_like(centres, dtype=precise).index_add_(0, codes, rows.to(precise))
        moved = (sums / counts.clamp_min(1)[:, None]).to(rows.dtype)
        empty = some("kmeans/empty", rng.step + i) if m >= k else centres
        centres = torch.where((counts > 0)[:, None], moved, empty)
    codes = nearest(rows, centres)
    return centres, rows.new_zeros(k).index_add_(0, codes, rows.new_ones(rows.shape[0]))
