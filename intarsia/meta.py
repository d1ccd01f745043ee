"""Modules built on the meta device: what a configuration asks for is counted before a byte of it is allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

MAX_TENSORS = 10_000  # about as many as the header of a weights file has room for


class BudgetError(ValueError):
    """The configuration asks for more than the caller allows."""


@contextmanager
def budget(max_bytes: int | None, max_tensors: int = MAX_TENSORS) -> Iterator[None]:
    """Raises BudgetError as soon as the modules built in this block, by this thread, register more than is allowed.

    It is raised from within the constructor, so that a million layers are refused after the first ones.
    """
    thread = threading.get_ident()
    total = count = 0

    def hook(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal total, count
        if not isinstance(tensor, Tensor) or threading.get_ident() != thread:
            return
        total += tensor.numel() * tensor.element_size()
        count += 1
        if max_bytes is not None and total > max_bytes:
            raise BudgetError(f"the configuration needs {total} bytes or more; max_bytes is {max_bytes}")
        if count > max_tensors:
            raise BudgetError(f"the configuration makes more than {max_tensors} tensors")

    handles = [register_module_parameter_registration_hook(hook), register_module_buffer_registration_hook(hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _NoInitialisation(TorchFunctionMode):
    """Passes over ``torch.nn.init``: there is nothing to initialise on the meta device, and a million layers would take their time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_on_meta(cls: type[Any], config: Any, spec: Any, dtype: torch.dtype = torch.float32, max_bytes: int | None = None) -> nn.Module:
    """``cls(config, spec)`` without memory: shapes and dtypes only.

    Constructors do best with ``torch.empty``, ``torch.nn.init`` and assignments: for arithmetic on the meta device, such as
    ``torch.randn(n) * 0.5``, torch imports its compiler, which takes longer than all else.

    Raises:
        BudgetError: where its parameters and buffers take more than ``max_bytes``.
        ValueError: for a size that no tensor can have.
    """
    try:
        with budget(max_bytes), torch.device("meta"), _NoInitialisation():
            module: nn.Module = cls(config, spec)
    except (TypeError, RuntimeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ValueError(f"{cls.__name__}: the configuration has a size that no tensor can have: {str(error).splitlines()[0]}") from None
    module = module.to(dtype)
    total = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    if max_bytes is not None and total > max_bytes:
        raise BudgetError(f"the configuration needs {total} bytes; max_bytes is {max_bytes}")
    return module
