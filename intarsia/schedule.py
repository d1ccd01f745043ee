"""The learning rate as a function of the step: nothing to save, and growing ``steps`` re-reads it from the current step."""

from __future__ import annotations

import math

from intarsia.run_config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int, peak: float | None = None) -> float:
    """The rate of optimizer step ``step`` (0-based) of ``steps``, at most ``peak``, or ``optim.lr``.

    Linear warm-up over the first ``warmup`` steps, then constant, or half a cosine to 0 (Loshchilov and Hutter 2017,
    equation 5, with one period and a minimum of 0).
    """
    peak = optim.lr if peak is None else peak
    if step < optim.warmup:
        return peak * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return peak
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
