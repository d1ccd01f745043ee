"""Restarts of dead codes from current latents, the same whatever the order of samples, micro-batches or ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.rng import StepRng, bits, uniform
from stage1_tokenizer.quantizers.equal_rows import hashes

SLOTS = 256  # the most restarts of one step
NONE = (1 << 63) - 1  # the key of a slot that no sample has filled
_RANK_BITS = 12


def empty_slots(slots: int, dim: int, like: Tensor) -> dict[str, Tensor]:
    """``slots`` slots that wait for a latent (dim,), of the dtype and device of ``like``."""
    return {
        "key": torch.full((slots,), NONE, dtype=torch.int64, device=like.device),
        "candidate": like.new_zeros((slots, dim)),
    }


def offer(pending: dict[str, Tensor], rows: Tensor, counts: Tensor, rng: StepRng) -> None:
    """Each slot keeps the latent of the sample with the smallest hash of (seed, step, slot, sample), at a random position of it.

    Args:
        pending: of ``empty_slots``; replaced in place.
        rows: (B * positions, D), finite where ``counts``.
        counts: (B,) or () bool, which samples may fill a slot.
    """
    slots, batch = pending["key"].shape[0], rng.index.shape[0]
    slot, index = torch.arange(slots, device=rows.device), rng.index.to(rows.device)
    key = bits(rng.seed, "vq/restart", index[:, None], 0, slot[None], rng.step)
    key = key & (NONE ^ ((1 << _RANK_BITS) - 1))  # non-negative; the low bits hold the rank
    best, who = torch.where(counts.view(-1, 1), key, NONE).min(0)
    cells = rows.shape[0] // batch
    place = uniform(rng.seed, "vq/restart/position", index[who], 0, slot, rng.step)
    latent = rows[who * cells + (place * cells).long()].to(pending["candidate"].dtype)
    better = best < pending["key"]
    pending["key"] = torch.where(better, best, pending["key"])
    pending["candidate"] = torch.where(better[:, None], latent, pending["candidate"])


def settle(pending: dict[str, Tensor], comm: Comm) -> None:
    """Over the ranks: a slot belongs to the rank with the least key, and is 0 on all others, so that a sum gives everyone its latent.

    One collective of fixed size.
    """
    key = pending["key"]
    mine = torch.where(key < NONE, key | comm.rank, key)
    least = comm.all_reduce_min_(mine.clone())
    won = (mine == least) & (mine < NONE)
    pending["candidate"] = torch.where(won[:, None], pending["candidate"], 0.0)
    pending["key"] = least


def _first_of_equals(latents: Tensor) -> Tensor:
    """(R, D) to (R,) bool: the rows that no earlier one equals in every bit, without a host sync."""
    mixed = hashes(latents)
    return ~(mixed[:, None] == mixed).tril(-1).any(1)


def revive(dead: Tensor, key: Tensor, candidate: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor | None, count: Tensor) -> Tensor:
    """Dead codes take vector, sum and count of a latent together, in order of the slots; no two of them the same latent.

    Without a host sync.

    Args:
        dead: (K,) bool.
        key, candidate: (R,), (R, D) the slots.
        codebook, counts, sums: (K, D), (K,), (K, D): changed in place.
        count: () the count of a fresh code.

    Returns:
        (K,) bool: the codes that were restarted.
    """
    k, slots = dead.shape[0], key.shape[0]
    slot = torch.cumsum(dead, 0) - 1
    filled = (key < NONE) & _first_of_equals(candidate)
    order = torch.argsort(~filled, stable=True)
    filled, candidate = filled[order], candidate[order]
    taken = dead & (slot < slots) & filled[slot.clamp(0, slots - 1)]
    # the code of each slot; all others point to an extra place that is cut off
    target = torch.zeros(slots + 1, dtype=torch.int64, device=dead.device)
    target = target.scatter(0, torch.where(taken, slot, slots), torch.arange(k, device=dead.device))[:slots]
    used = filled & (torch.arange(slots, device=dead.device) < dead.sum())
    fresh = torch.where(used[:, None], candidate, 0.0).to(codebook.dtype)  # a slot without a code adds 0 somewhere
    codebook.masked_fill_(taken[:, None], 0.0).index_add_(0, target, fresh)
    if sums is not None:
        sums.masked_fill_(taken[:, None], 0.0).index_add_(0, target, fresh * count)
    counts.copy_(torch.where(taken, count, counts))
    return taken
