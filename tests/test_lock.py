"""One run per folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from intarsia.cli import UserError
from intarsia.lock import RunLock
from tests.training import fork, wait


def held_by_a_child(folder, seconds=30.0, children=0):
    """The pid of a process that holds the lock, and has forked ``children`` that outlive it."""

    def main():
        RunLock(folder)
        for _ in range(children):
            if os.fork() == 0:
                time.sleep(2)
                os._exit(0)
        (folder / "ready").touch()
        time.sleep(seconds)

    pid = fork(main)
    deadline = time.monotonic() + 20
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return pid


def test_b4_a_second_run_is_refused_by_pid_host_and_start_of_the_first(tmp_path):
    pid = held_by_a_child(tmp_path)
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    text = str(error.value)
    assert text.startswith("run: ") and str(tmp_path) in text and f"pid {pid}" in text and socket.gethostname() in text
    assert time.strftime("%Y-%m-%dT") in text


def test_b4_the_lock_is_free_as_soon_as_its_holder_is_killed_though_workers_live_on(tmp_path):
    for _ in range(5):
        (tmp_path / "ready").unlink(missing_ok=True)
        pid = held_by_a_child(tmp_path, children=2)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        RunLock(tmp_path).release()


def test_a_process_cannot_hold_it_twice_and_can_take_it_again(tmp_path):
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match="this process"):
        RunLock(tmp_path)
    lock.release()
    lock.release()
    again = RunLock(tmp_path)
    again.release()
    assert not (tmp_path / ".lock.json").exists()


OTHER = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(7)
"""


def test_a_forked_child_cannot_release_its_parents_lock(tmp_path):
    lock = RunLock(tmp_path)
    assert wait(fork(lock.release)) == 0
    assert subprocess.run([sys.executable, "-c", OTHER, str(tmp_path / ".lock")], check=False).returncode == 7
    lock.release()
    assert subprocess.run([sys.executable, "-c", OTHER, str(tmp_path / ".lock")], check=False).returncode == 0


def test_a_torn_holder_file_does_not_hide_that_the_folder_is_in_use(tmp_path):
    pid = held_by_a_child(tmp_path)
    (tmp_path / ".lock.json").write_text("{")
    with pytest.raises(UserError, match="in use by another run"):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
