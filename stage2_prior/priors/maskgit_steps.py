"""What the steps of MaskGIT's sampling have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stage2_prior.attention import attend
from stage2_prior.decoding import MaskGITOptions, Scores, own_steps
from stage2_prior.packed import packed
from stage2_prior.sampling import guide
from stage2_prior.transformer import Rotary, Transformer, swiglu

if TYPE_CHECKING:
    from stage2_prior.priors.maskgit import MaskGITPrior


class Predictor:
    """Predicts the codes of one micro-batch: weights packed once, and what places are told, with and without the label.

    Args:
        label: (n,) with ``classes`` for the null; None for a prior without conditions.
        guided: whether the null is asked too.
    """

    def __init__(self, prior: MaskGITPrior, n: int, upper: Sequence[Tensor], label: Tensor | None, guided: bool) -> None:
        self.prior, self.n, self.label = prior, n, label
        self.trunk = frozen(prior.trunk)
        self.heads = [packed(head) for head in prior.output]
        self.told = prior._context(upper, label)
        self.null: Tensor | None = None
        if guided:
            assert label is not None
            self.null = prior._context(upper, torch.full_like(label, len(prior.spec.classes)))

    def scores(self, drawn: Sequence[Tensor], how: MaskGITOptions, shared: bool, keep: Tensor | None = None) -> Scores:
        """The logits of the level after those that are drawn.

        Args:
            shared: whether the first step sees nothing but masks and the label, so that one look at each label is enough.
            keep: (n, N) bool, the positions that are known: a sample with fewer others than steps has fewer steps.
        """
        level, n = len(drawn), self.n
        size, table, head = self.prior.layout.sizes[level], self.prior.tables[level], self.heads[level]
        above = [known(codes) for known, codes in zip(self.prior.tables, drawn, strict=False)]
        length = size + sum(x.shape[1] for x in above)
        rotary, steps = self.prior._rotary(length), how.steps_for(size)
        first = self._first(how.guided) if shared else None
        own = None if keep is None else own_steps(steps, keep)

        def score(tokens: Tensor, where: Tensor, step: int) -> Tensor:
            guidance = how.guidance_at(step / max(1, steps - 1))
            if first is not None and step == 0:
                return first(where, guidance)
            x = torch.cat([*above, table(tokens)], 1)
            told = [self.told] if self.null is None or not how.guided else [self.told, self.null]
            asked = (where.repeat(len(told), 1) if len(where) > 1 else where) + (length - size)
            logits = head(self.trunk(torch.cat([x + each[:, :length] for each in told]), rotary, asked))
            if len(told) == 1:
                return logits
            each = guidance if own is None else how.strength(step, own)
            each = each[:, None, None].to(logits.dtype) if isinstance(each, Tensor) else each
            return guide(logits[:n], logits[n:], each)

        return score

    def _first(self, guided: bool) -> Callable[[Tensor, float], Tensor] | None:
        """(where, guidance) -> logits of the first step of the first level, all masks, from one row for each label that there is
        and one for the null: the same rows whatever the labels are. None where that is no fewer rows."""
        prior, label = self.prior, self.label
        kinds = 1 if label is None else len(prior.spec.classes) + prior.has_null
        if kinds >= self.n * (1 + guided):
            return None
        size, head = prior.layout.sizes[0], self.heads[0]
        told = prior._context((), None if label is None else torch.arange(kinds, device=label.device))[:, :size]
        seen = self.trunk(prior.tables[0].weight[-1] + told, prior._rotary(size))
        of = torch.zeros(self.n, dtype=torch.int64, device=seen.device) if label is None else label

        def first(where: Tensor, guidance: float) -> Tensor:
            if len(where) == 1:
                logits = head(at(seen, where))
                return guide(logits, logits[-1:], guidance)[of]
            logits = head(at(seen[of], where))
            return guide(logits, head(at(seen[-1:].expand(self.n, -1, -1), where)), guidance) if guidance != 1 else logits

        return first


def at(x: Tensor, where: Tensor) -> Tensor:
    """(B, ..., N, D) to (B, ..., k, D): some positions, ``where`` (B, k), or (1, k) for the same of all rows."""
    if len(where) == 1:
        return x[..., where[0], :]
    index = where.view(len(where), *[1] * (x.ndim - 3), -1, 1)
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


class Features(Protocol):
    """x (B, N, D) to (B, k, D), the features of the positions ``where``, (B or 1, k); to those of all, (B, N, D), for None."""

    def __call__(self, x: Tensor, rotary: Rotary | None, where: Tensor | None = None) -> Tensor: ...


def frozen(trunk: Transformer) -> Features:
    """``trunk`` with its weights as they are now, packed once for many calls; without gradients. Of positions that are not
    asked for, the last block computes keys and values alone."""
    layers = [(block, block.projections()) for block in trunk.stack]

    def run(x: Tensor, rotary: Rotary | None, where: Tensor | None = None) -> Tensor:
        for i, (block, (project, out, gate_up, down)) in enumerate(layers):
            q, k, v = block.attention.split(project(block.attention_norm(x)), rotary)
            if where is not None and i == len(layers) - 1:
                q, x = at(q, where), at(x, where)
            x = x + out(attend(q, k, v, causal=False).transpose(1, 2).flatten(2))
            x = x + swiglu(block.feed_forward_norm(x), gate_up, down)
        return trunk.norm(x)

    return run
