"""From logits to codes: guidance, temperature, top-k, top-p, min-p, and a draw by the inverse of the distribution function.

Pure functions of tensors. A draw takes one uniform number for each row, so that what a row becomes is a function of its
logits and its own number alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def number(name: str, value: Any) -> float:
    """``value`` as a float. Raises ValueError naming the option for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: {value!r}; expected a finite number")
    return float(value)


SHAPES = ("linear", "cosine")
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Guidance:
    """Guidance that changes along the way, from ``start`` at a sample's first draw of a level to ``stop`` at its last: codes that are
    known are not drawn, and do not count.

    Attributes:
        shape: linear, or cosine: start + (stop - start) (1 - cos(pi u)) / 2, slow at both ends.
    """

    start: float
    stop: float
    shape: str = "linear"

    def __post_init__(self) -> None:
        number("guidance.start", self.start)
        number("guidance.stop", self.stop)
        if self.shape not in SHAPES:
            raise ValueError(f"guidance.shape: {self.shape!r}; expected {' or '.join(SHAPES)}")

    def at(self, progress: float) -> float:
        """g at ``progress`` in [0, 1]."""
        u = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.stop - self.start) * u

    def along(self, progress: Tensor) -> Tensor:
        """``at`` of each entry."""
        u = progress if self.shape == "linear" else (1 - torch.cos(math.pi * progress)) / 2
        return self.start + (self.stop - self.start) * u


SCHEDULE_WORDS = tuple(f.name for f in fields(Guidance))  # no names of levels: what {"start": 2.0} means has to be clear


@dataclass(frozen=True)
class DrawOptions:
    """How one code is drawn.

    Attributes:
        temperature: 0 or at least 1e-6; logits are divided by it; 0 takes the most probable code.
        top_k: keep the k most probable codes (and those that tie with the last of them), in [1, vocab]; None keeps all.
        top_p: keep the smallest set of most probable codes whose mass is at least this, in (0, 1] (Holtzman et al. 2020,
            nucleus sampling), after top_k; None keeps all.
        min_p: keep the codes at least this share as probable as the most probable one, in [0, 1] (Nguyen et al. 2024),
            after top_p; None keeps all.
        guidance: g of ``guide``, a number or a ``Guidance``; 1 is off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance: float | Guidance = 1.0

    def __post_init__(self) -> None:
        if number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature: {self.temperature!r}; expected a number >= 0 (0 takes the most probable code)")
        if 0 < self.temperature < LEAST_TEMPERATURE:  # logits divided by less would leave float32
            raise ValueError(f"temperature: {self.temperature!r}; expected 0, or at least {LEAST_TEMPERATURE:g}")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise ValueError(f"top_k: {self.top_k!r}; expected a whole number >= 1")
        if self.top_p is not None and not 0 < number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p: {self.top_p!r}; expected a number in (0, 1]")
        if self.min_p is not None and not 0 <= number("min_p", self.min_p) <= 1:
            raise ValueError(f"min_p: {self.min_p!r}; expected a number in [0, 1]")
        if not isinstance(self.guidance, Guidance):
            number("guidance", self.guidance)

    @property
    def guided(self) -> bool:
        """Whether the null is asked at all."""
        return isinstance(self.guidance, Guidance) or self.guidance != 1

    def guidance_at(self, progress: float) -> float:
        """g at ``progress`` in [0, 1] of the way through a level's draws."""
        return self.guidance.at(progress) if isinstance(self.guidance, Guidance) else float(self.guidance)

    def guidance_along(self, progress: Tensor) -> float | Tensor:
        """``guidance_at`` of each entry, of the shape and dtype of ``progress``; a number where it does not change."""
        return self.guidance.along(progress) if isinstance(self.guidance, Guidance) else float(self.guidance)

    def check_vocab(self, vocab: int, level: str = "codes") -> None:
        """Raises ValueError where top_k asks for more codes than ``level`` has."""
        if self.top_k is not None and self.top_k > vocab:
            raise ValueError(f"top_k: {self.top_k}; expected at most the vocabulary of level {level!r}, {vocab}")


def check_options_class(kind: Any, owner: str) -> None:
    """Raises ValueError, naming ``owner``, where its ``Options`` are no ``DrawOptions``: a pipeline checks and draws by what those have."""
    if not (isinstance(kind, type) and issubclass(kind, DrawOptions)):
        found = kind.__name__ if isinstance(kind, type) else repr(kind)
        raise ValueError(f"{owner}.Options: {found}; expected stage2_prior.sampling.DrawOptions, or a dataclass derived from it")


def open_progress(keep: Tensor) -> Tensor:
    """(B, N) float64 in [0, 1]: how far each position is on the way from a sample's first open one, where it is 0, to its last, where it
    is 1. One open position alone is a first one.

    Args:
        keep: (B, N) bool, False where a position is open, in the order in which they are drawn.
    """
    open_ = ~keep
    return ((open_.cumsum(1) - 1).double() / (open_.sum(1, keepdim=True) - 1).clamp(min=1)).clamp(0, 1)


def choose_options(kind: type[DrawOptions], given: Mapping[str, Any], who: str, levels: Sequence[str]) -> tuple[Any, ...]:
    """``kind`` with the values of ``given``, one for each of ``levels``.

    Args:
        given: option -> a value for all levels, or a mapping from names of levels to values (the default where a level is not
            named). ``guidance`` as a mapping with ``start`` and ``stop`` is a ``Guidance``.

    Raises:
        ValueError: for an option that ``kind`` does not have, with the list of those it has; for an unknown level; for a value.
    """
    known = [f.name for f in fields(kind)]
    chosen: list[dict[str, Any]] = [{} for _ in levels]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}: {who} has no such sampling option; it has {', '.join(known)}")
        if isinstance(value, Mapping) and not value:
            raise ValueError(f"{name}: {value!r}; expected a value, or values by level of {', '.join(levels)}")
        by_level = dict.fromkeys(levels, value)
        if isinstance(value, Mapping) and not (name == "guidance" and "start" in value):
            unknown = [level for level in value if level not in levels]
            if unknown:
                raise ValueError(f"{name}.{unknown[0]}: {who} has no such level; it has {', '.join(levels)}")
            by_level = dict(value)
        for options, level in zip(chosen, levels, strict=True):
            if level in by_level:
                options[name] = _schedule(by_level[level]) if name == "guidance" else by_level[level]
    return tuple(kind(**options) for options in chosen)


def _schedule(value: Any) -> Any:
    """A mapping as a ``Guidance``; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if not {"start", "stop"} <= set(value) <= set(SCHEDULE_WORDS):
        raise ValueError(f"guidance: {dict(value)!r}; expected a number, or start, stop and shape ({' or '.join(SHAPES)})")
    return Guidance(**value)


def guide(cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) in logits: null + g (cond - null); exactly cond for g = 1.

    Args:
        guidance: g, or one for each row in a tensor that broadcasts, of the logits' dtype or wider: the result keeps the logits'.
    """
    if isinstance(guidance, Tensor):
        return torch.where(guidance == 1, cond, null + (guidance * (cond - null)).to(cond.dtype))
    return cond if guidance == 1 else null + guidance * (cond - null)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) with -inf wherever a logit is below the k-th largest of its row."""
    threshold = logits.topk(int(k), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) with -inf outside the smallest set of most probable codes whose mass is at least ``p``; equal ones by index."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits.gather(-1, order), -1)
    outside = torch.zeros_like(logits, dtype=torch.bool)
    outside.scatter_(-1, order, mass.cumsum(-1) - mass >= p)
    outside.scatter_(-1, order[:, :1], False)  # however small p is
    return logits.masked_fill(outside, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) with -inf wherever a code is less than ``p`` times as probable as the most probable one."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def filtered(logits: Tensor, options: DrawOptions) -> Tensor:
    """(B, V) logits of the distribution that is drawn from: temperature (> 0), then top_k, top_p, min_p. Float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if options.temperature != 1:
        logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature  # the largest is 0: none overflows
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits


def draw(logits: Tensor, uniform: Tensor, options: DrawOptions) -> Tensor:
    """One code for each row.

    Args:
        logits: (B, V), after guidance.
        uniform: (B,) in the open interval (0, 1).

    Returns:
        (B,) int64 in [0, V): the first code at which the distribution function exceeds ``uniform``. A code of probability
        0 is never drawn, since the function does not rise there. Of a row with NaN some code comes back: it is the caller
        who looks whether all logits are finite, once for many draws.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    rising = torch.softmax(filtered(logits, options), -1).cumsum(-1)
    target = uniform.to(rising.dtype)[:, None] * rising[:, -1:]
    return torch.searchsorted(rising, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
