"""The state in which codes, signals, likelihoods and samples are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


class inference:
    """Eval mode without autocast for the length of a ``with``; on CUDA convolutions without TF32, by deterministic kernels that no
    measurement chooses, so that bits depend neither on what trained before nor on a caller's settings. All of it is restored.

    ``module`` has parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        device = next(self.module.parameters()).device.type
        self.was_training = self.module.training
        self.settings = [torch.autocast(device, enabled=False), exact_convolutions(device)]
        self.module.eval()
        for setting in self.settings:
            setting.__enter__()

    def __exit__(self, *error: Any) -> None:
        for setting in reversed(self.settings):
            setting.__exit__(*error)
        self.module.train(self.was_training)


def exact_convolutions(device: str) -> AbstractContextManager[Any]:
    """cuDNN's deterministic kernels in whole float32, for the length of a ``with``; nothing elsewhere than on "cuda"."""
    if device != "cuda":
        return nullcontext()
    flags: Any = torch.backends.cudnn.flags
    found: AbstractContextManager[Any] = flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    return found
