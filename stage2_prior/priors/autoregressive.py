"""Priors that predict one code after the other: the chain rule, trained by teacher forcing, sampled step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.rng import StepRng, uniform
from intarsia.specs import CodesSpec, Cond
from stage2_prior.arguments import check_codes
from stage2_prior.layout import Layout
from stage2_prior.priors.base import Known, Prior, PriorConfig, Stats, bits, inference
from stage2_prior.sampling import DrawOptions, draw, guide


@dataclass
class State:
    """Where step-by-step evaluation stands. ``step`` may write into its tensors: go on with the state that it returns.

    Attributes:
        index: the step that comes next, an index into ``schedule``.
    """

    index: int


class AutoregressivePrior(Prior):
    """p(codes) = prod_i p(code_i | codes before i, upper codes, label), in the order of ``layout``.

    Attributes:
        layout: its levels as one sequence, levels counted from its own first one.
    """

    layout: Layout

    def __init__(self, config: PriorConfig, spec: CodesSpec, order: str = "level") -> None:
        super().__init__(config, spec)
        self.layout = Layout(self.own, order)

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(level, flat position) of each step, levels counted in ``spec.levels``; the order of ``nll`` too."""
        return tuple((self.levels.start + level, position) for level, position in self.layout.steps)

    # For subclasses --------------------------------------------------------------------------------------------
    def _logits(self, upper: Sequence[Tensor], own: Sequence[Tensor], label: Tensor | None, rng: StepRng | None) -> list[Tensor]:
        """Logits of every code given those before it.

        Args:
            own: (B, positions) int64 for each of its levels.
            label: (B,) with ``classes`` for the null; None for a prior without conditions.

        Returns:
            (B, positions, vocab) for each of its levels.
        """
        raise NotImplementedError

    def _begin(self, n: int, upper: Sequence[Tensor], label: Tensor | None) -> State:
        """``begin`` with checked arguments and ``label`` as in ``_logits``."""
        raise NotImplementedError

    def step(self, state: State, previous: Tensor | None) -> tuple[Tensor, State]:
        """One step of the schedule.

        Args:
            previous: (n,) int64, the codes of the step before; None at the first step.

        Returns:
            logits (n, vocab of this step's level) and the state to go on with.
        """
        raise NotImplementedError

    # The engine ------------------------------------------------------------------------------------------------
    def begin(self, n: int, upper: Sequence[Tensor] = (), cond: Cond | None = None) -> State:
        """The state before the first step, for ``n`` samples; call it and ``step`` in eval mode without gradients."""
        check_codes(upper, self.upper, n, "upper")
        return self._begin(n, [u.to(self.device) for u in upper], self._label(cond, n))

    def logits(self, codes: Sequence[Tensor], cond: Cond | None = None) -> list[Tensor]:
        """(B, positions, vocab) for each of its levels, as training sees them but without its noise."""
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

    def _arguments(self, codes: Sequence[Tensor], cond: Cond | None, check: bool) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Upper codes (B, *shape), own codes (B, positions) and labels, all on the prior's device."""
        n = len(codes[0]) if codes else 0
        check_codes(codes, self.spec.levels[: self.levels.stop], n, "codes", values=check)
        here = [c.to(self.device) for c in codes]
        return here[: self.levels.start], [c.flatten(1) for c in here[self.levels.start :]], self._label(cond, n, check=check)

    @staticmethod
    def _each_nll(logits: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """(B, positions) nats for each level; the log-softmax is in float32 or wider."""
        out = []
        for scores, codes in zip(logits, own, strict=True):
            wide = scores if scores.dtype == torch.float64 else scores.float()
            out.append(F.cross_entropy(wide.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes))
        return out

    # Sampling --------------------------------------------------------------------------------------------------
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
        """Draw (level, position) of sample i takes the number that (seed, i, level, position) names."""
        n, guided = len(ids), any(each.guided for each in options)
        levels, positions = torch.tensor(self.schedule, device=ids.device).T
        numbers = uniform(seed, "sample", ids[:, None], levels[None], positions[None], dtype=torch.promote_types(self.dtype, torch.float32))
        if guided:  # rows n.. are the same samples under the null
            assert label is not None
            upper = [torch.cat([u, u]) for u in upper]
            label = torch.cat([label, torch.full_like(label, len(self.spec.classes))])
        state = self._begin(2 * n if guided else n, upper, label)
        fixed = None if known is None else [self.layout.join([t.flatten(1) for t in part]) for part in known]
        out = torch.empty_like(numbers, dtype=torch.int64)
        finite = torch.ones((), dtype=torch.bool, device=ids.device)
        previous: Tensor | None = None
        for i, (level, position) in enumerate(self.layout.steps):
            logits, state = self.step(state, previous)
            how = options[level]
            if guided:
                progress = position / max(1, self.layout.sizes[level] - 1)
                logits = guide(logits[:n], logits[n:], how.guidance_at(progress))
            finite &= logits.isfinite().all()
            code = draw(logits, numbers[:, i], how)
            if fixed is not None:
                code = torch.where(fixed[1][:, i], fixed[0][:, i], code)
            out[:, i] = code
            previous = torch.cat([code, code]) if guided else code
        if not finite:
            raise ValueError(f"sample: the logits of this {self.type_name} prior are not finite")
        return [c.view(n, *level.shape) for c, level in zip(self.layout.split(out), self.own, strict=True)]
