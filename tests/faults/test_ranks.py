"""Ranks under the real launcher: they train what one process trains, and a rank that fails ends the whole job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intarsia import machine
from intarsia.cli import parse
from stage1_tokenizer import train as script
from tests.training import Left, fork, wait

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.faults


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` with two processes on the CPU."""
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*line, *options, "--main_process_port", "0", "-m", *words]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=240, check=False)


def test_c1_two_launched_processes_train_what_one_trains(tmp_path):
    words = ["--steps", "10", "--batch_size", "10", "--precision", "fp64", "--device", "cpu", "--init_samples", "100", "--log.every", "5"]
    words += ["--tokenizer.net.widths", "[8, 8]", "--tokenizer.quantizer.codes", "32", "--tokenizer.quantizer.dim", "8"]
    words += ["--validation_samples", "100", "--log.pictures_every", "0"]
    done = launch("stage1_tokenizer.train", "--run", str(tmp_path / "two"), *words)
    assert done.returncode == 0, done.stderr
    script.train(*parse(script.TokenizerTrainConfig, ["--run", str(tmp_path / "one"), *words]))
    one, two = Left.of(tmp_path / "one"), Left.of(tmp_path / "two")
    assert one.distance(two) <= 1e-10 and one.facts["best"] == pytest.approx(two.facts["best"], abs=1e-9)
    assert (tmp_path / "two" / "model" / "config.json").exists()


@pytest.mark.parametrize("fault", ["raise", pytest.param("kill", marks=pytest.mark.slow)])
def test_c4_a_rank_that_fails_ends_the_job_and_its_last_lines_say_which_when_and_why(tmp_path, fault):
    done = launch("tests.faults.launched", str(tmp_path / "run"), fault)
    tail = "\n".join(done.stderr.splitlines()[-20:])
    assert done.returncode != 0 and "rank      : 1" in tail and "step 6" in tail, done.stderr
    assert ("ValueError: the sensor of this rank is gone (rank 1, step 6)" if fault == "raise" else "SIGKILL") in tail


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")
def test_c6_a_rank_does_not_outlive_its_launcher(tmp_path):
    def launcher() -> None:
        def rank() -> None:
            machine.die_with_parent()
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(60)

        os.waitpid(fork(rank), 0)

    parent = fork(launcher)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    os.kill(parent, signal.SIGKILL)
    wait(parent)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {child} lives on")
