"""Faults of the dump of codes, in real processes: killed anywhere, out of disk, without one of its ranks."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from intarsia.cli import RunError
from intarsia.codes import CodesDataset, CodesError, CodesWriter, SplitPlan
from intarsia.distributed import comm
from intarsia.files import DiskFullError
from intarsia.rng import bits
from intarsia.specs import LevelSpec, SignalSpec
from stage1_tokenizer import encode

pytestmark = pytest.mark.faults

LEVEL = LevelSpec("codes", 300, (7, 7))
PLAN = {"train": SplitPlan(40, views=2), "test": SplitPlan(20)}
SHARD_ROWS, SHARDS = 20, 5
CODES = (bits(0, "codes", torch.arange(80)[:, None], 0, torch.arange(49)[None]) % 300).view(-1, 7, 7)
RENAMES = 2 + 2 * SHARDS + 1  # the plan, the list of what is left, each shard and its facts, codes.json


def dump(folder: Path) -> None:
    signal_, tokenizer = SignalSpec("image", 1, (28, 28)), {"type": "t", "fingerprint": "f"}
    writer = CodesWriter(folder, [LEVEL], signal=signal_, tokenizer=tokenizer, splits=PLAN, shard_rows=SHARD_ROWS)
    for shard in writer.mine():
        writer.write_shard(shard, [CODES[shard.start : shard.stop]])
    writer.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A dump that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "codes"
    dump(folder)
    return contents(folder)


def in_child(fn: Callable[[], Any], after: float | None = None) -> int:
    """Runs ``fn`` in a forked process, killed ``after`` seconds; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(fn() or 0)
        finally:
            os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dump_killed(folder: Path, point: str, number: int) -> None:
    """Dumps, and dies at the ``number``-th rename: before it, after it, or with only half of the file written."""
    replace, write = os.replace, Path.write_bytes
    seen = [0]

    def killed_replace(source: Any, target: Any) -> None:
        if point == "before" and seen[0] == number:
            die()
        replace(source, target)
        if point == "after" and seen[0] == number:
            die()
        seen[0] += 1

    def torn_write(path: Path, content: bytes) -> int:
        if point == "torn" and seen[0] == number:
            write(path, content[: len(content) // 2])
            die()
        return write(path, content)

    os.replace, Path.write_bytes = killed_replace, torn_write  # type: ignore[assignment]
    dump(folder)


@pytest.mark.parametrize("point", ["before", "after", "torn"])
def test_a8_a_dump_killed_at_any_point_completes_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], point: str) -> None:
    for number in range(RENAMES):
        folder = tmp_path / f"{point}-{number}"
        assert in_child(lambda folder=folder, number=number: dump_killed(folder, point, number)) == -signal.SIGKILL
        complete = (point, number) == ("after", RENAMES - 1)
        if complete:
            assert len(CodesDataset(folder, "train")) == 80
        else:
            with pytest.raises(CodesError, match=r"codes\.json: is missing: the dump of codes is incomplete"):
                CodesDataset(folder, "train")
        dump(folder)
        assert contents(folder) == whole, (point, number)


def test_a8_a_dump_killed_at_random_times_completes_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    start = time.monotonic()
    assert in_child(lambda: dump(tmp_path / "timed")) == 0
    length = time.monotonic() - start
    draw, killed, trial = random.Random(0), 0, 0
    while killed < 20:
        assert trial < 100, f"only {killed} kills came before the end of the dump"
        folder = tmp_path / str(trial)
        for _ in range(2):
            killed += in_child(lambda folder=folder: dump(folder), draw.uniform(0, length)) == -signal.SIGKILL
            if not (folder / "codes.json").exists():
                with pytest.raises(CodesError):
                    CodesDataset(folder, "train")
        dump(folder)
        assert contents(folder) == whole
        trial += 1


def limited(folder: Path, size: int) -> int:
    """Dumps where no file may be larger than ``size`` bytes, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        dump(folder)
    except DiskFullError as error:
        text = str(error)
        named = f"{folder}/train/00000.parquet: " in text and "bytes are needed, " in text and text.endswith(" are free")
        return 7 if named and "\n" not in text else 8
    return 0


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_b1_a_full_disk_names_path_needed_and_free_and_leaves_nothing_torn(tmp_path: Path, whole: dict[str, bytes], share: float) -> None:
    size = int(share * len(whole["train/00000.parquet"]))
    assert in_child(lambda: limited(tmp_path / "codes", size)) == 7
    assert not list((tmp_path / "codes").rglob("*.parquet")) and not list((tmp_path / "codes").rglob(".tmp-*"))
    dump(tmp_path / "codes")  # there is room again
    assert contents(tmp_path / "codes") == whole


def test_the_same_limit_beyond_a_shard_harms_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert in_child(lambda: limited(tmp_path / "codes", max(map(len, whole.values())) * 3 // 2)) == 0
    assert contents(tmp_path / "codes") == whole


def test_the_script_says_that_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise DiskFullError(tmp_path / "x", OSError(28, "no space"), 10)

    class Source:
        splits = ("train",)

        def split(self, name: str) -> range:
            return range(3)

    class Model:
        type_name, fingerprint = "t", "f"

        def to(self, device: Any) -> Model:
            return self

        def level_specs(self) -> tuple[LevelSpec, ...]:
            return (LEVEL,)

    monkeypatch.setattr(encode, "dump_codes", full)
    monkeypatch.setattr(encode.Tokenizer, "from_pretrained", lambda path: Model())
    monkeypatch.setattr(encode.SOURCES, "build", lambda config: Source())
    with pytest.raises(RunError, match=r"x: No space left on device: 10 bytes are needed, \d+ are free; the same command goes on"):
        encode.main(["--tokenizer", "a/b", "--out", str(tmp_path / "codes"), "--data.type", "bundled"])


def rank_of_two(rank: int, folder: Path, store: Path) -> int:
    """One of two ranks; rank 1 dies when it has written one shard."""
    from datetime import timedelta

    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=20), 2, rank)
    assert comm.world_size == 2
    if rank == 1:
        write_shard = CodesWriter.write_shard

        def write_and_die(self: CodesWriter, *args: Any, **options: Any) -> None:
            write_shard(self, *args, **options)
            die()

        CodesWriter.write_shard = write_and_die  # type: ignore[method-assign]
    try:
        dump(folder)
    except RuntimeError:  # gloo: the other side has gone
        return 5
    return 0


def test_a_dump_that_loses_a_rank_ends_with_an_error_and_one_process_completes_it(tmp_path: Path, whole: dict[str, bytes]) -> None:
    pids = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(rank_of_two(rank, tmp_path / "codes", tmp_path / "store"))
            finally:
                os._exit(99)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [5, -signal.SIGKILL]
    with pytest.raises(CodesError, match="incomplete"):
        CodesDataset(tmp_path / "codes", "train")
    dump(tmp_path / "codes")
    assert contents(tmp_path / "codes") == whole
