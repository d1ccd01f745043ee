"""Collectives that are no-ops in one process. Whether there are several is decided at the time of each call."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes: 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _in_place(tensor: Tensor, collective: Callable[[Tensor], Any]) -> Tensor:
    if world_size() > 1:
        whole = tensor.detach().contiguous()
        collective(whole)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)
    return tensor


class Comm:
    """The collectives that quantisers and runs are given. Every rank must make the same calls in the same order.

    Tensors may be views with gaps: the backends take contiguous memory only, so that one is made and copied back.
    """

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return world_size()

    @property
    def rank(self) -> int:
        """This process among them, from 0."""
        return rank()

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` over the ranks in place and returns it."""
        return _in_place(tensor, dist.all_reduce)

    def all_reduce_min_(self, tensor: Tensor) -> Tensor:
        """The least of ``tensor`` over the ranks, element by element, in place; returns it."""
        return _in_place(tensor, lambda t: dist.all_reduce(t, dist.ReduceOp.MIN))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n_r, ...) of each rank -> (sum n_r, ...) in order of rank, on every rank; the n_r may differ, the rest of the shape may not.

        One host sync, for the n_r; no gradient flows.
        """
        if world_size() == 1:
            return rows
        counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
        counts[rank()] = rows.shape[0]
        dist.all_reduce(counts)
        sizes = counts.tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Copies ``tensor`` of rank ``src`` to every rank in place and returns it."""
        return _in_place(tensor, lambda t: dist.broadcast(t, src))

    def barrier(self) -> None:
        """Waits for every rank."""
        if world_size() > 1:
            dist.barrier()

    def long_barrier(self, seconds: float) -> Callable[[], None]:
        """A barrier to be called once, at which ranks wait for up to ``seconds`` instead of the group's timeout; all ranks make it first,
        before one of them begins what takes long."""
        if world_size() == 1:
            return lambda: None
        group = dist.new_group(timeout=timedelta(seconds=seconds), backend="gloo")  # which waits on CPUs, whatever the ranks compute on
        assert isinstance(group, dist.ProcessGroup)  # as every rank is in it

        def wait() -> None:
            dist.barrier(group)
            dist.destroy_process_group(group)

        return wait


comm = Comm()
