"""Parallel decoding (Chang et al. 2022, arXiv:2202.04200, section 3.2): all positions masked, revealed over a few steps.

A pure function of what predicts codes, what gives numbers, and the options. A sample's steps depend on its own codes and
numbers alone, its own number of unknown positions included. Shapes do not depend on values, so that no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.arguments import whole
from stage2_prior.masking import SCHEDULES, halton_order, most_revealed, remaining
from stage2_prior.sampling import DrawOptions, Guidance, draw, number

ORDERS = ("confidence", "halton", "random", "raster")
STEPS = 12
NOISE = 4.5

Scores = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens (B, N) with ``vocab`` where masked, where (B or 1, k), step) -> logits (B, k, vocab) of these positions, after guidance."""
Numbers = Callable[[str, Tensor, int], Tensor]
"""(purpose, where (B or 1, k), step) -> (B, k) numbers in (0, 1)."""


@dataclass(frozen=True)
class MaskGITOptions(DrawOptions):
    """How a level is decoded, beside how each code is drawn.

    Attributes:
        temperature: as in ``DrawOptions``; 0 takes the most probable codes, and no noise on the confidence.
        guidance: a ``Guidance`` goes from the first step to the last, which is a sample's own: it has no more steps than unknown
            positions.
        steps: forward passes, in [1, positions of the level]; None takes 12, or the number of positions where that is less.
        order: which positions a step reveals. "confidence": those whose drawn codes are most probable, after noise;
            "halton": evenly spread, the same for all samples; "random": any, drawn for each sample; "raster": row by row.
        noise: >= 0, the factor of Gumbel noise on the log-probabilities that "confidence" compares, annealed linearly to 0 at
            the last step; None takes 4.5, as the paper's code does. The other orders have no use for it, nor has temperature 0.
        schedule: how the share of masked positions falls; None takes that of training.
    """

    steps: int | None = None
    order: str = "confidence"
    noise: float | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            whole("steps", self.steps, 1)
        if self.order not in ORDERS:
            raise ValueError(f"order: {self.order!r}; expected {', '.join(ORDERS[:-1])} or {ORDERS[-1]}")
        if self.noise is not None and number("noise", self.noise) < 0:
            raise ValueError(f"noise: {self.noise!r}; expected a finite number >= 0")
        if self.noise is not None and self.order != "confidence":
            raise ValueError(f"noise: {self.noise!r}; order {self.order!r} has no use for it, only 'confidence' has")
        if self.noise and self.temperature == 0:
            raise ValueError(f"noise: {self.noise!r}; temperature {self.temperature!r} has no use for it, expected 0 or None")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: {self.schedule!r}; expected {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}")

    def check_positions(self, name: str, positions: int) -> None:
        """Raises ValueError where there are more steps than positions."""
        if self.steps is not None and self.steps > positions:
            raise ValueError(f"steps: {self.steps}; level {name!r} has {positions} positions, expected at most as many steps")

    def steps_for(self, positions: int) -> int:
        """The steps of a level of so many positions."""
        return min(STEPS, positions) if self.steps is None else self.steps

    def strength(self, step: int, own: Tensor) -> float | Tensor:
        """g of a step where samples have ``own`` (B,) steps each: (B,) float64, or a number where it does not change."""
        if not isinstance(self.guidance, Guidance):
            return float(self.guidance)
        return self.guidance.along((step / (own.double() - 1).clamp(min=1)).clamp(max=1))


def own_steps(steps: int, keep: Tensor) -> Tensor:
    """(B,) int64: the steps of each sample, one for each position outside of ``keep`` (B, N) bool, at most ``steps`` and at least 1."""
    return (keep.shape[1] - keep.sum(1)).clamp(1, steps)


@dataclass(frozen=True)
class _Plan:
    """How many positions each step reveals.

    Attributes:
        steps: how many are run; fewer than asked for where no sample has that many unknown positions.
        own: (B or 1, 1) float64 on the device: how many of these are each sample's, which the annealing counts.
        left: (steps asked for + 1, B or 1) on the device: how many are still masked after so many steps.
        most_left, most_shown: of each step, the most positions that are masked before it, and that it reveals, in any sample that
            could be: shapes decide bits, and no sample's may depend on what is known of another.
    """

    steps: int
    own: Tensor
    left: Tensor
    most_left: Sequence[int]
    most_shown: Sequence[int]


def _plan(schedule: str, steps: int, size: int, keep: Tensor | None, device: torch.device) -> _Plan:
    whole, most_shown = remaining(schedule, steps, (size,)), most_revealed(schedule, steps, size)
    most_left = whole[:, 0].tolist()
    if keep is None:
        own = torch.full((1, 1), steps, dtype=torch.float64, device=device)
        return _Plan(steps, own, whole.to(device), most_left, most_shown)
    counts, kind = (size - keep.sum(1)).cpu().unique(return_inverse=True)  # the one look at values
    run = min(steps, int(counts[-1]))  # a sample's steps beyond these reveal nothing
    left = remaining(schedule, steps, tuple(counts.tolist()))[:, kind].to(device)
    return _Plan(run, own_steps(steps, keep).double()[:, None], left, most_left, most_shown)


def _fixed_order(options: MaskGITOptions, shape: tuple[int, ...], keep: Tensor | None, numbers: Numbers, device: torch.device) -> Tensor:
    """(B or 1, N): the positions in the order in which they are revealed, those that are known last."""
    places = torch.arange(math.prod(shape), device=device)[None]
    if options.order == "random":
        order = numbers("order", places, 0).argsort(dim=1, stable=True)
    else:
        order = halton_order(shape).to(device)[None] if options.order == "halton" else places
    if keep is None:
        return order
    order = order.expand(len(keep), -1)
    return order.gather(1, keep.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))


def decode(
    scores: Scores,
    numbers: Numbers,
    shape: tuple[int, ...],
    vocab: int,
    n: int,
    options: MaskGITOptions,
    schedule: str,
    device: torch.device,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of one level for ``n`` samples.

    Args:
        scores: asked once per step, for the positions that may be revealed in it alone.
        schedule: of ``masking``, where the options do not say which.
        known: (codes, keep), each (n, N): codes are kept where the boolean keep is True, and the schedule goes over the rest.

    Returns:
        (n, N) int64 in [0, vocab), and a bool tensor (): whether all logits were finite.
    """
    size = math.prod(shape)
    keep = None if known is None else known[1]
    tokens = torch.full((n, size + 1), vocab, device=device)  # the last column takes what is not to be written
    if known is not None:
        tokens[:, :size] = torch.where(known[1], known[0], vocab)
    plan = _plan(options.schedule or schedule, options.steps_for(size), size, keep, device)
    confident = options.order == "confidence"
    order = None if confident else _fixed_order(options, shape, keep, numbers, device)
    noise = 0.0 if options.temperature == 0 else NOISE if options.noise is None else options.noise
    finite = torch.ones((), dtype=torch.bool, device=device)
    for step in range(plan.steps):
        before, after = plan.left[step][:, None], plan.left[step + 1][:, None]
        places = torch.arange(plan.most_shown[step], device=device)
        shown = places < before - after
        if order is None:
            where, live = _masked(tokens[:, :size], vocab, plan.most_left[step], before, everything=keep is None and step == 0)
        else:
            turns = (plan.left[0][:, None] - before + places).clamp(max=size - 1)
            rows = max(len(order), len(turns))
            where, live = order.expand(rows, -1).gather(1, turns.expand(rows, -1)), shown
        logits = scores(tokens[:, :size], where, step)
        finite &= torch.stack(torch.aminmax(logits)).isfinite().all()
        code = draw(logits.flatten(0, 1), numbers("code", where, step).flatten(), options).view(n, -1)
        where = where.expand(n, -1)
        if confident:
            score = _log_probability(logits, code)
            if noise > 0 and step + 1 < plan.steps:
                anneal = noise * (1 - (step + 1) / plan.own).clamp(min=0).to(score.dtype)
                score = score - anneal * torch.log(-torch.log(numbers("confidence", where, step)))
            best = score.masked_fill(~live, -math.inf).argsort(dim=1, descending=True, stable=True)[:, : len(places)]
            where, code = where.gather(1, best), code.gather(1, best)
        tokens.scatter_(1, torch.where(shown, where, size), code)
    return tokens[:, :size], finite


def _masked(tokens: Tensor, vocab: int, most: int, count: Tensor, everything: bool) -> tuple[Tensor, Tensor]:
    """(B or 1, most) the masked positions of each sample in raster order and then others, and which they are."""
    places = torch.arange(most, device=tokens.device)
    if everything:
        return places[None], places < count
    return (tokens != vocab).to(torch.uint8).argsort(dim=1, stable=True)[:, :most], places < count


def _log_probability(logits: Tensor, code: Tensor) -> Tensor:
    """(B, k) log-probabilities of the drawn codes, at temperature 1; float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.gather(2, code[..., None])[..., 0] - wide.logsumexp(2)
