"""Batches prepared ahead by threads. A batch is a function of (indices, epochs): the number of workers cannot change it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from intarsia.cli import RunError

Request = tuple[Tensor, Tensor | None]
"""(indices, epochs)"""


class Loader(Protocol):
    """What training reads from: a map-style source of whole batches.

    One with an attribute ``in_memory`` that is True only looks its batches up: no thread prepares them ahead. On a CPU a
    second thread's tensor operations would bring a second pool of OpenMP threads, which compete with those of training.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, epochs: Tensor | None = None) -> dict[str, Any]:
        """The samples ``indices`` (n,) int64 with ``index`` among the keys; augmented where ``epochs`` (n,) is given."""


def to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors, lists and dictionaries of them to ``device``; floating-point ones to ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if isinstance(value, list | tuple):
        return [to_device(v, device, dtype) for v in value]
    if isinstance(value, dict):
        return {k: to_device(v, device, dtype) for k, v in value.items()}
    return value


def pinned(value: Any) -> Any:
    """Tensors, lists and dictionaries of them in pinned memory, from where a copy to CUDA waits for nothing."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, list | tuple):
        return [pinned(v) for v in value]
    return {k: pinned(v) for k, v in value.items()} if isinstance(value, dict) else value


class Prefetch:
    """Runs ``loader.batch`` in threads, a few batches ahead, in order. They are daemons: one that hangs cannot keep the process alive."""

    def __init__(self, loader: Loader, workers: int, timeout: float, pin: bool) -> None:
        self.loader, self.timeout, self.pin = loader, timeout, pin
        self._closed = False
        workers = 0 if getattr(loader, "in_memory", False) else workers
        self._jobs: SimpleQueue[tuple[Future[dict[str, Any]], Request] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"batches-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, request = job
            if not self._closed and future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._make(request))
                except BaseException as error:  # it is raised again where the batch is waited for
                    future.set_exception(error)

    def _make(self, request: Request) -> dict[str, Any]:
        batch = self.loader.batch(*request)
        return pinned(batch) if self.pin else batch

    def batches(self, requests: Iterator[Request]) -> Iterator[dict[str, Any]]:
        """One batch for each (indices, epochs), in their order.

        Raises:
            RunError: where a batch takes longer than the timeout.
        """
        if not self._threads:
            yield from (self._make(request) for request in requests)
            return
        waiting: deque[tuple[Request, Future[dict[str, Any]]]] = deque()
        try:
            for request in requests:
                future: Future[dict[str, Any]] = Future()
                waiting.append((request, future))
                self._jobs.put((future, request))
                if len(waiting) > len(self._threads) + 1:
                    yield self._wait(*waiting.popleft())
            while waiting:
                yield self._wait(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()

    def _wait(self, request: Request, future: Future[dict[str, Any]]) -> dict[str, Any]:
        try:
            return future.result(self.timeout)
        except FutureTimeout:
            if future.done():
                raise  # the batch itself raised it
            first, last = int(request[0][0]), int(request[0][-1])
            raise RunError(f"data: no batch after {self.timeout:g} s (samples {first} to {last}); see timeout") from None

    def close(self) -> None:
        """Ends the threads after the batch that each is at."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(1.0)
