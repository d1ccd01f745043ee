"""Checks of dead codes and of two ranks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import stage1_tokenizer.quantizers.conformance.steps  # noqa: F401  its checks stand before these
from intarsia.distributed import Comm, comm
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.quantizers.conformance.compare import close, gradients_of, require, same_state
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.ranks import in_processes, in_threads
from stage1_tokenizer.quantizers.conformance.report import Skipped
from stage1_tokenizer.quantizers.conformance.subject import SAMPLES, Subject, restarts, rng, state
from stage1_tokenizer.quantizers.conformance.traits import rows_of

SHARES = ((0, 7), (7, 12))


@conformance("forward_is_pure")
def restart_raises_usage(s: Subject) -> str | None:
    """Where the latents leave the codebook behind, restarts bring usage from a few codes to at least half."""
    if not s.traits.restart:
        raise Skipped("it restarts no codes")
    q = s.fresh()
    before, after, step = s.usage(q, s.far(60)), 0.0, 0
    if before > 0.5:
        raise Skipped(f"distant latents already use {before:.0%} of the codes")
    while (after < 0.5 or after <= before) and step < s.most_steps:
        s.step(q, s.far(60 + step), step)
        step += 1
        after = s.usage(q, s.far(60)) if step % 10 == 0 else after
    require(after >= 0.5 and after > before, f"usage {after:.0%} after {step} steps, {before:.0%} before")
    return f"{before:.0%} to {after:.0%} in {step} steps"


@conformance("restart_raises_usage")
def restart_is_whole(s: Subject) -> str | None:
    """A restart sets vector, sum and count: the code stays, with what is assigned to it there or nothing. No two are equal."""
    if not s.traits.restart:
        raise Skipped("it restarts no codes")
    q = s.fresh()
    if len(q.level_specs("name", (1,))) > 1:
        raise Skipped("it has several maps; its parts are checked as themselves")
    for step in range(s.most_steps):
        before = s.table(q)
        codes, _ = _train_step(s, q, s.far(60 + step), step)
        placed, numbers = s.table(q), torch.arange(len(before))
        moved = ((placed - before).norm(dim=1) > 1e-3) & ~torch.isin(numbers, codes)
        if moved.any():
            break
    else:
        raise Skipped(f"no code was restarted in {s.most_steps} steps")
    latents = rows_of(s.far(60 + step)) if s.traits.project_code is None else s.traits.project_code(rows_of(s.far(60 + step)))
    different, possible = len(placed[moved].unique(dim=0)), min(int(moved.sum()), len(latents.unique(dim=0)))
    require(different >= possible, f"{int(moved.sum())} codes restarted in a step at {different} different places")
    later = copy.deepcopy(q)
    codes, again = _train_step(s, later, placed[codes.min()].expand(s.rows, -1), step + 1)
    if not again:  # with a short memory, codes without a latent are dead in the next step, and restart with it
        still = moved & ~torch.isin(numbers, codes)
        close(s.table(later)[still], placed[still], "restarted codes one step later, nothing assigned to them", 1e-4)
    there = numbers[moved][torch.arange(s.rows) % int(moved.sum())]
    codes, _ = _train_step(s, q, placed[there], step + 1)
    still = torch.isin(numbers, codes[codes == there]) & ~torch.isin(numbers, codes[codes != there])
    close(s.table(q)[still], placed[still], "restarted codes one step later, latents there assigned to them", 1e-4)
    return None


def _train_step(s: Subject, q: Quantizer, z: Tensor, step: int) -> tuple[Tensor, float | None]:
    """A step over (12, D, *grid) or rows (N, D) for them: the codes (N,); how many restarted, None where it does not say."""
    z = z if z.ndim > 2 else z.reshape(SAMPLES, *s.grid, -1).movedim(-1, 1).contiguous()
    codes = q(z, rng(step, SAMPLES)).codes[0].flatten()
    return codes, restarts(q.update(rng(step, 1), comm))


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
    while steps < s.most_steps:
        q(s.batch(70 + steps, torch.float64) + 40.0, rng(steps, SAMPLES))
        stats = q.update(rng(steps, 1), comm)
        steps += 1
        moved = restarts(stats)
        if moved is None:
            raise Skipped("its update reports no restarts")
        if moved > 0:
            break
    else:
        raise Skipped(f"no code was restarted in {steps} steps")
    alone, first, second = _two_ranks(s, steps + 1, 40.0)
    same_state(first, second, "rank 0 against rank 1")
    same_state(first, alone, "two ranks against one process", 1e-9)
    return f"the first in step {steps}"
