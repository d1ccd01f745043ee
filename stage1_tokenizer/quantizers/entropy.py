"""A bonus for the entropy of the mean assignment, that all codes be used alike."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from intarsia.config import Config
from intarsia.inference import whole_float32
from stage1_tokenizer.quantizers.search import scorer, tiles


class EntropyConfig(Config):
    """The term -weight * H(mean assignment)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """lambda, per nat; 0 = off."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T of the soft assignment softmax(-|z - e|^2 / T), which carries the gradient."""


def mean_entropy(
    rows: Tensor, vectors: Tensor, share: Tensor, temperature: float, batch: int, cost: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """() -H, linear in the batch: mean over positions of sum_k q_k(z) log m_k, with q the soft assignment.

    -H(E q) is no mean over samples, so that micro-batches and processes would each have their own. Its first-order expansion about
    a running mean m of the assignments is one: up to a constant it is E sum_k q_k log m_k, which has -H's gradient at E q = m and is
    -H(m) there. m comes from the counts that ``update`` advances: hard assignments, which need no second pass and no second sum.

    Args:
        rows: (N, D); vectors: (K, D).
        share: (K,) m, positive, without gradient.
        cost: (K,) as in ``nearest``; codes that cost inf have q = 0.
        active: (B,) bool, the samples that count; the mean stays one over all.

    No N x K tensor is kept: the gradient is worked out tile by tile in the forward pass, with rows and codes taken from the codes' mean:
    neither the softmax nor a gradient changes by that, and far from the origin rounding spoils neither.
    """
    return _MeanEntropy.apply(rows, vectors, share.log(), temperature, batch, cost, active)  # type: ignore[no-any-return]


class _MeanEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        vectors: Tensor,
        log_share: Tensor,
        temperature: float,
        batch: int,
        cost: Tensor | None,
        active: Tensor | None,
    ) -> Tensor:
        n, k = rows.shape[0], vectors.shape[0]
        known = rows.new_ones(k) if cost is None else cost.isfinite().to(rows.dtype)
        centre = (known @ vectors) / known.sum()  # from there scores are no larger than they must be, and the softmax is the same
        vectors = vectors - centre
        weight = rows.new_full((batch,), 1 / n) if active is None else active.to(rows.dtype) / n
        weight = weight.repeat_interleave(n // batch, output_size=n)
        bias = vectors.square().sum(1)
        score = scorer(vectors, (bias if cost is None else bias + cost).mul(-0.5), n)
        to_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        to_vectors = torch.zeros_like(vectors) if ctx.needs_input_grad[1] else None
        pull, total = rows.new_zeros(k), rows.new_zeros(())
        for tile in tiles(n, k, rows.device):
            z = rows[tile] - centre
            q = torch.softmax(score(z) * (2 / temperature), 1)
            mean = q @ log_share
            total += mean @ weight[tile]
            q *= (log_share - mean[:, None]) * (weight[tile, None] * (2 / temperature))  # the gradient of the scores
            if to_rows is not None:
                torch.mm(q, vectors, out=to_rows[tile])
            if to_vectors is not None:
                to_vectors.addmm_(q.t(), z)
                pull += q.sum(0)
        if to_vectors is not None:
            to_vectors -= vectors * pull[:, None]
        ctx.save_for_backward(to_rows, to_vectors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_rows, to_vectors = (None if t is None else t * grads[0] for t in ctx.saved_tensors)
        return to_rows, to_vectors, None, None, None, None, None


def joint(p: Tensor) -> Tensor:
    """(..., g) probabilities of independent bits to (..., 2^g) of the codes that they write, the first bit lowest."""
    out = p.new_ones((*p.shape[:-1], 1))
    for bit in p.unbind(-1):
        out = torch.cat([out * (1 - bit[..., None]), out * bit[..., None]], -1)
    return out


def bits_mean_entropy(
    logits: Tensor, shares: list[Tensor], groups: list[slice], finite: Tensor, active: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """``mean_entropy`` of codes whose bits are independent: the mean over positions of sum_c p(c) log m(c), a sum over groups of bits.

    A group's codes are pairs of a high and a low half of its bits, and p(c) is the product of the halves': with W (2^hi, 2^lo) the
    log m(c), sum_c p(c) W(c) is hi^T W lo. So N x 2^g tensors are not made at all, and of the halves' one tile; kept for the backward
    pass is the gradient of the logits. With P = lo (hi^T W) elementwise, that of a low bit i is sum_c P(c) (i-th bit of c) -
    sigmoid(logit_i) sum_c P(c), and likewise of a high one.

    Args:
        logits: (B, *grid, bits) log p(1) - log p(0).
        shares: (2^g,) m of each group, positive, without gradient.
        groups: the bits of each group, the first the lowest of its code.
        finite: () bool; where it is not so, the sums are 0.
        active: (B,) bool, the samples that count; the mean stays one over all.

    Returns:
        the term () and, for each group, sum over positions that count of p(c) (2^g,), without gradient.
    """
    total, *sums = _BitsMeanEntropy.apply(logits, groups, finite, active, *(share.log() for share in shares))
    return total, sums


class _BitsMeanEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, groups: list[slice], finite: Tensor, active: Tensor | None, *log_shares: Tensor
    ) -> tuple[Tensor, ...]:
        rows = logits.reshape(-1, logits.shape[-1])
        n, sizes = rows.shape[0], [group.stop - group.start for group in groups]
        counts = active.repeat_interleave(n // active.shape[0], output_size=n) if active is not None else finite.new_ones(n)
        gradient = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        sums, total = [torch.zeros_like(share) for share in log_shares], rows.new_zeros(())
        with whole_float32():
            for tile in tiles(n, max(rows.shape[1], 2 ** ((max(sizes) + 1) // 2)), rows.device):
                p, counted = torch.sigmoid(rows[tile]), counts[tile, None]
                for group, size, log_share, summed in zip(groups, sizes, log_shares, sums, strict=True):
                    cut = group.start + size // 2
                    low, high = joint(p[:, group.start : cut]), joint(p[:, cut : group.stop])
                    table = log_share.view(high.shape[1], low.shape[1])
                    along = (high @ table) * low
                    value = along.sum(1, keepdim=True)
                    total += torch.where(counted, value, 0.0).sum() / n
                    keep = counted & finite
                    summed += (torch.where(keep, high, 0.0).t() @ torch.where(keep, low, 0.0)).flatten()
                    if gradient is not None:
                        across = (low @ table.t()) * high
                        mean = torch.cat([along @ _digits(along), across @ _digits(across)], 1)
                        gradient[tile, group] = torch.where(counted, mean - p[:, group] * value, 0.0) / n
        ctx.save_for_backward(gradient)
        ctx.shape = logits.shape
        ctx.mark_non_differentiable(*sums)
        return total, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        back = None if gradient is None else (gradient * grads[0]).view(ctx.shape)
        return back, *[None] * (len(ctx.needs_input_grad) - 1)


def _digits(codes: Tensor) -> Tensor:
    """(..., 2^b) to (2^b, b): the bits of each code, the lowest first, in that dtype."""
    code = torch.arange(codes.shape[-1], device=codes.device)
    bits = codes.shape[-1].bit_length() - 1
    return ((code[:, None] >> torch.arange(bits, device=codes.device)) & 1).to(codes.dtype)
