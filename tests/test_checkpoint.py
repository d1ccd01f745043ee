"""Checkpoints: whole or absent, proven by hashes, and never read through a memory map."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from intarsia.checkpoint import (
    CheckpointError,
    UnreadableError,
    checkpoints,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
    verify_checkpoint,
)
from tests.training import fork, wait


def state(step: int, n: int = 40) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(step)
    return {
        "module": {"w": torch.randn(n, 3, generator=g), "count": torch.tensor(step), "half": torch.randn(5, generator=g).bfloat16()},
        "optimizer": {"w/exp_avg": torch.randn(n, 3, generator=g).double(), "flag": torch.tensor([True, False]), "none": torch.zeros(0, 4)},
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[p].keys() == b[p].keys() and all(a[p][n].dtype == b[p][n].dtype and torch.equal(a[p][n], b[p][n]) for n in a[p]) for p in a
    )


def two(folder: Path) -> tuple[Path, Path]:
    return save_checkpoint(folder, 10, state(10), {"best": 0.5}), save_checkpoint(folder, 20, state(20), {"best": 0.25})


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "folder", 7, state(7), {"best": 0.1, "list": [1, None, "é"]})
    step, loaded, meta = load_checkpoint(path)
    assert (path.name, step, meta) == ("step-00000007", 7, {"best": 0.1, "list": [1, None, "é"]})
    assert same(loaded, state(7))


def test_the_files_are_safetensors_as_the_library_reads_them(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(1), {})
    for part, tensors in state(1).items():
        theirs = load_file(path / f"{part}.safetensors")
        assert theirs.keys() == tensors.keys() and all(torch.equal(theirs[n], tensors[n]) for n in tensors)


def test_tensors_that_share_memory_or_have_gaps_are_saved_by_value(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    saved = {"m": {"tied": whole, "again": whole, "column": whole[:, 1], "turned": whole.t()}}
    assert same(load_checkpoint(save_checkpoint(tmp_path, 1, saved, {}))[1], saved)


def test_a6_the_newest_are_kept_and_older_ones_removed_after(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, state(step), {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    save_checkpoint(tmp_path, 5, state(5), {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005"]


def test_steps_beyond_the_saved_one_belong_to_an_abandoned_branch(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, state(step), {}, keep=3)
    save_checkpoint(tmp_path, 15, state(15), {}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    _, newest = two(tmp_path)
    (newest / "module.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 20, state(20), {})
    assert same(load_checkpoint(newest)[1], state(20))


def test_a3_files_then_manifest_then_folder_are_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        events.append(("fsync", next(p.name for p in tmp_path.rglob("*") if p.stat().st_ino == inode)))
        fsync(descriptor)

    def record_rename(a, b):
        events.append(("rename", os.path.basename(a), os.path.basename(b)))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, state(1), {}, keep=1)
    assert events == [
        ("fsync", "module.safetensors"),
        ("fsync", "optimizer.safetensors"),
        ("fsync", "manifest.json"),
        ("fsync", ".tmp-step-00000001"),
        ("rename", ".tmp-step-00000001", "step-00000001"),
        ("fsync", "checkpoints"),
    ]
    events.clear()
    save_checkpoint(folder, 2, state(2), {}, keep=1)
    assert events[-2:] == [("fsync", "checkpoints"), ("rename", "step-00000001", ".tmp-old-step-00000001")]


DAMAGES = {
    "deleted": lambda file, other: file.unlink(),
    "emptied": lambda file, other: file.write_bytes(b""),
    "cut in half": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit flipped": lambda file, other: file.write_bytes(flip(file.read_bytes(), 8 * (file.stat().st_size // 2) + 3)),
    "taken from another step": lambda file, other: shutil.copy(other, file),
}


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a5_damage_to_any_file_is_found_named_and_passed_over(tmp_path, name, damage):
    older, newest = two(tmp_path)
    DAMAGES[damage](newest / name, older / name)
    warnings: list[str] = []
    assert newest_valid(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and str(newest / name) in warnings[0]
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(newest)


def test_a5_two_hundred_random_bit_flips_are_found(tmp_path):
    _, newest = two(tmp_path)
    dice, files = random.Random(0), sorted(newest.iterdir())
    for _ in range(200):
        file = dice.choice(files)
        content = file.read_bytes()
        file.write_bytes(flip(content, dice.randrange(8 * len(content))))
        with pytest.raises(CheckpointError, match=file.name):
            verify_checkpoint(newest)
        file.write_bytes(content)
    assert verify_checkpoint(newest)["step"] == 20


def test_a_manifest_of_another_format_or_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    _, newest = two(tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format": "checkpoint/9"}))
    with pytest.raises(CheckpointError, match=r"manifest.json.*'checkpoint/1'"):
        load_checkpoint(newest)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="manifest.json: cannot be read"):
            load_checkpoint(path)


def test_where_none_is_whole_or_one_cannot_be_read_nothing_is_passed_over_in_silence(tmp_path, monkeypatch):
    older, newest = two(tmp_path)
    (newest / "module.safetensors").write_bytes(b"")
    monkeypatch.setattr(Path, "open", refuse(Path.open, older / "optimizer.safetensors"))
    with pytest.raises(UnreadableError, match=r"step-00000010/optimizer.safetensors: cannot be read: Input/output error"):
        newest_valid(tmp_path)
    monkeypatch.undo()
    assert newest_valid(tmp_path) == older
    (older / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json: cannot be read.*no whole checkpoint is left.*move them away to begin anew"):
        newest_valid(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [older.name, newest.name]


def refuse(method, path):
    def opened(self, *args, **kwargs):
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return method(self, *args, **kwargs)

    return opened


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "missing") is None


def test_b5_a_file_that_changes_after_loading_changes_nothing(tmp_path):
    path = save_checkpoint(tmp_path, 3, state(3), {})
    _, loaded, _ = load_checkpoint(path)
    for file in path.iterdir():
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
        os.truncate(file, 1)
    assert same(loaded, state(3))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_b1_a_full_disk_is_reported_with_path_needed_and_free_and_leaves_no_torn_file(tmp_path, share):
    """The limit on the size of a file stands for the disk: the same calls fail, with EFBIG instead of ENOSPC."""
    big = {"module": {"w": torch.randn(5000)}, "optimizer": {"m": torch.randn(10000)}}
    good = save_checkpoint(tmp_path, 10, big, {})
    report = tmp_path / "report"

    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * 40000), resource.RLIM_INFINITY))
        save_checkpoint(tmp_path, 20, big, {})

    assert wait(fork(main, report)) == 2
    line = report.read_text()
    assert line.count("\n") == 1 and "step-00000020: File too large: 60000 bytes are needed" in line and "are free" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report", "step-00000010"]
    assert newest_valid(tmp_path) == good


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path):
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / "module.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 10, state(10), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file", 1, state(1), {})
