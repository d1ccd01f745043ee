"""What the forward passes of one optimizer step leave for ``update``: counts, sums of latents and candidates for restarts."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers import restart

Pending = dict[str, Tensor]


def nothing(codes: int, dim: int, like: Tensor, *, sums: bool = False, slots: int = 0) -> Pending:
    """The statistics of a step before its first sample, in the dtype and on the device of ``like``.

    ``finite`` () bool; ``counts`` (K,); with ``sums`` the sums of latents (K + 1, D), whose last row stays 0; with ``slots`` those of
    ``restart``.
    """
    pending = {"finite": torch.ones((), dtype=torch.bool, device=like.device), "counts": like.new_zeros(codes)}
    if sums:
        pending["sums"] = like.new_zeros((codes + 1, dim))
    return pending | (restart.empty_slots(slots, dim, like) if slots else {})


@torch.no_grad()
def add(pending: Pending, rows: Tensor, codes: Tensor, batch: int, finite: Tensor, active: Tensor | None, rng: StepRng | None) -> None:
    """Adds a micro-batch in place; one with a NaN adds nothing but the flag, without a host sync.

    Args:
        rows: (batch * positions, D); codes: (batch * positions,).
        finite: () bool.
        active: (batch,) bool, the samples that count; None for all.
        rng: needed where there are slots.
    """
    counts = finite if active is None else finite & active
    counted = counts if active is None else counts.repeat_interleave(rows.shape[0] // batch, output_size=rows.shape[0])
    pending["finite"] &= finite
    pending["counts"].index_add_(0, codes, counted.to(pending["counts"].dtype).expand(codes.shape[0]))
    if "sums" in pending:
        sums = pending["sums"]
        sums.index_add_(0, torch.where(counted, codes, sums.shape[0] - 1), rows.to(sums.dtype))  # what does not count goes to the last
        sums[-1] = 0
    if "key" in pending:
        assert rng is not None
        restart.offer(pending, rows, counts, rng)


def reduce(pending: Pending, comm: Comm) -> Pending:
    """The statistics of all ranks: a sum of counts, sums and candidates, after the slots were settled. At most two collectives.

    The sums are (K, D) from here on.
    """
    pending = dict(pending)
    if "sums" in pending:
        pending["sums"] = pending["sums"][:-1]
    if comm.world_size == 1:
        return pending
    if "key" in pending:
        restart.settle(pending, comm)
    names = [name for name in ("counts", "sums", "candidate") if name in pending]
    flat = comm.all_reduce_sum_(torch.cat([pending[name].flatten() for name in names]))
    for name, part in zip(names, flat.split([pending[name].numel() for name in names]), strict=True):
        pending[name] = part.view_as(pending[name])
    return pending


def usage(counts: Tensor) -> dict[str, Tensor]:
    """The perplexity of the assignments of a step, exp(-sum p ln p), and the share of codes used in it."""
    share = counts / counts.sum().clamp_min(1)
    return {
        "perplexity": torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
        "batch_usage": (counts > 0).to(counts.dtype).mean(),
    }
