"""SIGKILL at random times (A1) and at every point of saving (A2, A6): the resumed run ends with the bits of one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intarsia import checkpoint
from intarsia.checkpoint import newest_valid
from intarsia.cli import Flags
from stage1_tokenizer.health import HealthConfig
from stage1_tokenizer.tokenizers.base import TokenizerConfig
from stage2_prior import train as prior_script
from stage2_prior.priors.base import PriorConfig
from stage2_prior.priors.gpt import GPTConfig
from stage2_prior.priors.maskgit import MaskGITConfig
from tests.conftest import preload
from tests.test_run import go
from tests.tiny_codes import write_tiny_codes
from tests.training import HIERARCHY, LOG, TOKENIZER, Left, augmented, fork, run_training, tiny, wait

pytestmark = pytest.mark.faults
KILLS = 12


@pytest.fixture(autouse=True, scope="module")
def _preloaded() -> None:
    """In the parent once, else most kills would land in imports."""
    preload()


def killed_and_resumed(main: Callable[[Path], Any], folder: Path, seconds: float, dice: random.Random, kills: int) -> int:
    """Kills the run up to ``kills`` times at random times, then lets it end; how often it was killed."""
    done = 0
    for _ in range(kills):
        pid = fork(lambda: main(folder))
        time.sleep(dice.uniform(0.02, seconds))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        done += 1
    assert wait(fork(lambda: main(folder), folder.parent / "output")) == 0, (folder.parent / "output").read_text()
    return done


def a1(main: Callable[[Path], Any], tmp_path: Path) -> None:
    start = time.monotonic()
    assert wait(fork(lambda: main(tmp_path / "whole"))) == 0
    seconds = time.monotonic() - start
    whole, dice, kills, runs = Left.of(tmp_path / "whole"), random.Random(7), 0, 0
    while kills < KILLS:
        runs += 1
        kills += killed_and_resumed(main, tmp_path / f"run{runs}", seconds, dice, min(3, KILLS - kills))
        assert Left.of(tmp_path / f"run{runs}").differences(whole) == []
        assert runs < 30
    assert runs >= 4


@pytest.mark.parametrize("tokenizer", [TOKENIZER, HIERARCHY], ids=["ema", "vqvae2"])
def test_a1_twelve_kills_of_a_tokenizer_leave_no_trace(tmp_path, tokenizer: TokenizerConfig):
    """Augmented data read by a thread, averaged weights, and a look at the health of the codes between two checkpoints."""

    def train_tokenizer(folder: Path) -> None:
        log = {"checkpoint_every": 3, "validate_every": 10}
        settings = {"data": augmented(), "workers": 1, "optim": {"average": 0.9}, "health": HealthConfig(every=7, quiet=True), "log": log}
        run_training(tiny(folder, steps=30, tokenizer=tokenizer, **settings))

    a1(train_tokenizer, tmp_path)


NOISE = {"width": 16, "depth": 1, "heads": 2, "corruption": 0.1, "dropout": 0.1}


@pytest.mark.parametrize("prior", [GPTConfig(levels="0:2", **NOISE), MaskGITConfig(levels="1:3", **NOISE)], ids=["gpt", "maskgit"])
def test_a1_twelve_kills_of_a_prior_leave_no_trace(tmp_path, prior: PriorConfig):
    """Two levels at once, with every kind of noise in training and averaged weights."""
    codes = write_tiny_codes(tmp_path / "codes")

    def train_prior(folder: Path) -> None:
        prior_script.train(
            prior_script.PriorTrainConfig(
                run=str(folder),
                codes=str(codes),
                prior=prior,
                steps=30,
                batch_size=8,
                precision="fp32",
                device="cpu",
                log=LOG.replace(checkpoint_every=3, validate_every=10),
            ),
            Flags(),
        )

    a1(train_prior, tmp_path)


# Every point of saving --------------------------------------------------------------------------------------------
CALLS = ("mkdir", "fsync", "rename", "unlink", "rmdir")


def train_with_crash(folder: Path, save: int, point: int, report: Path) -> None:
    """Trains; the ``point``-th change to the disk within the ``save``-th save is preceded by a SIGKILL. Writes how many there were."""
    saves, calls, active = 0, 0, False

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if active:
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
            return real(*args, **kwargs)

        return call

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves, active
        saves += 1
        active = saves == save
        path = checkpoint.save_checkpoint(*args, **kwargs)
        if active:
            report.write_text(str(calls))
        active = False
        return path

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    checkpoint._bytes_of = watched(checkpoint._bytes_of)  # within a file: half of it is written
    import intarsia.run

    intarsia.run.save_checkpoint = counted
    go(folder, steps=12, log={"checkpoint_every": 2})


@pytest.mark.parametrize("save", [1, 2, 5])
def test_a2_a_crash_at_any_point_of_any_save_leaves_no_trace_and_a6_never_fewer_than_one_checkpoint(tmp_path, save):
    whole = go(tmp_path / "whole", steps=12, log={"checkpoint_every": 2})
    assert wait(fork(lambda: train_with_crash(tmp_path / "count", save, -1, tmp_path / "report"))) == 0
    points = int((tmp_path / "report").read_text())
    tensors = len(whole.tensors) - 1
    assert points >= tensors + 8
    chosen = [0, tensors // 2, *range(tensors, points)]  # two inside files, and every other
    for point in chosen:
        folder = tmp_path / f"point{point}"
        assert wait(fork(lambda folder=folder, point=point: train_with_crash(folder, save, point, tmp_path / "x"))) == -signal.SIGKILL
        valid = newest_valid(folder / "checkpoints")
        assert save == 1 or (valid is not None and int(valid.name[5:]) >= 2 * (save - 1))
        assert wait(fork(lambda folder=folder: go(folder, steps=12, log={"checkpoint_every": 2}))) == 0
        assert Left.of(folder).differences(whole) == []
        assert not list((folder / "checkpoints").glob(".tmp*"))
