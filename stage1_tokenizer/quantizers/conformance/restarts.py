"""Checks of dead codes and of two ranks."""

from __future__ import annotations

import torch
from torch import Tensor

import stage1_tokenizer.quantizers.conformance.steps  # noqa: F401  its checks stand before these
from intarsia.distributed import Comm, comm
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.quantizers.conformance.compare import close, gradients_of, require, same_state
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.ranks import in_processes, in_threads
from stage1_tokenizer.quantizers.conformance.report import Skipped
from stage1_tokenizer.quantizers.conformance.subject import SAMPLES, Subject, rng, state

MOST_STEPS = 600  # where moving averages of 0.99 or less let codes die
SHARES = ((0, 7), (7, 12))


def most_steps(s: Subject) -> int:
    """How long restarts may take: counts that hardly move say late that a code is dead."""
    return max(MOST_STEPS, min(20000, round(6 / (1 - s.traits.ema)))) if s.traits.ema is not None else MOST_STEPS


@conformance("forward_is_pure")
def restart_raises_usage(s: Subject) -> str | None:
    """Where the latents leave the codebook behind, restarts bring usage from a few codes to at least half."""
    if not s.traits.restart:
        raise Skipped("it restarts no codes")
    q = s.fresh()
    before, after, step = s.usage(q, s.far(60)), 0.0, 0
    if before > 0.5:
        raise Skipped(f"distant latents already use {before:.0%} of the codes")
    while (after < 0.5 or after <= before) and step < most_steps(s):
        s.step(q, s.far(60 + step), step)
        step += 1
        after = s.usage(q, s.far(60)) if step % 10 == 0 else after
    require(after >= 0.5 and after > before, f"usage {after:.0%} after {step} steps, {before:.0%} before")
    return f"{before:.0%} to {after:.0%} in {step} steps"


@conformance("restart_raises_usage")
def restart_is_whole(s: Subject) -> str | None:
    """A restart sets vector, sum and count together: the code stays where it was put while nothing is assigned to it."""
    if not s.traits.restart:
        raise Skipped("it restarts no codes")
    q = s.fresh()
    if len(q.level_specs("name", (1,))) > 1:
        raise Skipped("it has several maps; its parts are checked as themselves")
    for step in range(most_steps(s)):
        before = s.table(q)
        assigned = torch.zeros(len(before), dtype=torch.bool)
        for out in s.step(q, s.far(60 + step), step):
            assigned[out.codes[0].flatten()] = True
        placed = s.table(q)
        moved = ((placed - before).norm(dim=1) > 1e-3) & ~assigned
        if moved.any():
            break
    else:
        raise Skipped(f"no code was restarted in {most_steps(s)} steps")
    only = int(assigned.nonzero()[0])
    z = placed[only].view(1, -1, 1).expand(SAMPLES, -1, *s.grid).contiguous()
    used = torch.zeros_like(assigned)
    for out in s.step(q, z, step + 1):
        used[out.codes[0].flatten()] = True
    still = moved & ~used
    close(s.table(q)[still], placed[still], "restarted codes one step later, nothing assigned to them", 1e-4)
    return None


def _far_steps(s: Subject, q: Quantizer, c: Comm, first: int, last: int, steps: int, at: float) -> dict[str, Tensor]:
    """The state after some steps over the samples first ... last - 1 of each batch, one rank's share, and the last step's gradients of
    the parameters, summed over the ranks."""
    gradients = gradients_of(torch.zeros(()), dict(q.named_parameters()))
    for step in range(steps):
        z = (s.batch(70 + step, torch.float64) + at)[first:last]
        if len(z):
            out = q(z, rng(step, last - first, first))
            loss = (out.loss + out.z.square().mean()) * (len(z) / SAMPLES)
            gradients = gradients_of(loss, dict(q.named_parameters()))
        q.update(rng(step, 1), c)
    return state(q) | {name: c.all_reduce_sum_(gradient) for name, gradient in gradients.items()}


def _two_ranks(s: Subject, steps: int, at: float, shares: tuple[tuple[int, int], ...] = SHARES) -> tuple[dict[str, Tensor], ...]:
    """(one process, rank 0, rank 1) after the same steps."""
    alone = _far_steps(s, s.fresh(torch.float64), comm, 0, SAMPLES, steps, at)
    copies = [s.fresh(torch.float64) for _ in shares]

    def work(c: Comm) -> dict[str, Tensor]:
        return _far_steps(s, copies[c.rank], c, *shares[c.rank], steps, at)

    first, second = in_processes(work) if s.processes else in_threads(work)
    return alone, first, second


@conformance("accumulation")
def two_ranks(s: Subject) -> str | None:
    """Two ranks with 7 and 5 samples, and with 12 and none, hold the same bits, and those of one process within 1e-10."""
    if not s.traits.ranks:
        raise Skipped("it is not known to share its codebook between processes")
    for shares in (SHARES, ((0, SAMPLES), (SAMPLES, SAMPLES))) if s.traits.idle else (SHARES,):
        alone, first, second = _two_ranks(s, 3, 0.0, shares)
        same_state(first, second, "rank 0 against rank 1")
        same_state(first, alone, "two ranks against one process", 1e-10)
    return "real processes" if s.processes else "two threads stand for the ranks"


@conformance("two_ranks", "restart_raises_usage")
def two_ranks_restart(s: Subject) -> str | None:
    """Dead codes restart at the same latents on every rank, those that one process chooses."""
    if not s.traits.restart:
        raise Skipped("it restarts no codes")
    q, steps = s.fresh(torch.float64), 0
    while steps < most_steps(s):
        q(s.batch(70 + steps, torch.float64) + 40.0, rng(steps, SAMPLES))
        stats = q.update(rng(steps, 1), comm)
        steps += 1
        restarts = [float(value) for name, value in stats.items() if name.split("/")[0] == "restarts"]
        if not restarts:
            raise Skipped("its update reports no restarts")
        if sum(restarts) > 0:
            break
    else:
        raise Skipped(f"no code was restarted in {steps} steps")
    alone, first, second = _two_ranks(s, steps + 1, 40.0)
    same_state(first, second, "rank 0 against rank 1")
    same_state(first, alone, "two ranks against one process", 1e-9)
    return f"the first in step {steps}"
