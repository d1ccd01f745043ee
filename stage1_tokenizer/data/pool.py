"""Threads that decode, with a time limit on progress.

PIL decodes and resizes outside the interpreter lock, so that threads scale, need no copies between processes and die with
the process. A worker that does not come back is named with the sample that it holds.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from stage1_tokenizer.data.errors import DataError

T = TypeVar("T")


class Pool:
    """Worker threads, started at the first use (also after a fork) and shared by all callers.

    Args:
        workers: number of threads; 0 = one per core, at most 8.
        timeout: seconds without any finished task after which ``map`` gives up; positive.
    """

    def __init__(self, workers: int = 0, timeout: float = 120.0) -> None:
        if workers < 0:
            raise ValueError(f"workers: {workers} must not be negative")
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout} must be positive; there is no unlimited wait")
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.timeout = timeout
        self._lock = threading.Lock()
        self._crew: _Crew | None = None

    def map(self, fn: Callable[[int], T], items: Sequence[int], name: Callable[[int], str] = str) -> list[T]:
        """``[fn(item) for item in items]``, in order. Not to be called from within ``fn``.

        Raises:
            the exception of the first item, in order, that failed;
            DataError: where nothing was finished for ``timeout`` seconds; it names a worker and ``name(item)``.
        """
        crew = self._hire()
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        tasks = [_Task(fn, item, done) for item in items]
        for task in tasks:
            crew.tasks.put(task)
        for _ in tasks:
            try:
                done.get(timeout=self.timeout)
            except queue.Empty:
                message = self._stuck(crew, tasks, name)
                raise DataError(message) from None
        for task in tasks:
            if task.error is not None:
                raise task.error
        return [task.result for task in tasks]

    def _hire(self) -> _Crew:
        with self._lock:
            if self._crew is None or self._crew.pid != os.getpid():
                self._crew = _Crew(self.workers)
            return self._crew

    def _stuck(self, crew: _Crew, tasks: list[_Task], name: Callable[[int], str]) -> str:
        for task in tasks:
            task.cancelled = True
        with self._lock:
            if self._crew is crew:
                self._crew = None  # the next call hires fresh workers
                crew.dismiss()
        held = [(since, number, task) for number, (task, since) in list(crew.holds.items())]
        if not held:
            return f"data: no sample was decoded in {self.timeout:g} s, and no worker holds one; see data.timeout"
        since, number, task = min(held, key=lambda h: h[0])
        what = name(task.item) if task in tasks else "a sample of another batch"
        return f"data: worker {number} has held {what} for {time.monotonic() - since:.0f} s; data.timeout is {self.timeout:g} s"


class _Task:
    __slots__ = ("cancelled", "done", "error", "fn", "item", "result")

    def __init__(self, fn: Callable[[int], Any], item: int, done: queue.SimpleQueue[None]) -> None:
        self.fn, self.item, self.done = fn, item, done
        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled = False


class _Crew:
    """The threads of one process. ``holds``: what each worker is at, and since when."""

    def __init__(self, workers: int) -> None:
        self.pid = os.getpid()
        self.workers = workers
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.holds: dict[int, tuple[_Task, float]] = {}
        for number in range(workers):
            threading.Thread(target=self._work, args=(number,), name=f"decode-{number}", daemon=True).start()

    def dismiss(self) -> None:
        """Each worker leaves when it comes to the end of the queue."""
        for _ in range(self.workers):
            self.tasks.put(None)

    def _work(self, number: int) -> None:
        while (task := self.tasks.get()) is not None:
            if task.cancelled:
                continue
            self.holds[number] = (task, time.monotonic())
            try:
                task.result = task.fn(task.item)
            except BaseException as error:  # handed to the caller, who raises it
                task.error = error
            del self.holds[number]
            task.done.put(None)
