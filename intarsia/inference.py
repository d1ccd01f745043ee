"""The state in which codes, signals, likelihoods and samples are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

_WHOLE = "ieee"  # torch's word for float32 that is not shortened to TF32 or bfloat16 within a product


def module_device(module: nn.Module) -> torch.device:
    """Where its first parameter is, or its first buffer where it has none; the CPU for a module without either."""
    return next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def module_dtype(module: nn.Module) -> torch.dtype:
    """That of its first floating-point parameter, or buffer where it has none; float32 for a module without either."""
    return next((t.dtype for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()), torch.float32)


class inference:
    """Eval mode without autocast for the length of a ``with``, in ``exact_arithmetic``. All of it is restored."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        device = module_device(self.module).type
        self.was_training = self.module.training
        self.settings = ExitStack()
        self.settings.enter_context(torch.autocast(device, enabled=False))
        self.settings.enter_context(exact_arithmetic(device))
        self.module.eval()

    def __exit__(self, *error: Any) -> None:
        self.settings.close()
        self.module.train(self.was_training)


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """``whole_float32`` for the length of a ``with``; on "cuda" by deterministic kernels that no measurement chooses, so that bits
    depend neither on what trained before nor on a caller's settings."""
    kernels = [(torch.backends.cudnn, "benchmark", False), (torch.backends.cudnn, "deterministic", True)]
    with whole_float32(), _set(kernels if device == "cuda" else []):
        yield


@contextmanager
def whole_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32 for the length of a ``with``, on all devices, whatever
    ``torch.set_float32_matmul_precision`` and the like have allowed: on a CPU that knows bfloat16, too. Nothing where torch compiles."""
    if torch.compiler.is_compiling():
        yield
        return
    backends = torch.backends
    units: list[Any] = [backends.cuda.matmul, backends.cudnn.conv]  # type: ignore[attr-defined]
    units += [getattr(backends.mkldnn, name) for name in ("matmul", "conv") if hasattr(backends.mkldnn, name)]
    with _set([(unit, "fp32_precision", _WHOLE) for unit in units]):
        yield


@contextmanager
def _set(wanted: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes (of what, name, value) for the length of a ``with``."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
