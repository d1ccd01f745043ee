"""A card that is not there: tensors which say "cuda", compute on the processor, and refuse to be mixed with the processor's.

For code that should run on any device: what it makes on the wrong one, or reads from a card past ``cpu()``, is an error here as it would
be there. To C++ the tensors are of the meta device. So what C++ makes from numbers on its own has no data, and is made in Python
instead (``Card``); in backward passes that cannot be done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}  # of any device


class OnCard(Tensor):
    """A tensor on the card; ``inner`` holds its data."""

    inner: Tensor
    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        out: OnCard = Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)
        out.inner = inner
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is _ATEN.copy_.default:  # from any device to any other
            off(args[0]).copy_(off(args[1]))
            return args[0]
        stray = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, OnCard) and t.ndim > 0]
        if stray and func not in _INDEXED:
            shapes = ", ".join(str(tuple(t.shape)) for t in stray)
            raise RuntimeError(f"{func}: tensors on the card and, of shape {shapes}, on the processor")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(off, args), **tree_map(off, kwargs))
        if device is not None and torch.device(device).type == "cpu":
            return out
        out = tree_map(on, out)
        return out if func is _ATEN._to_copy.default else return_and_correct_aliasing(func, args, kwargs, out)


def on(value: Any) -> Any:
    """A tensor, moved to the card; anything else as it is."""
    return OnCard(value) if isinstance(value, Tensor) and not isinstance(value, OnCard) else value


def off(value: Any) -> Any:
    """Its data on the processor; anything else as it is."""
    return value.inner if isinstance(value, OnCard) else value


def moved(module: nn.Module) -> nn.Module:
    """``module`` itself, with its parameters and buffers on the card."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(on(weight.detach().clone()), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on(buffer.detach().clone())
    return module


class Card(TorchFunctionMode):
    """While it is entered, tensors can be made on the card and moved to it."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cuda") and not isinstance(args[0], nn.Module):
            given = (*args[1:], *kwargs.values())
            if name == "cuda" or any(_is_card(value) for value in given):
                dtypes = [v if isinstance(v, torch.dtype) else v.dtype for v in given if isinstance(v, torch.dtype | Tensor)]
                return on(args[0].to(*dtypes) if dtypes else args[0])
        if name == "where" and len(args) == 3:
            dtype = next((t.dtype for t in args[1:] if isinstance(t, Tensor)), None)
            args = (args[0], *(t if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype) for t in args[1:]))
        if name == "__setitem__" and isinstance(args[0], OnCard) and not isinstance(args[2], Tensor) and isinstance(args[1], int | slice):
            args[0][args[1]].fill_(args[2])
            return None
        if name == "scaled_dot_product_attention" and isinstance(args[0], OnCard):
            return _attention(*args, **kwargs)
        if _is_card(kwargs.get("device")) and not any(isinstance(t, OnCard) for t in tree_leaves(args)):
            return tree_map(on, func(*args, **(kwargs | {"device": "cpu"})))
        return func(*args, **kwargs)


def _is_card(value: Any) -> bool:
    if isinstance(value, torch.device | str):
        return torch.device(value).type == "cuda"
    return isinstance(value, OnCard)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = on(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()) if is_causal else attn_mask
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v
