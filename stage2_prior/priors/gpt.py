"""GPT: a causal transformer over the codes of one or more levels, in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec
from stage2_prior.digits import CodeTable
from stage2_prior.heads import FullHead
from stage2_prior.llama import LlamaCache, LlamaTrunk, causal_lm, from_llama, to_llama
from stage2_prior.priors.autoregressive import State
from stage2_prior.priors.base import PRIORS
from stage2_prior.priors.sequence import SequenceConfig, SequencePrior, SequenceState
from stage2_prior.transformer import Cache, Transformer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class GPTConfig(SequenceConfig):
    """GPT over the codes of its levels."""

    order: Literal["level", "position"] = "level"
    """Several levels: one after the other, or all levels of a position before the next (levels of one shape)."""
    trunk: Literal["own", "llama"] = "own"
    """Our blocks, or those of transformers' LlamaModel; the same function with the same weights. Llama's have no dropout."""


@dataclass
class GPTState(SequenceState):
    """With the keys and values so far."""

    cache: Cache | LlamaCache = field(kw_only=True)


@PRIORS.register("gpt", GPTConfig)
class GPTPrior(SequencePrior):
    """The input at place i is the code of place i - 1, plus what is known of place i (see ``SequencePrior`` for place 0)."""

    config: GPTConfig
    trunk: Any  # a Transformer, or a LlamaTrunk with the same three methods

    def __init__(self, config: GPTConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec, config.order)
        if config.trunk == "llama" and config.dropout:
            raise ConfigError([f"prior.dropout: {config.dropout}; the blocks of trunk 'llama' have none, expected 0"])
        trunk = LlamaTrunk if config.trunk == "llama" else Transformer
        self.trunk = trunk(config.width, config.depth, config.heads)

    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        context = self._context(self._corrupt_upper(upper, rng), label)
        seen = self._corrupt(own, rng)
        x = self.layout.join([table(codes) for table, codes in zip(self.tables, seen, strict=True)])
        n = x.shape[0]
        x = torch.cat([self._first(context).expand(n, -1, -1), x[:, :-1] + context.aligned[:, 1:]], 1)
        features = self.trunk(x, self._rotary(slice(None)), keep=self._keep(rng, self.config.depth, 2, self.config.width))
        return [head.logits(f, codes) for head, f, codes in zip(self.output, self.layout.split(features), own, strict=True)]

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> GPTState:
        cache = self.trunk.cache(n, len(self.layout))
        return GPTState(0, n, self._context(upper, label), self._drawers(), cache=cache)

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, GPTState]:
        assert isinstance(state, GPTState)
        level, _, digit = self.draws[state.index]
        embedded, carried = self._embed(state, previous), state.carried
        if digit == 0:
            place = state.cache.length
            if embedded is None:
                x = self._first(state.context).expand(state.rows, -1, -1)
            else:
                x = embedded[:, None] + state.context.aligned[:, place : place + 1]
            carried = self.trunk.append(x, state.cache, self._rotary(slice(place, place + 1)))[:, 0]
        assert carried is not None
        logits, carried = state.heads[level](digit, carried, previous if digit else None)
        return logits, replace(state, index=state.index + 1, embedded=embedded, carried=carried)

    # Other people's formats ------------------------------------------------------------------------------------
    def with_trunk(self, trunk: Literal["own", "llama"]) -> GPTPrior:
        """The same prior, with the same weights, on the other trunk; itself where that is its own. ConfigError for dropout on a Llama."""
        if trunk == self.config.trunk:
            return self
        other = type(self)(self.config.replace(trunk=trunk), self.spec).to(self.device, self.dtype).train(self.training)
        change = to_llama if trunk == "llama" else from_llama
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("trunk.")}
        other.load_state_dict(state | {f"trunk.{name}": tensor for name, tensor in change(self.trunk.state_dict()).items()})
        return other

    def to_transformers(self) -> LlamaForCausalLM:
        """A ``transformers.LlamaForCausalLM`` with equal logits, in eval mode, with copies of the weights.

        Tokens 0..vocab-1 are the codes, vocab + i the label i, the last one the null label, or the begin of a prior without
        conditions. A sequence is one such token, then the codes in raster order; the logits after i codes are those of code i.
        ``generate`` is set up to draw one sample at temperature 1 and never to draw a label.

        Raises:
            ValueError: naming the first setting that a Llama cannot represent, and why.
        """
        for wrong, why in self._beyond_llama():
            if wrong:
                raise ValueError(f"to_transformers: {why}")
        place = self.context.places[0].detach()[0]
        table, head = self.tables[0], self.output[0]
        assert isinstance(table, CodeTable) and isinstance(head, FullHead)
        others = self.context.label.weight if self.first is None and self.context.label is not None else self.first
        assert others is not None
        tokens = torch.cat([table.weight, others.view(-1, self.config.width)]).detach() + place
        start = len(tokens) - 1 if self.has_null or not self.conditional else None
        trunk, last, config = self.trunk.state_dict(), head.weight.detach(), self.config
        trunk = trunk if config.trunk == "llama" else to_llama(trunk)
        return causal_lm(trunk, config.depth, config.heads, table=tokens, head=last, length=len(self.layout), begin=start)

    def _beyond_llama(self) -> list[tuple[bool, str]]:
        config, axes = self.config, len(self.own[0].shape)
        names = ", ".join(level.name for level in self.own)
        return [
            (len(self.own) != 1, f"prior.levels: a Llama has one table of tokens, this prior has the levels {names}"),
            (bool(self.upper), "prior.levels: a Llama is told nothing beside its sequence, this prior has levels above"),
            (config.positions != "rotary", f"prior.positions: {config.positions!r}; a Llama has only 'rotary'"),
            (axes != 1, f"prior.positions: rotary over {axes} axes; a Llama counts along 1"),
            (self.conditional and not self.prefix, f"prior.label: {config.label!r}; a Llama takes the label as a token, 'prefix'"),
            (len(self.digits[0]) > 1, f"prior.head: codes in digits of {self.digits[0]}; a Llama has one softmax"),
        ]
