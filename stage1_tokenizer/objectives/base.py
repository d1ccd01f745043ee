"""The objective interface: what a tokenizer is trained for, and what only training needs (critics, perceptual nets)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from intarsia.config import Config
from intarsia.registry import Registry
from intarsia.rng import StepRng
from stage1_tokenizer.tokenizers.base import TokenizerOutput

OBJECTIVES: Registry[Objective] = Registry("objective", "stage1_tokenizer.objectives")


class ObjectiveConfig(Config, registry=OBJECTIVES):
    """Base of the objectives' configurations."""


class Objective(nn.Module):
    """Base class: ``__init__(config)``. Its state lives in checkpoints only, never in a release."""

    type_name: ClassVar[str]

    def tokenizer_loss(self, out: TokenizerOutput, x: Tensor, step: int, rng: StepRng) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the tokenizer, mean over samples, and scalars to log.

        It has to reach every parameter of the tokenizer, which training checks after the first backward: through ``out.x``, through
        ``out.loss`` (the quantiser's own terms), and through ``out.prefixes``, the reconstructions from leading levels alone, whose
        decoders learn from nothing else. ``Reconstruction`` weighs these by ``prefix_weight``.

        Args:
            out: what ``tokenizer.forward`` gave for ``x``.
            x: (B, C, *axes) in [-1, 1].
            step: 0-based.
            rng: the draws of this step for these samples.
        """
        raise NotImplementedError

    def critic_loss(self, out: TokenizerOutput, x: Tensor, step: int, rng: StepRng) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """The loss of the critic, where there is one. Not called yet: training refuses an objective with parameters to train."""
        return None
