"""What the transformer priors share: places with vectors, a begin, the label, tables of codes and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from intarsia.specs import CodesSpec
from stage2_prior.context import Context, ContextEncoder
from stage2_prior.digits import CodeTable, DigitTable, HeadKind, code_table, sizes_of
from stage2_prior.heads import DigitHead, Drawer, FullHead, code_head
from stage2_prior.layout import Layout
from stage2_prior.priors.autoregressive import AutoregressivePrior, State
from stage2_prior.priors.base import PriorConfig
from stage2_prior.transformer import Rotary, rotary_tables


class SequenceConfig(PriorConfig):
    """Base of the configurations of transformer priors."""

    width: Annotated[int, Field(ge=1)] = 128
    """Features of the trunk; a multiple of heads."""
    depth: Annotated[int, Field(ge=1)] = 6
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each position, or rotary positions over the axes of the grid."""
    label: Literal["added", "prefix"] = "added"
    """The label is told to every place, or stands before the first code alone, as a token that begins the sequence."""
    head: HeadKind = "auto"
    """One softmax over the vocabulary, or the code's digits one after the other ("factorised", for levels with factors: FSQ, LFQ);
    auto: factorised above 16384 codes."""


@dataclass
class SequenceState(State):
    """What sampling goes on from.

    Attributes:
        rows: how many samples.
        context: what is known of all places.
        heads: of each level, its weights packed.
        embedded: (rows, D), the vector of the code before, as far as its digits are drawn.
        carried: (rows, D), what the head took from the digit before.
    """

    rows: int
    context: Context
    heads: Sequence[Drawer]
    embedded: Tensor | None = None
    carried: Tensor | None = None


class SequencePrior(AutoregressivePrior):
    """Base class. The trunk runs over ``places``; the input of a place is what was drawn at the one before, plus what is known of
    this one; the first place has a learned begin instead, or the label."""

    config: SequenceConfig

    def __init__(self, config: SequenceConfig, spec: CodesSpec, order: str) -> None:
        super().__init__(config, spec, order)
        width = config.width
        classes = len(spec.classes) if self.conditional else 0
        self.digits = tuple(sizes_of(level, config.head) for level in self.own)
        self.places = self._places()
        self.context = ContextEncoder(self.places, self.upper, width, classes, self.has_null, config.positions == "learned")
        self.codes = nn.ModuleList(code_table(sizes, width, 0.5) for sizes in self.digits)
        self.prefix = self.conditional and config.label == "prefix"
        self.first = None if self.prefix else nn.Parameter(nn.init.normal_(torch.empty(width), std=0.5))
        self.first_label = nn.Linear(width, width, bias=False) if self.conditional and not self.prefix else None
        self.heads = nn.ModuleList(code_head(sizes, width) for sizes in self.digits)
        if config.positions == "rotary":  # refuses heads that are too small
            rotary_tables(torch.zeros(1, len(self.own[0].shape), dtype=torch.float64, device="cpu"), width // config.heads)
        self._tables: dict[torch.device, Rotary] = {}

    def _places(self) -> Layout:
        """The places that the trunk runs over."""
        return self.layout

    @property
    def tables(self) -> Sequence[CodeTable | DigitTable]:
        """The vectors of each level's codes."""
        return cast(Sequence[CodeTable | DigitTable], self.codes)

    @property
    def output(self) -> Sequence[FullHead | DigitHead]:
        """The head of each level."""
        return cast(Sequence[FullHead | DigitHead], self.heads)

    def _rotary(self, places: slice) -> Rotary | None:
        """The tables of these places, made once on each device; float32 or wider."""
        if self.config.positions == "learned":
            return None
        if self.device not in self._tables:
            with torch.inference_mode(False):  # training may come later, and saves them for its gradients
                cos, sin = rotary_tables(self.places.coordinates(), self.config.width // self.config.heads)
                self._tables[self.device] = (cos.to(self.device), sin.to(self.device))
        dtype = torch.promote_types(self.dtype, torch.float32)
        cos, sin = self._tables[self.device]
        return cos[places].to(dtype), sin[places].to(dtype)

    def _first(self, context: Context) -> Tensor:
        """(B or 1, 1, D): the input of place 0."""
        if self.first is None:
            assert context.whole is not None
            return context.aligned[:, :1] + context.whole[:, None]
        first = self.first + context.aligned[:, :1]
        if self.first_label is not None and context.whole is not None:
            first = first + self.first_label(context.whole)[:, None]
        return first

    def _context(self, upper: Sequence[Tensor], label: Tensor | None) -> Context:
        """What is known of each place. The label is told to every one (and once more to the first), or to the first alone."""
        context = self.context(upper, label)
        if context.whole is None or self.prefix:
            return context
        return Context(context.aligned + context.whole[:, None], context.whole)

    def _drawers(self) -> list[Drawer]:
        return [head.drawer() for head in self.output]

    def _embed(self, state: SequenceState, previous: Tensor | None) -> Tensor | None:
        """(rows, D): ``state.embedded`` with the digit that was drawn last."""
        if previous is None:
            return None
        level, _, digit = self.draws[state.index - 1]
        part = self.tables[level].part(digit, previous)
        return part if digit == 0 or state.embedded is None else state.embedded + part
