"""Linear layers whose weights are laid out for the processor's kernels, where no gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this dtype; its operators are those that torch's own compiler calls."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packed(linear: nn.Linear) -> Projection:
    """``linear`` with its weights as they are now, packed, up to rounding; ``linear`` itself where that cannot be.

    A product with a packed matrix takes a half to two thirds of the time on a CPU, with few rows and with many. There is no
    gradient through it, so that with gradients on, as under autocast, on other devices and in float64, the layer itself comes
    back.
    """
    return packed_matrix(linear.weight, linear.bias) or linear


def packed_matrix(weight: Tensor, bias: Tensor | None = None) -> Projection | None:
    """x to x weight^T + bias with a packed (out, in) matrix; None where ``packed`` would give the layer itself."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or weight.device.type != "cpu" or not _packs(weight.dtype):
        return None
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, laid_out, bias, "none", [], "")
