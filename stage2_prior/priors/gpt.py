"""GPT: a causal transformer over the codes of one or more levels, in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from intarsia.rng import StepRng
from intarsia.specs import CodesSpec
from stage2_prior.context import Context, ContextEncoder, embedding
from stage2_prior.packed import Projection, packed
from stage2_prior.priors.autoregressive import AutoregressivePrior, State
from stage2_prior.priors.base import PRIORS, PriorConfig
from stage2_prior.transformer import Cache, Rotary, Transformer, rotary_tables


class GPTConfig(PriorConfig):
    """GPT over the codes of its levels."""

    width: Annotated[int, Field(ge=1)] = 128
    """Features of the trunk; a multiple of heads."""
    depth: Annotated[int, Field(ge=1)] = 6
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each position, or rotary positions over the axes of the grid."""
    order: Literal["level", "position"] = "level"
    """Several levels: one after the other, or all levels of a position before the next (levels of one shape)."""


@dataclass
class GPTState(State):
    """What is known of all places, the keys and values so far, and the last layers, packed."""

    context: Context
    cache: Cache
    heads: list[Projection]


@PRIORS.register("gpt", GPTConfig)
class GPTPrior(AutoregressivePrior):
    """The input at place i is the code of place i - 1, plus what is known of place i; place 0 takes a learned begin and the label."""

    config: GPTConfig

    def __init__(self, config: GPTConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec, config.order)
        width = config.width
        classes = len(spec.classes) if self.conditional else 0
        self.context = ContextEncoder(self.layout, self.upper, width, classes, self.has_null, config.positions == "learned")
        self.codes = nn.ModuleList(embedding(level.vocab, width, 0.5) for level in self.own)
        self.first = nn.Parameter(0.5 * torch.randn(width))
        self.first_label = nn.Linear(width, width, bias=False) if self.conditional else None
        self.trunk = Transformer(width, config.depth, config.heads)
        self.heads = nn.ModuleList(nn.Linear(width, level.vocab, bias=False) for level in self.own)
        for head in self.heads.parameters():
            nn.init.normal_(head, std=0.02)
        if config.positions == "rotary":  # refuses heads that are too small
            rotary_tables(torch.zeros(1, len(self.own[0].shape), dtype=torch.float64, device="cpu"), width // config.heads)
        self._tables: dict[torch.device, Rotary] = {}

    @property
    def output(self) -> Sequence[nn.Linear]:
        """The last layer of each level."""
        return cast(Sequence[nn.Linear], self.heads)

    def _rotary(self, places: slice) -> Rotary | None:
        """The tables of these places, made once on each device; float32 or wider."""
        if self.config.positions == "learned":
            return None
        if self.device not in self._tables:
            cos, sin = rotary_tables(self.layout.coordinates(), self.config.width // self.config.heads)
            self._tables[self.device] = (cos.to(self.device), sin.to(self.device))
        dtype = torch.promote_types(self.dtype, torch.float32)
        cos, sin = self._tables[self.device]
        return cos[places].to(dtype), sin[places].to(dtype)

    def _first(self, context: Context) -> Tensor:
        """(B or 1, 1, D): the input of place 0."""
        first = self.first + context.aligned[:, :1]
        if self.first_label is not None and context.whole is not None:
            first = first + self.first_label(context.whole)[:, None]
        return first

    def _context(self, upper: Sequence[Tensor], label: Tensor | None) -> Context:
        """The label is told to every place, and once more to the first."""
        context = self.context(upper, label)
        if context.whole is None:
            return context
        return Context(context.aligned + context.whole[:, None], context.whole)

    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        context = self._context(upper, label)
        seen = self._corrupt(own, rng)
        x = self.layout.join([table(codes) for table, codes in zip(self.codes, seen, strict=True)])
        n = x.shape[0]
        x = torch.cat([self._first(context).expand(n, -1, -1), x[:, :-1] + context.aligned[:, 1:]], 1)
        features = self.trunk(x, self._rotary(slice(None)), keep=self._keep(rng, self.config.depth, 2, self.config.width))
        return [packed(head)(f) for head, f in zip(self.output, self.layout.split(features), strict=True)]

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> GPTState:
        return GPTState(0, self._context(upper, label), self.trunk.cache(n, len(self.layout)), [packed(head) for head in self.output])

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, GPTState]:
        assert isinstance(state, GPTState)
        i, n = state.index, state.cache.keys.shape[1]
        if previous is None:
            x = self._first(state.context).expand(n, -1, -1)
        else:
            x = self.codes[self.layout.steps[i - 1][0]](previous)[:, None] + state.context.aligned[:, i : i + 1]
        features = self.trunk.append(x, state.cache, self._rotary(slice(i, i + 1)))
        logits = state.heads[self.layout.steps[i][0]](features[:, 0])
        return logits, GPTState(i + 1, state.context, state.cache, state.heads)
