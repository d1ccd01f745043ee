"""Files are whole or absent, and JSON of others is bounded and plain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from intarsia.files import DiskFullError, atomic, foreign, json_bytes, read_json, writable_folder, write_atomic
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


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_that_cannot_be_written_to_is_refused_with_its_argument_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))  # root may write anywhere
    cases = {
        "file": "is a file; expected a folder",
        "file/a/b": "lies below a file; expected a folder",
        "link": "is a file; expected a folder",
        "locked/a": "cannot be written to: Permission denied",
        "n" * 300: "cannot be written to: File name too long",
    }
    for name, message in cases.items():
        with pytest.raises(KeyError, match=f"out: {tmp_path / name} {message}"):
            writable_folder(tmp_path / name, "out", KeyError, make=make)
    assert writable_folder(str(tmp_path / "new/deep"), "out", KeyError, make=make) == tmp_path / "new/deep"
    assert (tmp_path / "new").exists() is make and sorted(os.listdir(tmp_path))[:3] == ["file", "link", "locked"]


def test_a_folder_of_other_things_is_refused_and_logs_a_clone_and_own_output_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "photos"

    def made() -> Path:
        return writable_folder(folder, "out", KeyError, own=(".work", "mine.json"), alone=True)

    for name in (".git", ".gitattributes", "README.md", "LICENSE", "train.sh", "tok.yaml", "slurm-7.out", "log.txt"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("")
        assert made() == folder
    (folder / "logs").mkdir()
    assert made() == folder
    (folder / "cats").mkdir()
    with pytest.raises(KeyError, match=f"out: {folder} holds 'cats', but no mine.json; expected a new or empty folder, or one that this"):
        made()
    (folder / "dog.png").write_text("")
    with pytest.raises(KeyError, match="holds 'cats' and 1 more, but no mine.json"):
        made()
    (folder / "mine.json").write_text("")
    assert made() == folder


def test_a_data_set_of_images_is_refused_and_a_folder_with_a_picture_or_two_is_not(tmp_path: Path) -> None:
    def said(folder: Path) -> str:
        return foreign(folder, ("mine.json",))

    classes, flat, mixed = (tmp_path / name for name in ("classes", "flat", "mixed"))
    for folder in (classes / "cats", classes / "empty", flat, mixed / "tokenizer"):
        folder.mkdir(parents=True)
    assert said(classes) == said(flat) == said(tmp_path / "none") == ""
    for path in (classes / "cats/1.JPG", flat / "1.png", flat / "2.png", mixed / "grid.png", mixed / "tokenizer/reconstructions.png"):
        path.touch()
    for name in ("thesis.txt", "notes.md", "tokenizer/metrics.jsonl", "tokenizer/config.yaml"):
        (mixed / name).touch()
    assert said(classes).startswith("holds images in 'cats', but no mine.json; expected a new or empty folder")
    assert said(flat).startswith("holds images, but no mine.json")
    assert said(mixed) == said(mixed / "tokenizer") == ""
    (flat / "mine.json").touch()
    assert said(flat) == ""
