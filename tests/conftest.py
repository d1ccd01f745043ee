"""What all tests stand on: one thread, no network, no display, and two real processes where a test asks for them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: bits depend on the number of threads
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # the usual one is shared with forked children: one that is killed while it holds it stops all others
tqdm.monitor_interval = 0  # nor may a thread hold it while a child is forked

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in (config.option.markexpr or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forked ranks cannot share a card, and results are the same everywhere


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)  # for fixtures that are shared


@pytest.fixture(autouse=True)
def _seeded(_one_thread: None) -> None:
    """A test draws the same numbers whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)


def preload() -> None:
    """Imports, once for all children that will be forked, what a first optimizer and a first run would import in each: seconds."""
    for name in ("torch._dynamo", "accelerate", "tqdm"):
        importlib.import_module(name)


def run_ranks(fn: Callable[[int], Any], world: int = 2, timeout: float = 60.0) -> list[Any]:
    """``fn(rank)`` in ``world`` forked processes that gloo joins; their results in order of rank.

    Raises AssertionError with the traceback of a rank that fails, and where one has not ended after ``timeout`` seconds.
    """
    preload()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pids = [_fork(fn, rank, world, folder, timeout) for rank in range(world)]
        running, deadline = set(pids), time.monotonic() + timeout
        while running and time.monotonic() < deadline:
            for pid in list(running):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    running.discard(pid)
            time.sleep(0.01)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        failures = [path.read_text() for path in sorted(folder.glob("*.failed"))]
        assert not failures, "\n".join(failures)
        assert not running, f"ranks {[pids.index(pid) for pid in running]} had not ended after {timeout} s"
        results = [folder / f"{rank}.result" for rank in range(world)]
        assert all(path.exists() for path in results), "a rank ended without a result"
        return [pickle.loads(path.read_bytes()) for path in results]


def _fork(fn: Callable[[int], Any], rank: int, world: int, folder: Path, timeout: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=timeout), world, rank)
        assert dist.get_world_size() == world  # gate C0: truly several
        result = fn(rank)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """``run_ranks``: a function in two forked processes."""
    return run_ranks
