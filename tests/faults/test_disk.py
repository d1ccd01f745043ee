"""Full disks and folders in use, in real processes."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest

from intarsia.checkpoint import newest_valid
from intarsia.run import Run
from tests.test_run import config, go, loop
from tests.training import Left, fork, wait

pytestmark = pytest.mark.faults


def limited(folder, limit, at_step):
    """A training in which no file may grow beyond ``limit`` bytes from ``at_step`` on: EFBIG in place of ENOSPC."""

    def at(step, run):
        if step == at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return lambda: loop(Run(config(folder), kind="toy"), at=at)


@pytest.mark.parametrize(("limit", "file"), [(300, "metrics.jsonl"), (800, "step-00000008"), (1200, "step-00000008")])
def test_b1_a_disk_that_fills_up_under_a_checkpoint_or_the_log_ends_the_run_and_keeps_what_was_there(tmp_path, limit, file):
    folder, output = tmp_path / "run", tmp_path / "output"
    start = time.monotonic()
    code = wait(fork(limited(folder, limit, 7), output))
    text = output.read_text()
    assert code == 3 and time.monotonic() - start < 20
    assert text.count("\n") == 1 and file in text and "File too large" in text and "bytes are needed" in text and "are free" in text
    assert not list(folder.rglob(".tmp*")) and newest_valid(folder / "checkpoints").name == "step-00000004"
    whole = go(tmp_path / "whole")
    assert wait(fork(lambda: loop(Run(config(folder), kind="toy")))) == 0  # room again: it goes on
    assert Left.of(folder).differences(whole) == []


def test_b4_a_second_trainer_leaves_at_once_and_takes_over_when_the_first_is_killed(tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    first = fork(lambda: loop(Run(config(folder, steps=100000), kind="toy"), at=lambda step, run: time.sleep(0.01)))
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    start = time.monotonic()
    assert wait(fork(lambda: loop(Run(config(folder, steps=100000), kind="toy")), output)) == 2
    assert time.monotonic() - start < 3 and f"in use by the run with pid {first}" in output.read_text()
    os.kill(first, signal.SIGKILL)
    wait(first)
    Run(config(folder, steps=100000), kind="toy").close()
