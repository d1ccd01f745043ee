"""Two ranks for the kit: threads that exchange tensors by hand, or real processes that gloo joins."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from intarsia.distributed import Comm, comm
from stage1_tokenizer.quantizers.conformance.report import Violation

T = TypeVar("T")
TIMEOUT = 20.0
"""Seconds that a rank waits for another before it counts as hung."""


class _Exchange:
    """What the ranks have put on the table in their current collective."""

    def __init__(self, world_size: int) -> None:
        self.slots: list[tuple[str, Tensor] | None] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT)


class ThreadComm(Comm):
    """One of several ranks that are threads of this process; adds in order of rank, so that every rank has the same bits."""

    def __init__(self, exchange: _Exchange, rank: int) -> None:
        self._exchange, self._rank = exchange, rank

    @property
    def world_size(self) -> int:
        return len(self._exchange.slots)

    @property
    def rank(self) -> int:
        return self._rank

    def _all(self, kind: str, tensor: Tensor) -> list[Tensor]:
        """What all ranks give to this collective. Raises Violation where they call different ones, or one calls none."""
        self._exchange.slots[self._rank] = (kind, tensor.detach().clone())
        try:
            self._exchange.barrier.wait()
            given = [slot for slot in self._exchange.slots if slot is not None]
            self._exchange.barrier.wait()
        except threading.BrokenBarrierError:
            raise Violation(f"rank {self._rank} waits in {kind}, which the other rank does not call") from None
        if len({(what, t.dtype, t.shape[1:] if what == "gather_rows" else t.shape) for what, t in given}) > 1:
            raise Violation(f"the ranks call different collectives: {', '.join(f'{what} {tuple(t.shape)}' for what, t in given)}")
        return [t for _, t in given]

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        first, *rest = self._all("all_reduce_sum_", tensor)
        for part in rest:
            first = first + part
        tensor.detach().copy_(first)
        return tensor

    def all_reduce_min_(self, tensor: Tensor) -> Tensor:
        tensor.detach().copy_(torch.stack(self._all("all_reduce_min_", tensor)).amin(0))
        return tensor

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self._all("gather_rows", rows))

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        tensor.detach().copy_(self._all("broadcast_", tensor)[src])
        return tensor

    def barrier(self) -> None:
        self._all("barrier", torch.zeros(()))


def in_threads(work: Callable[[Comm], T], world_size: int = 2) -> list[T]:
    """``work(comm)`` on each rank; the results in order of rank. Raises what the first rank that failed raised."""
    exchange = _Exchange(world_size)
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}

    def run(rank: int) -> None:
        try:
            here = ThreadComm(exchange, rank)
            results[rank] = work(here)
            here._all("nothing more", torch.zeros(()))  # a rank that ends too early is noticed, not waited for
        except Exception as error:  # raised again in the caller's thread
            errors[rank] = error
            exchange.barrier.abort()


    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [error for error in errors.values() if not isinstance(error, Violation)] or list(errors.values())
    if causes:
        raise causes[0]
    return [results[rank] for rank in range(world_size)]


def in_processes(work: Callable[[Comm], dict[str, Tensor]], world_size: int = 2) -> list[dict[str, Tensor]]:
    """The same in forked processes over gloo. Raises Violation with the traceback of a rank that failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [_fork(work, rank, world_size, folder) for rank in range(world_size)]
        for child in children:
            os.waitpid(child, 0)
        failures = [path.read_text() for path in sorted(folder.glob("*.failed"))]
        if failures:
            raise Violation("; ".join(failures))
        return [load_file(folder / f"{rank}.safetensors") for rank in range(world_size)]


def _fork(work: Callable[[Comm], dict[str, Tensor]], rank: int, world_size: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=TIMEOUT), world_size, rank)
        save_file(work(comm), folder / f"{rank}.safetensors")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}: {traceback.format_exc(limit=-1)}")
    finally:
        os._exit(0)
