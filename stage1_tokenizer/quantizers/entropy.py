"""A bonus for the entropy of the mean assignment, that all codes be used alike."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from intarsia.config import Config
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

    No N x K tensor is kept: the gradient is worked out tile by tile in the forward pass.
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
        weight = rows.new_full((batch,), 1 / n) if active is None else active.to(rows.dtype) / n
        weight = weight.repeat_interleave(n // batch, output_size=n)
        bias = vectors.square().sum(1)
        score = scorer(vectors, (bias if cost is None else bias + cost).mul(-0.5), n)
        to_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        to_vectors = torch.zeros_like(vectors) if ctx.needs_input_grad[1] else None
        pull, total = rows.new_zeros(k), rows.new_zeros(())
        for tile in tiles(n, k, rows.device):
            q = torch.softmax(score(rows[tile]) * (2 / temperature), 1)
            mean = q @ log_share
            total += mean @ weight[tile]
            q *= (log_share - mean[:, None]) * (weight[tile, None] * (2 / temperature))  # the gradient of the scores
            if to_rows is not None:
                torch.mm(q, vectors, out=to_rows[tile])
            if to_vectors is not None:
                to_vectors.addmm_(q.t(), rows[tile])
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
