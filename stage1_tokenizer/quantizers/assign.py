"""From codes to latents: gather, commitment and codebook terms and the gradient estimator in one autograd function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Estimator = Literal["straight_through", "rotation"]
_LEAST = 1e-6  # lengths below this have no direction


def assign(
    rows: Tensor,
    vectors: Tensor,
    codes: Tensor,
    batch: int,
    beta: float,
    learns: bool,
    active: Tensor | None = None,
    estimator: Estimator = "straight_through",
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of codes and the terms of van den Oord et al. (2017), eq. 3.

    Args:
        rows: (N, D) z_e; N = batch * positions, sample after sample.
        vectors: (K, D).
        codes: (N,) int64.
        batch: B, the number of samples.
        beta: weight of the commitment |z_e - sg[e]|^2, on the encoder only.
        learns: the codebook term |sg[z_e] - e|^2, with its gradient to ``vectors``, is part of the loss. So the loss is the same whether
            gradients are on or off.
        active: (B,) bool, the samples that add to the loss; None for all.
        estimator: what the gradient g of z_q becomes for z_e. straight_through: g. rotation: (lambda R)^T g, see ``rotated_back``.

    Returns:
        z_q (N, D), bit-equal to the codes' vectors; the loss (), a mean over all N positions and D dimensions; the squared error ()
        of all samples, a mean likewise, without gradient.
    """
    return _Assign.apply(rows, vectors, codes, batch, beta, learns, active, estimator)  # type: ignore[no-any-return]


def rotated_back(grad: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024, arXiv:2410.06424, eq. 4): (lambda R)^T g, row by row.

    lambda = |e| / |z|, and R is the rotation in the plane of z and e that takes z to e's direction. As reflections, with unit
    vectors u = z/|z|, v = e/|e| and r = (u + v) / |u + v|: R = I - 2 r r^T + 2 v u^T, so that R^T g = g - 2 r (r.g) + 2 u (v.g).
    lambda and R are constants to the gradient. Where z or e is 0 or they are opposite, R is not defined: g passes as it is.
    """
    length, target = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (z, e))
    u, v = z / length.clamp_min(_LEAST), e / target.clamp_min(_LEAST)
    r = u + v
    middle = torch.linalg.vector_norm(r, dim=1, keepdim=True)
    r = r / middle.clamp_min(_LEAST)
    along_r, along_v = (r * grad).sum(1, keepdim=True), (v * grad).sum(1, keepdim=True)
    turned = (grad - 2 * r * along_r + 2 * u * along_v) * (target / length.clamp_min(_LEAST))
    return torch.where((length > _LEAST) & (target > _LEAST) & (middle > _LEAST), turned, grad)


class _Assign(torch.autograd.Function):
    """Keeps z_e - e (N, D), with the rotation z_e and e too; nothing of size N x K."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        vectors: Tensor,
        codes: Tensor,
        batch: int,
        beta: float,
        learns: bool,
        active: Tensor | None,
        estimator: Estimator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = vectors.index_select(0, codes)
        error = rows - chosen
        squared = torch.linalg.vector_norm(error.view(batch, -1), dim=1).square() / error.numel()
        counted = squared if active is None else torch.where(active, squared, 0.0)
        ctx.beta, ctx.learns, ctx.batch, ctx.turns = beta, learns, batch, estimator == "rotation"
        ctx.save_for_backward(error, codes, active, *((rows, chosen) if ctx.turns else (None, None)))
        ctx.codes = vectors.shape[0]
        loss, total = (beta + learns) * counted.sum(), squared.sum()
        ctx.mark_non_differentiable(total)
        return chosen, loss, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        error, codes, active, rows, chosen = ctx.saved_tensors
        grad, scale = grads[0], grads[1] * (2.0 / error.numel())
        if active is not None:
            error = torch.where(active.view(-1, 1), error.view(ctx.batch, -1), 0.0).view_as(error)
        to_rows = to_vectors = None
        if ctx.needs_input_grad[0]:
            back = rotated_back(grad, rows, chosen) if ctx.turns else grad
            to_rows = torch.addcmul(back, error, scale * ctx.beta)
        if ctx.learns and ctx.needs_input_grad[1]:
            to_vectors = error.new_zeros((ctx.codes, error.shape[1])).index_add_(0, codes, error).mul_(-scale)
        return to_rows, to_vectors, None, None, None, None, None, None
