"""Priors that predict one code after the other: the chain rule, trained by teacher forcing, sampled step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.inference import inference
from intarsia.rng import StepRng, uniform
from intarsia.specs import CodesSpec, Cond
from stage2_prior.arguments import check_codes
from stage2_prior.digits import to_digits, weights_of
from stage2_prior.layout import Layout
from stage2_prior.priors.base import Known, Prior, PriorConfig, Stats, bits
from stage2_prior.sampling import DrawOptions, draw, guide, open_progress


@dataclass
class State:
    """Where step-by-step evaluation stands. ``step`` may write into its tensors: go on with the state that it returns.

    Attributes:
        index: the step that comes next, an index into ``draws``.
    """

    index: int


class AutoregressivePrior(Prior):
    """p(codes) = prod_i p(code_i | codes before i, upper codes, label), in the order of ``layout``.

    A code is drawn in one go, or as the digits of a mixed-radix number (``stage2_prior.digits``), each given those before it:
    logits, options and guidance are then those of a digit.

    Attributes:
        layout: its levels as one sequence, levels counted from its own first one.
        digits: for each of its levels the sizes of a code's digits, the lowest first; (vocab,) where it is drawn in one go.
    """

    layout: Layout
    digits: tuple[tuple[int, ...], ...]

    def __init__(self, config: PriorConfig, spec: CodesSpec, order: str = "level") -> None:
        super().__init__(config, spec)
        self.layout = Layout(self.own, order)
        self.digits = tuple((level.vocab,) for level in self.own)

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(level, flat position) of each code in turn, levels counted in ``spec.levels``; the order of ``nll`` too."""
        return tuple((self.levels.start + level, position) for level, position in self.layout.steps)

    @property
    def logit_widths(self) -> tuple[int, ...]:
        return tuple(sum(sizes) for sizes in self.digits)

    @cached_property
    def draws(self) -> tuple[tuple[int, int, int], ...]:
        """(level, flat position, digit) of each ``step``, levels counted from its own first one: the schedule, digit by digit."""
        return tuple((level, position, i) for level, position in self.layout.steps for i in range(len(self.digits[level])))

    # For subclasses --------------------------------------------------------------------------------------------
    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        """Logits of every code given those before it.

        Args:
            own: (B, positions) int64 for each of its levels.
            label: (B,) with ``classes`` for the null; None for a prior without conditions.

        Returns:
            (B, positions, vocab) for each of its levels; (B, positions, sum of the sizes) for one that is drawn in digits, the
            logits of each digit given the true ones before it, side by side.
        """
        raise NotImplementedError

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> State:
        """``begin`` with checked arguments and ``label`` as in ``_logits``."""
        raise NotImplementedError

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, State]:
        """One of the ``draws``.

        Args:
            previous: (n,) int64, the codes or digits of the step before; None at the first step.

        Returns:
            logits (n, size of this step's digit: the vocabulary, where codes are drawn in one go) and the state to go on with.
        """
        raise NotImplementedError

    # The engine ------------------------------------------------------------------------------------------------
    def begin(self, n: int, upper: Sequence[Tensor] = (), cond: Cond | None = None) -> State:
        """The state before the first step, for ``n`` samples; call it and ``step`` in eval mode without gradients."""
        check_codes(upper, self.upper, n, "upper")
        return self._begin(n, [u.to(self.device) for u in upper], self._label(cond, n))

    def logits(self, codes: Sequence[Tensor], cond: Cond | None = None) -> list[Tensor]:
        """(B, positions, vocab or sum of the digits' sizes) for each of its levels, as training sees them but without its noise."""
        upper, own, label = self._arguments(codes, cond, check=True)
        return self._logits(upper, own, label, None)

    def loss(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> tuple[Tensor, Stats]:
        upper, own, label = self._arguments(codes, cond, check=False)
        each = self._each_nll(self._logits(upper, own, self._drop_label(label, rng), rng), own)
        loss = self.layout.join(each).mean(1).mean()
        stats = {"bits": bits(loss.detach())}
        if len(each) > 1:
            stats |= {f"bits/{level.name}": bits(nll.detach().mean(1).mean()) for level, nll in zip(self.own, each, strict=True)}
        return loss, stats

    def nll(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> Tensor:
        with inference(self):
            upper, own, label = self._arguments(codes, cond, check=True)
            return self.layout.join(self._each_nll(self._logits(upper, own, label, None), own))

    def by_level(self, each: Tensor) -> list[Tensor]:
        lead = each.shape[:-1]
        return [level.reshape(*lead, -1) for level in self.layout.split(each.reshape(-1, each.shape[-1]))]

    def _each_nll(self, logits: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """(B, positions) nats for each level, the sum over the digits of a code; the log-softmax is in float32 or wider."""
        out = []
        for scores, codes, sizes in zip(logits, own, self.digits, strict=True):
            wide = (scores if scores.dtype == torch.float64 else scores.float()).flatten(0, 1)
            parts = zip(wide.split(sizes, 1), to_digits(codes.flatten(), sizes), strict=True)
            first, *more = (F.cross_entropy(part, digit, reduction="none") for part, digit in parts)
            out.append(sum(more, first).view_as(codes))
        return out

    # Sampling --------------------------------------------------------------------------------------------------
    def check_options(self, options: Mapping[str, Any], cond: Cond | None = None) -> tuple[Any, ...]:
        """Of codes that are drawn in digits, top_k keeps digits (all of them, of one that has no more), and may ask for no more
        than the largest has."""
        chosen = super().check_options(options, cond)
        for each, level, sizes in zip(chosen, self.own, self.digits, strict=True):
            if len(sizes) > 1 and each.top_k is not None and each.top_k > max(sizes):
                raise ValueError(
                    f"top_k: {each.top_k}; the codes of level {level.name!r} are drawn in digits of {sizes}: expected at most {max(sizes)}"
                )
        return chosen

    def _check_known(self, known: Known, n: int) -> tuple[list[Tensor], list[Tensor]]:
        codes, keep = super()._check_known(known, n)
        sequence = self.layout.join([k.flatten(1) for k in keep])
        holes = (sequence[:, 1:] & ~sequence[:, :-1]).any(1)
        if holes.any():
            raise ValueError(
                f"known: what is kept of sample {int(holes.nonzero()[0])} is no prefix of the order in which this {self.type_name} prior"
                f" draws: {', '.join(level.name for level in self.own)}, by {self.layout.order}, in raster order"
            )
        return codes, keep

    def _sample(
        self, ids: Tensor, upper: Sequence[Tensor], label: Tensor | None, seed: int, known: Known | None, options: Sequence[DrawOptions]
    ) -> list[Tensor]:
        """Draw (level, position, digit) of sample i takes the number that (seed, i, level, position, digit) names.

        What is known is gone through step by step too: at once it would be rounded otherwise, and how much of it all samples have
        depends on the micro-batch, of which no bit of a sample may be a function.
        """
        if known is not None and all(bool(keep.all()) for keep in known[1]):
            return [codes.clone() for codes in known[0]]
        n, guided = len(ids), any(each.guided for each in options)
        levels, positions, digits = torch.tensor(self.draws, device=ids.device).T
        keys = positions + digits * torch.tensor(self.layout.sizes, device=ids.device)[levels]  # digit 0 has the position's own
        kind = torch.promote_types(self.dtype, torch.float32)
        numbers = uniform(seed, "sample", ids[:, None], levels[None] + self.levels.start, keys[None], dtype=kind)
        if guided:  # rows n.. are the same samples under the null
            assert label is not None
            upper = [torch.cat([u, u]) for u in upper]
            label = torch.cat([label, torch.full_like(label, len(self.spec.classes))])
        state = self._begin(2 * n if guided else n, upper, label)
        places, weights, sizes = self._digits_of_draws(ids.device)
        strengths = self._strengths(options, known, kind) if guided else []
        if known is not None:
            codes, keep = (self.layout.join([t.flatten(1) for t in part])[:, places] for part in known)
            codes = torch.div(codes, weights, rounding_mode="floor") % sizes
        how = [[self._for_digit(each, size) for size in of] for each, of in zip(options, self.digits, strict=True)]
        out = torch.empty_like(numbers, dtype=torch.int64)
        extremes: list[Tensor] = []  # of the logits of each step, looked at once in the end
        previous: Tensor | None = None
        for i, (level, position, digit) in enumerate(self.draws):
            logits, state = self.step(state, previous)
            if guided:
                logits = guide(logits[:n], logits[n:], strengths[level][position])
            extremes += torch.aminmax(logits)
            drawn = draw(logits, numbers[:, i], how[level][digit])
            if known is not None:
                drawn = torch.where(keep[:, i], codes[:, i], drawn)
            out[:, i] = drawn
            previous = torch.cat([drawn, drawn]) if guided else drawn
        if not torch.stack(extremes).isfinite().all():
            raise ValueError(f"sample: the logits of this {self.type_name} prior are not finite")
        sequence = out.new_zeros(n, len(self.layout)).index_add_(1, places, out * weights)
        return [c.view(n, *level.shape) for c, level in zip(self.layout.split(sequence), self.own, strict=True)]

    def _strengths(self, options: Sequence[DrawOptions], known: Known | None, dtype: torch.dtype) -> list[list[float | Tensor]]:
        """g of each position of each level: a number, or (n, 1) where it has a schedule and samples have positions of their own to draw."""
        if known is None:
            sizes = zip(options, self.layout.sizes, strict=True)
            return [[each.guidance_at(i / max(1, size - 1)) for i in range(size)] for each, size in sizes]
        out = list[list[float | Tensor]]()
        for each, keep in zip(options, known[1], strict=True):
            own = each.guidance_along(open_progress(keep.flatten(1)))
            out.append(list(own.to(dtype)[:, :, None].unbind(1)) if isinstance(own, Tensor) else [own] * keep[0].numel())
        return out

    def _digits_of_draws(self, device: torch.device) -> Tensor:
        """(3, draws) int64: the place in the sequence of each draw's code, and the weight and the size of the digit that is drawn."""
        rows, place = [], -1
        for level, _, digit in self.draws:
            place += digit == 0
            rows.append((place, weights_of(self.digits[level])[digit], self.digits[level][digit]))
        return torch.tensor(rows, device=device).T

    @staticmethod
    def _for_digit(options: DrawOptions, size: int) -> DrawOptions:
        """The options for a digit that may have fewer values than ``top_k`` keeps."""
        return options if options.top_k is None or options.top_k <= size else replace(options, top_k=None)
