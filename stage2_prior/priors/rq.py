"""RQ-Transformer (Lee et al. 2022): one transformer over positions, a small one over the residual depths of a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from intarsia.rng import StepRng
from intarsia.specs import CodesSpec
from stage2_prior.layout import Layout
from stage2_prior.priors.autoregressive import State
from stage2_prior.priors.base import PRIORS
from stage2_prior.priors.sequence import SequenceConfig, SequencePrior, SequenceState
from stage2_prior.transformer import Cache, Transformer


class RQConfig(SequenceConfig):
    """RQ-Transformer over levels of one shape: residual depths, or the groups of a product quantiser."""

    inner: Annotated[int, Field(ge=1)] = 2
    """Blocks of the transformer over the depths of a position; ``depth`` are those of the one over positions."""


@dataclass
class RQState(SequenceState):
    """With the keys and values of both transformers.

    Attributes:
        cache: of the positions so far.
        inner: of the depths of this position so far; emptied at each position.
        position: (rows, D), the sum of this position's depths so far.
    """

    cache: Cache = field(kw_only=True)
    inner: Cache = field(kw_only=True)
    position: Tensor | None = None


@PRIORS.register("rq", RQConfig)
class RQPrior(SequencePrior):
    """All depths of a position before the next. The spatial transformer costs what one level costs, whatever the number of depths.

    Position t sees u_t = sum_d e_d(code of t - 1) plus what is known of t, and becomes h_t. Depth d of it sees
    v_0 = p_0 + h_t, v_d = p_d + sum_{j<d} e_j(code_j) (sec. 3.2.2 of the paper), with a table e_d for each depth.
    """

    config: RQConfig

    def __init__(self, config: RQConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec, "position")
        self.trunk = Transformer(config.width, config.depth, config.heads)
        self.depths = nn.Parameter(nn.init.normal_(torch.empty(len(self.own), config.width), std=0.1))
        self.inner = Transformer(config.width, config.inner, config.heads)

    def _places(self) -> Layout:
        return Layout(self.own[:1])

    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        context, config = self._context(self._corrupt_upper(upper, rng), label), self.config
        embedded = [table(codes) for table, codes in zip(self.tables, self._corrupt(own, rng), strict=True)]
        so_far = torch.stack(embedded, 2).cumsum(2)  # (B, P, depths, D)
        n, positions = so_far.shape[:2]
        keep = self._keep(rng, config.depth + config.inner, 2, config.width)
        outer, inner = (None, None) if keep is None else keep.split([config.depth, config.inner], 1)
        u = torch.cat([self._first(context).expand(n, -1, -1), so_far[:, :-1, -1] + context.aligned[:, 1:]], 1)
        h = self.trunk(u, self._rotary(slice(None)), keep=outer)
        v = torch.cat([h[:, :, None], so_far[:, :, :-1]], 2) + self.depths
        inner = None if inner is None else inner.repeat_interleave(positions, 0)
        features = rearrange(self.inner(rearrange(v, "b p l d -> (b p) l d"), keep=inner), "(b p) l d -> b p l d", p=positions)
        return [head.logits(f, codes) for head, f, codes in zip(self.output, features.unbind(2), own, strict=True)]

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> RQState:
        caches = self.trunk.cache(n, len(self.places)), self.inner.cache(n, len(self.own))
        return RQState(0, n, self._context(upper, label), self._drawers(), cache=caches[0], inner=caches[1])

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, RQState]:
        assert isinstance(state, RQState)
        level, place, digit = self.draws[state.index]
        embedded, carried, position = self._embed(state, previous), state.carried, state.position
        if digit == 0:
            if embedded is not None:
                position = embedded if position is None else position + embedded
            if level:
                assert position is not None
                v = position[:, None]
            else:
                if position is None:
                    u = self._first(state.context).expand(state.rows, -1, -1)
                else:
                    u = position[:, None] + state.context.aligned[:, place : place + 1]
                v, position = self.trunk.append(u, state.cache, self._rotary(slice(place, place + 1))), None
                state.inner.length = 0
            carried = self.inner.append(v + self.depths[level], state.inner)[:, 0]
        assert carried is not None
        logits, carried = state.heads[level](digit, carried, previous if digit else None)
        return logits, replace(state, index=state.index + 1, embedded=embedded, carried=carried, position=position)
