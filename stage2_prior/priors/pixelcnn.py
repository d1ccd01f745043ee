"""Gated PixelCNN over one two-dimensional level of codes, with causal attention where asked for (PixelSNAIL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn

from intarsia.config import Added, ConfigError
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec
from stage2_prior.causal_attention import CausalAttention, Memory
from stage2_prior.context import Context, ContextEncoder, embedding
from stage2_prior.gated_conv import Buffers, GatedLayer, shift_down, shift_right
from stage2_prior.heads import Logits
from stage2_prior.packed import Projection, packed
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

    attention: Added[Annotated[int, Field(ge=0)]] = 0
    """Blocks of attention to all positions before, spread evenly among the layers; at most depth. 0 is a plain PixelCNN."""
    heads: Added[Annotated[int, Field(ge=1)]] = 4
    """Attention heads, where there is attention; a divisor of width."""

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
        known: (B or 1, R, C, D), what is known of each position.
        weight: (S, D), what makes of it what all blocks are told, S features in all; ``parts`` are their sizes, first the layers'.
        whole: (B, 1, S), what they are told of the sample as a whole; None for a prior without conditions.
        buffers, memories: of each gated layer and of each attention.
        row: (B, C, D), the embedded codes of the row before; those of this row take their places step by step.
        head: the two products of the last layers, the second one packed.
    """

    known: Tensor
    weight: Tensor
    whole: Tensor | None
    parts: list[int]
    buffers: list[Buffers]
    memories: list[Memory]
    row: Tensor
    head: tuple[Projection, Projection]


@PRIORS.register("pixelcnn", PixelCNNConfig)
class PixelCNNPrior(AutoregressivePrior):
    """Label, position and upper codes enter every gate and every attention. ``step`` computes each activation once: the
    vertical stack once for each row, the horizontal one, keys and values once for each position."""

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec)
        if len(self.own) != 1 or len(self.own[0].shape) != 2:
            shapes = ", ".join(str(level.shape) for level in self.own)
            raise ConfigError([f"prior.levels: a pixelcnn prior models one two-dimensional level; {config.levels or 'all'!r} has {shapes}"])
        width, depth, blocks, vocab = config.width, config.depth, config.attention, self.own[0].vocab
        if blocks > depth:
            raise ConfigError([f"prior.attention: {blocks} blocks among prior.depth, {depth} layers; expected at most one after each"])
        if blocks and width % config.heads:
            raise ConfigError([f"prior.width: {width} is no multiple of prior.heads, {config.heads}"])
        classes = len(spec.classes) if self.conditional else 0
        self.context = ContextEncoder(self.layout, self.upper, width, classes, self.has_null)
        self.codes = embedding(vocab, width, 0.5)
        self.layers = nn.ModuleList(GatedLayer(width, config.kernel, depth**-0.5, last=i == depth - 1) for i in range(depth))
        self.attention = nn.ModuleList(CausalAttention(width, config.heads, depth**-0.5) for _ in range(blocks))
        self.after = {(i + 1) * depth // blocks - 1: i for i in range(blocks)}  # layer -> the attention that follows it
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), Logits(2 * width, vocab, bias=True))

    @property
    def stack(self) -> Sequence[GatedLayer]:
        return cast(Sequence[GatedLayer], self.layers)

    @property
    def attentions(self) -> Sequence[CausalAttention]:
        return cast(Sequence[CausalAttention], self.attention)

    def _known(self, context: Context) -> Tensor:
        """(B or 1, R, C, D): what is known of each position."""
        rows, columns = self.own[0].shape
        return rearrange(context.aligned, "b (r c) d -> b r c d", r=rows, c=columns)

    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        rows, columns = self.own[0].shape
        context = self.context(self._corrupt_upper(upper, rng), label)
        known = self._known(context)

        def told(project: nn.Linear) -> Tensor:  # linear, so that positions and labels are projected apart
            of_all = project(known)
            return of_all if context.whole is None else of_all + project(context.whole)[:, None, None]

        embedded = self.codes(self._corrupt(own, rng)[0])
        x = rearrange(embedded, "b (r c) d -> b r c d", r=rows, c=columns)
        before = F.pad(embedded[:, :-1], (0, 0, 1, 0))
        v, h = shift_down(x), shift_right(x)
        depth = self.config.depth
        keep = self._keep(rng, 2 * depth + self.config.attention, self.config.width)
        for i, layer in enumerate(self.stack):
            v, h = layer(v, h, told(layer.context), None if keep is None else keep[:, 2 * i : 2 * i + 2])
            if i in self.after:
                j = self.after[i]
                block, kept = self.attentions[j], None if keep is None else keep[:, 2 * depth + j]
                h = block(h.flatten(1, 2), before, told(block.context).flatten(1, 2), kept).view_as(h)
        return [self.head(h.flatten(1, 2))]

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> PixelCNNState:
        rows, columns = self.own[0].shape
        context = self.context(upper, label)
        projections = [layer.context.weight for layer in self.stack] + [block.context.weight for block in self.attentions]
        weight = torch.cat(projections)
        whole = None if context.whole is None else F.linear(context.whole, weight)[:, None]
        return PixelCNNState(
            index=0,
            known=self._known(context),
            weight=weight,
            whole=whole,
            parts=[len(p) for p in projections],
            buffers=[layer.begin(n, columns) for layer in self.stack],
            memories=[block.begin(n, rows * columns) for block in self.attentions],
            row=weight.new_zeros(n, columns, self.config.width),
            head=(cast(nn.Linear, self.head[1]), packed(cast(nn.Linear, self.head[3]))),
        )

    def _start_row(self, state: PixelCNNState, row: int) -> None:
        """The vertical stack of ``row``, and what the context tells each block there."""
        told = F.linear(state.known[:, row], state.weight)
        parts = (told if state.whole is None else told + state.whole).split(state.parts, -1)
        v = state.row
        for layer, buffers, part in zip(self.stack, state.buffers, parts[: len(self.stack)], strict=True):
            v = layer.start_row(buffers, v, part)
        for memory, part in zip(state.memories, parts[len(self.stack) :], strict=True):
            memory.told = part.unbind(1)

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, PixelCNNState]:
        assert isinstance(state, PixelCNNState)
        row, column = divmod(state.index, self.own[0].shape[1])
        if previous is None:
            before = torch.zeros_like(state.row[:, 0])
        else:
            before = self.codes(previous)
            state.row[:, column - 1] = before
        if column == 0:
            self._start_row(state, row)
        h = before if column else torch.zeros_like(before)
        for i, (layer, buffers) in enumerate(zip(self.stack, state.buffers, strict=True)):
            h = layer.step(buffers, h, column)
            if i in self.after:
                j = self.after[i]
                h = self.attentions[j].step(state.memories[j], h, before, state.index, column)
        first, last = state.head
        return last(F.silu(first(F.silu(h)))), replace(state, index=state.index + 1)
