"""Faults of filling a folder with samples, in real processes: killed anywhere, launched as two, out of disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import sample
from pipelines.sample_set import SetPlan, write_set
from tests import tiny_pipelines as tiny
from tests.training import fork, wait

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path, kind: str, point: int | None = None) -> None:
    """Writes the set; dies before the ``point``-th rename."""
    plan = SetPlan(n=40, first=0, seed=4, label=(2, 0), options={}, kind=kind, shard=5)
    replace, done = os.replace, [0]

    def counted(source: Path, target: Path) -> None:
        if done[0] == point:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        replace(source, target)

    os.replace = counted
    try:
        write_set(tiny.pipeline("gpt", micro_batch=8), folder, plan)
    finally:
        os.replace = replace


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("kind", "renames"), [("png", 42), ("npz", 10)])
def test_a8_a_killed_set_goes_on_to_the_same_bytes(tmp_path: Path, kind: str, renames: int) -> None:
    fill(tmp_path / "whole", kind)
    whole = contents(tmp_path / "whole")
    assert len(whole) == renames
    for point in (0, 1, 2, renames // 2, renames - 2, renames - 1):
        folder = tmp_path / f"{point}"
        assert wait(fork(lambda folder=folder, point=point: fill(folder, kind, point))) == -signal.SIGKILL
        assert not (folder / "samples.json").exists() and any(p.name.startswith(".tmp-") for p in folder.iterdir())
        fill(folder, kind)
        assert contents(folder) == whole, point


def test_a8_kills_at_random_times_leave_no_trace(tmp_path: Path) -> None:
    start = time.monotonic()
    fill(tmp_path / "whole", "png")
    seconds, dice, kills = time.monotonic() - start, random.Random(3), 0
    for run in range(20):
        pid = fork(lambda run=run: fill(tmp_path / f"{run}", "png"))
        time.sleep(dice.uniform(0.0, seconds))
        os.kill(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
        fill(tmp_path / f"{run}", "png")
        assert contents(tmp_path / f"{run}") == contents(tmp_path / "whole")
        if kills == 5:
            return
    pytest.fail(f"only {kills} kills")


def test_two_launched_processes_write_what_one_writes(tmp_path: Path) -> None:
    tiny.pipeline("gpt", micro_batch=8).save_pretrained(tmp_path / "pipeline")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--n", "30", "--shard", "4", "--seed", "2", "--device", "cpu", "--label", "all"]
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*line, "-m", "pipelines.sample", *words, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 samples of seed 2") == 1
    sample.main([*words, "--out", str(tmp_path / "one")])
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(contents(tmp_path / "one")) == 32
