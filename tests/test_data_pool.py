"""The decode pool: order, errors, time limits and forks."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from stage1_tokenizer.data.errors import DataError
from stage1_tokenizer.data.pool import Pool


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.01 if i == 0 else 0)
        return i * i

    assert Pool(workers).map(slow_at_first, range(50)) == [i * i for i in range(50)]
    assert Pool(workers).map(slow_at_first, []) == []


def test_the_first_error_in_order_is_raised_and_the_pool_goes_on() -> None:
    pool = Pool(3)

    def odd_ones_fail(i: int) -> int:
        if i % 2:
            time.sleep(0.01 if i == 1 else 0)
            raise DataError(f"sample {i}")
        return i

    for _ in range(3):
        with pytest.raises(DataError, match="^sample 1$"):
            pool.map(odd_ones_fail, range(10))
    assert pool.map(odd_ones_fail, [0, 2]) == [0, 2]


def test_a_worker_that_hangs_is_named_with_its_sample_and_later_calls_work() -> None:
    pool, release = Pool(2, timeout=0.3), threading.Event()

    def hang_at_7(i: int) -> int:
        if i == 7:
            release.wait(30)
        return i

    with pytest.raises(DataError, match=r"worker \d has held file-7 for \d+ s; data.timeout is 0.3 s"):
        pool.map(hang_at_7, range(20), "file-{}".format)
    assert pool.map(hang_at_7, range(5)) == list(range(5))
    release.set()


def test_slow_but_steady_work_is_no_hang() -> None:
    assert len(Pool(1, timeout=0.3).map(lambda i: time.sleep(0.05), range(12))) == 12


def test_no_work_goes_on_after_a_hang_was_given_up() -> None:
    pool, release, seen = Pool(1, timeout=0.2), threading.Event(), []

    def note(i: int) -> None:
        seen.append(i)
        release.wait(30)

    with pytest.raises(DataError, match="worker 0 has held 0"):
        pool.map(note, range(5))
    release.set()
    time.sleep(0.1)
    assert seen == [0]


@pytest.mark.parametrize(("workers", "timeout", "words"), [(-1, 1.0, "workers: -1"), (1, 0.0, "timeout: 0"), (1, float("nan"), "timeout")])
def test_an_unlimited_wait_cannot_be_asked_for(workers: int, timeout: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pool(workers, timeout)


def test_a_forked_process_has_workers_of_its_own() -> None:
    pool = Pool(2, timeout=5.0)
    assert pool.map(lambda i: i, range(4)) == [0, 1, 2, 3]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pool.map(lambda i: i + 1, range(4)) == [1, 2, 3, 4] else 1)
    deadline = time.monotonic() + 10
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    assert done[1] == 0


def test_callers_in_several_threads_share_the_workers() -> None:
    pool, found = Pool(3), {}

    def call(start: int) -> None:
        found[start] = pool.map(lambda i: i, range(start, start + 200))

    callers = [threading.Thread(target=call, args=(1000 * k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {1000 * k: list(range(1000 * k, 1000 * k + 200)) for k in range(4)}
    assert len([t for t in threading.enumerate() if t.name.startswith("decode-")]) >= 3
