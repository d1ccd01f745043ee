"""Micro-batches: the global batch of a step, dealt to processes and parts by sample counts.

Which samples a step takes is a function of (seed, step), so that a resumed run needs no state of any loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.distributed import Comm
from intarsia.order import Order, share
from intarsia.padded import padded_batches
from intarsia.prefetch import Loader, Prefetch, Request, to_device
from intarsia.rng import StepRng
from intarsia.run_config import RunConfig


@dataclass(frozen=True)
class Part:
    """One micro-batch of one process.

    Attributes:
        batch: tensors (or lists of them, or None) on the run's device.
        weight: samples of this part / samples of the global batch * number of processes: DDP averages, this makes it a sum.
        share: samples of this part / samples of the global batch; 0 for a ghost.
        last: gradients are synchronised in the backward of this part.
        rng: the draws of this step for these samples.
    """

    batch: dict[str, Any]
    weight: float
    share: float
    last: bool
    rng: StepRng

    @property
    def ghost(self) -> bool:
        """One sample of weight 0, for a process that has none: it takes part in the collectives and changes nothing."""
        return self.share == 0


class Parts:
    """One process's parts of every step, in order of the steps."""

    def __init__(self, n: int, batch_size: int, accumulate: int, seed: int, rank: int, world_size: int) -> None:
        self.order = Order(n, batch_size, seed)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        mine = share(batch_size, rank, world_size)
        rows = mine.stop - mine.start
        parts = [share(rows, part, accumulate) for part in range(min(rows, accumulate))]
        self.slices = [slice(mine.start + p.start, mine.start + p.stop) for p in parts]
        """This rank's ranges of the global batch, contiguous over parts and ranks."""
        self._next = -1
        self._stream: Iterator[dict[str, Any]] = iter(())

    def _requests(self, step: int) -> Iterator[Request]:
        while True:
            indices, epochs = self.order.indices(step), self.order.epochs(step)
            yield from ((indices[s], epochs[s]) for s in self.slices or [slice(0, 1)])
            step += 1

    def step(self, step: int, prefetch: Prefetch, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
        """The parts of ``step``; cheap where steps come one after the other, right in any order."""
        if step != self._next:
            self._stream = prefetch.batches(self._requests(step))
        self._next = step + 1
        shares = [(s.stop - s.start) / self.order.batch_size for s in self.slices] or [0.0]
        for number, part in enumerate(shares, 1):
            batch = to_device(next(self._stream), device, dtype)
            yield Part(batch, part * self.world_size, part, number == len(shares), StepRng(self.seed, step, batch["index"]))


class Feed:
    """The data of one process of a run: parts to train on, shares to validate and initialise on, all on its device."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype, comm: Comm) -> None:
        self._config, self._device, self._dtype, self._comm = config, device, dtype, comm
        self._open: dict[int, tuple[Parts, Prefetch]] = {}

    def parts(self, loader: Loader, step: int) -> Iterator[Part]:
        """This process's parts of ``step``."""
        if id(loader) not in self._open:
            c = self._config
            parts = Parts(len(loader), c.batch_size, c.accumulate, c.seed, self._comm.rank, self._comm.world_size)
            self._open[id(loader)] = parts, self._prefetch(loader, c.workers)
        parts, prefetch = self._open[id(loader)]
        return parts.step(step, prefetch, self._device, self._dtype)

    def batches(self, loader: Loader, size: int, samples: int | None = None) -> Iterator[dict[str, Any]]:
        """This process's share of ``loader`` without augmentation, each sample on exactly one process.

        Args:
            size: rows of a batch (the last may be short). The batches are the same for any number of processes.
            samples: only the first so many.
        """
        n = len(loader) if samples is None else min(samples, len(loader))
        mine = list(padded_batches(n, size))[self._comm.rank :: self._comm.world_size]
        return self._read(loader, [(torch.arange(s.start, s.stop), None) for s in mine])

    def first_batches(self, loader: Loader, samples: int) -> Iterator[dict[str, Any]]:
        """This process's contiguous share of the first ``samples`` of training's order, for initialisation."""
        order = Order(len(loader), min(samples, len(loader)), self._config.seed)
        mine = share(order.batch_size, self._comm.rank, self._comm.world_size)
        size = max(1, self._config.batch_size // self._comm.world_size // self._config.accumulate)
        columns = (order.indices(0)[mine].split(size), order.epochs(0)[mine].split(size))
        return self._read(loader, [(i, e) for i, e in zip(*columns, strict=True) if len(i)])

    def _prefetch(self, loader: Loader, workers: int) -> Prefetch:
        return Prefetch(loader, workers, self._config.timeout, self._device.type == "cuda")

    def _read(self, loader: Loader, requests: list[Request]) -> Iterator[dict[str, Any]]:
        prefetch = self._prefetch(loader, min(1, self._config.workers))
        try:
            for batch in prefetch.batches(iter(requests)):
                yield to_device(batch, self._device, self._dtype)
        finally:
            prefetch.close()

    def close(self) -> None:
        for _, prefetch in self._open.values():
            prefetch.close()
        self._open = {}
