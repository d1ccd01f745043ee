"""Comparisons that raise Violation and say by how much."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.conformance.report import Violation


def require(holds: bool, message: str) -> None:
    """Raises Violation with ``message`` where a promise does not hold."""
    if not holds:
        raise Violation(message)


def equal(a: Tensor, b: Tensor, what: str) -> None:
    """The same shape and the same values, bit by bit but for the sign of zero."""
    require(a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    if not torch.equal(a, b.to(a.dtype)):
        require(False, f"{what}: {int((a != b).sum())} of {a.numel()} values differ, the largest by {_distance(a, b):.3g}")


def close(a: Tensor, b: Tensor, what: str, tolerance: float) -> None:
    """|a - b| <= tolerance (1 + max |b|)."""
    require(a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    distance = _distance(a, b)
    bound = tolerance * (1 + float(b.detach().double().abs().max())) if b.numel() else 0.0
    require(distance <= bound, f"{what}: differs by {distance:.3g} (at most {bound:.3g} is allowed)")


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str, tolerance: float = 0.0) -> None:
    """Two states with the same names and, within ``tolerance``, values."""
    require(a.keys() == b.keys(), f"{what}: the states hold {sorted(a.keys() ^ b.keys())} on one side only")
    for name in a:
        if tolerance and a[name].is_floating_point():
            close(a[name], b[name], f"{what}: {name}", tolerance)
        else:
            equal(a[name], b[name], f"{what}: {name}")


def gradients_of(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """"the gradient of NAME" -> the gradient of ``loss`` () to each tensor, zero where it does not reach one."""
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True) if loss.requires_grad else [None] * len(tensors)
    pairs = zip(tensors.items(), found, strict=True)
    return {f"the gradient of {name}": torch.zeros_like(tensor) if grad is None else grad.detach() for (name, tensor), grad in pairs}


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    distance = float((a.detach().double() - b.detach().double()).abs().max())
    return distance if distance == distance else float("inf")  # NaN is as far as can be
