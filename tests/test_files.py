"""Files are whole or absent, and JSON of others is bounded and plain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from intarsia.files import DiskFullError, atomic, json_bytes, read_json, write_atomic
from intarsia.tensor_files import save_tensors


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_tensors_get_the_mode_that_other_files_get(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"plain")
    save_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(3)})
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "a").stat().st_mode


def test_an_error_while_writing_leaves_the_old_file_and_nothing_temporary(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        _ = 1 / 0
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a3_bytes_names_and_folder_reach_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])

    def recorded(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    write_atomic(tmp_path / "a", b"x")
    assert [c for c in calls if c == "rename"] == ["rename"] and len(calls) == 3
    if os.path.isdir("/proc/self/fd"):
        assert calls == ["file", "rename", "folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_tells_path_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_to_full(path: Path, content: bytes) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(content)

    monkeypatch.setattr(Path, "write_bytes", write_to_full)
    with pytest.raises(DiskFullError, match=r"a: No space left on device: 3 bytes are needed, \d+ are free") as error:
        write_atomic(tmp_path / "a", b"abc")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        (" " * 101, "101 bytes; at most 100 are read"),
    ],
)
def test_json_that_is_not_plain_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(KeyError, match=message) as error:
        read_json(tmp_path / "a.json", KeyError, 100 if text.startswith(" ") else 1 << 20)
    assert "a.json" in str(error.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tree = {"b": [1, 2.5, None, True], "a": "ü"}
    (tmp_path / "a.json").write_bytes(json_bytes(tree))
    found = read_json(tmp_path / "a.json", ValueError)
    assert found == tree and list(found) == ["b", "a"]
    with pytest.raises(ValueError, match="nan"):
        json_bytes({"a": float("nan")})
