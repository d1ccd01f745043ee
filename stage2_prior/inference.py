"""Eval mode without autocast, for likelihoods and samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class inference:
    """Eval mode without autocast for the length of a ``with``; the mode is restored. ``module`` has parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.cast = torch.autocast(next(self.module.parameters()).device.type, enabled=False)
        self.module.eval()
        self.cast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.cast.__exit__(*error)
        self.module.train(self.was_training)
