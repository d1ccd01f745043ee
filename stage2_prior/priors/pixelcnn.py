"""Gated PixelCNN over one two-dimensional level of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn

from intarsia.config import ConfigError
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec
from stage2_prior.context import ContextEncoder, embedding
from stage2_prior.gated_conv import Buffers, GatedLayer, shift_down, shift_right
from stage2_prior.priors.autoregressive import AutoregressivePrior, State
from stage2_prior.priors.base import PRIORS, PriorConfig


class PixelCNNConfig(PriorConfig):
    """Gated PixelCNN over the codes of one two-dimensional level."""

    width: Annotated[int, Field(ge=1)] = 96
    """Features of each of the two stacks."""
    depth: Annotated[int, Field(ge=1)] = 8
    """Gated layers."""
    kernel: Annotated[int, Field(ge=3)] = 3
    """Columns that a vertical kernel sees; odd. It sees (kernel + 1) / 2 rows."""

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number")
        return value


@dataclass
class PixelCNNState(State):
    """What each activation needs that is still to come.

    Attributes:
        context: of each layer, (B or 1, R, C, features).
        buffers: of each layer.
        row: (B, C, D), the embedded codes of the row before; those of this row take their places step by step.
    """

    context: list[Tensor]
    buffers: list[Buffers]
    row: Tensor


@PRIORS.register("pixelcnn", PixelCNNConfig)
class PixelCNNPrior(AutoregressivePrior):
    """Label, position and upper codes enter every gate. ``step`` computes each activation once: the vertical stack once for
    each row, the horizontal one once for each position."""

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec)
        if len(self.own) != 1 or len(self.own[0].shape) != 2:
            shapes = ", ".join(str(level.shape) for level in self.own)
            raise ConfigError([f"prior.levels: a pixelcnn prior models one two-dimensional level; {config.levels or 'all'!r} has {shapes}"])
        width, vocab = config.width, self.own[0].vocab
        classes = len(spec.classes) if self.conditional else 0
        self.context = ContextEncoder(self.layout, self.upper, width, classes, self.has_null)
        self.codes = embedding(vocab, width, 0.5)
        depth = config.depth
        self.layers = nn.ModuleList(GatedLayer(width, config.kernel, depth**-0.5, last=i == depth - 1) for i in range(depth))
        last = nn.Linear(2 * width, vocab)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), last)

    @property
    def stack(self) -> Sequence[GatedLayer]:
        return cast(Sequence[GatedLayer], self.layers)

    def _contexts(self, upper: Sequence[Tensor], label: Tensor | None) -> list[Tensor]:
        """What each layer's gates are told, (B or 1, R, C, features). Linear, so that positions and labels are projected apart."""
        context = self.context(upper, label)
        rows, columns = self.own[0].shape
        aligned = rearrange(context.aligned, "b (r c) d -> b r c d", r=rows, c=columns)
        out = []
        for layer in self.stack:
            told = layer.context(aligned)
            out.append(told if context.whole is None else told + layer.context(context.whole)[:, None, None])
        return out

    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        rows, columns = self.own[0].shape
        x = rearrange(self.codes(self._corrupt(own, rng)[0]), "b (r c) d -> b r c d", r=rows, c=columns)
        v, h = shift_down(x), shift_right(x)
        keep = self._keep(rng, self.config.depth, 2, self.config.width)
        for i, (layer, context) in enumerate(zip(self.stack, self._contexts(upper, label), strict=True)):
            v, h = layer(v, h, context, None if keep is None else keep[:, i])
        return [self.head(h.flatten(1, 2))]

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> PixelCNNState:
        contexts = self._contexts(upper, label)
        columns = self.own[0].shape[1]
        like = self.codes.weight
        row = like.new_zeros(n, columns, self.config.width)
        return PixelCNNState(0, contexts, [layer.begin(n, columns, like) for layer in self.stack], row)

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, PixelCNNState]:
        assert isinstance(state, PixelCNNState)
        row, column = divmod(state.index, self.own[0].shape[1])
        h = torch.zeros_like(state.row[:, 0])
        if previous is not None:
            embedded = self.codes(previous)
            state.row[:, column - 1] = embedded
            h = embedded if column else h
        if column == 0:
            v = state.row[:, None]
            for layer, buffers, context in zip(self.stack, state.buffers, state.context, strict=True):
                v = layer.start_row(buffers, v, context[:, row : row + 1])
        for layer, buffers in zip(self.stack, state.buffers, strict=True):
            h = layer.step(buffers, h, column)
        return self.head(h), PixelCNNState(state.index + 1, state.context, state.buffers, state.row)
