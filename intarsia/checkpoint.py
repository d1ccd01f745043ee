"""Checkpoints: folders that are whole or absent, proven by hashes, the newest valid one wins.

``step-00000100/`` holds one safetensors file per part of the state and ``manifest.json`` with the size and sha256 of each
and of itself. It is built under ``.tmp-*``: files, manifest and folder are fsynced, the folder is renamed, its parent
fsynced; only then are older ones removed. A crash at any point leaves the previous checkpoint, or this one, whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from intarsia.disk import why_not_written
from intarsia.files import fsync_path
from intarsia.tensor_files import DTYPES, TensorFileError, read_header, read_into

FORMAT = "checkpoint/1"
MANIFEST = "manifest.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 22

State = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that could not be written; names the file."""


class UnreadableError(CheckpointError):
    """A file that is there and cannot be read just now: no reason to take the checkpoint for damaged."""


def _why_not_read(file: Path, error: OSError) -> CheckpointError:
    kind = CheckpointError if isinstance(error, FileNotFoundError | NotADirectoryError) else UnreadableError
    return kind(f"{file}: cannot be read: {error.strerror}")


def _version() -> str:
    try:
        return metadata.version("intarsia")
    except metadata.PackageNotFoundError:
        return "uninstalled"


# Writing ---------------------------------------------------------------------------------------------------------
def save_checkpoint(folder: Path, step: int, state: State, meta: Mapping[str, Any], keep: int = 2) -> Path:
    """Writes ``folder/step-XXXXXXXX`` and removes what is older than the ``keep`` newest, or newer than ``step``.

    Args:
        state: {file stem: {name: tensor}}.
        meta: a JSON tree, kept in the manifest.

    Raises:
        CheckpointError: with path, needed and free bytes where the disk is full; nothing temporary is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    needed = sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors.values())
    try:
        temporary.mkdir()
        files = {f"{stem}.safetensors": _write_tensors(temporary / f"{stem}.safetensors", tensors) for stem, tensors in state.items()}
        body = {"format": FORMAT, "step": step, "version": _version(), "meta": dict(meta), "files": files}
        _write(temporary / MANIFEST, lambda file: [file.write(_render(body))])
        fsync_path(temporary)
        if final.exists():  # a damaged one, or one that an explicit --resume stepped back behind
            os.rename(final, folder / f".tmp-old-{final.name}")
        os.rename(temporary, final)
        fsync_path(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(why_not_written(error, final, needed)) from error
    _rotate(folder, step, keep)
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, written tensor by tensor without a second copy of all of them; its size and sha256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, total = hashlib.sha256(), 0

    def pieces(file: BinaryIO) -> None:
        nonlocal total
        head = memoryview(struct.pack("<Q", len(text)) + text)
        for view in itertools.chain([head], map(_bytes_of, tensors.values())):
            digest.update(view)
            total += len(view)
            file.write(view)

    _write(path, pieces)
    return {"bytes": total, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    with path.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def _render(body: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: the body and its own sha256. One body has one rendering, so that any changed bit shows."""
    text = json.dumps(body, indent=1, allow_nan=False)
    return (json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1, allow_nan=False) + "\n").encode()


def _rotate(folder: Path, step: int, keep: int) -> None:
    found = checkpoints(folder)
    current = [path for path in found if _step_of(path) <= step]
    for path in current[:-keep] + [path for path in found if _step_of(path) > step]:
        doomed = folder / f".tmp-old-{path.name}"  # renamed first: a crash leaves no half of a checkpoint under its name
        os.rename(path, doomed)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


# Reading ---------------------------------------------------------------------------------------------------------
def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in ``folder``, oldest first; whether they are valid is not looked at."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte agrees with it.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    body = _read_manifest(path)
    for name, facts in body["files"].items():
        file = path / name
        try:
            if file.stat().st_size != facts["bytes"]:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes; the manifest says {facts['bytes']}")
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise _why_not_read(file, error) from None
        if digest.hexdigest() != facts["sha256"]:
            raise CheckpointError(f"{file}: damaged: sha256 is {digest.hexdigest()}; the manifest says {facts['sha256']}")
    return body


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = file.read_bytes()
        body = json.loads(content)
        if body.get("format") == FORMAT and _render({k: v for k, v in body.items() if k != "sha256"}) == content:
            if path.name.startswith("step-") and path.name != f"step-{body['step']:08d}":
                raise CheckpointError(f"{file}: damaged: it is of step {body['step']}")
            return body
    except OSError as error:
        raise _why_not_read(file, error) from None
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged: no valid JSON") from None
    raise CheckpointError(f"{file}: damaged, or of another format than {FORMAT!r}")


def load_checkpoint(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(step, state, meta). Everything is verified first, and read into memory that the process owns (no memory map).

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    body = verify_checkpoint(path)
    state: dict[str, dict[str, Tensor]] = {}
    for name in body["files"]:
        try:
            tensors = {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in read_header(path / name).items()}
            read_into(path / name, tensors)
        except (TensorFileError, OSError) as error:
            raise CheckpointError(str(error)) from error
        state[name.removesuffix(".safetensors")] = tensors
    return body["step"], state, body["meta"]


def newest_valid(folder: Path, warn: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole, None where there are none; ``warn`` is told of each that is passed over.

    Raises:
        CheckpointError: where there are some and none is whole: a run that began anew would delete them.
        UnreadableError: where one newer than the newest whole one cannot be read: falling back would delete it.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except UnreadableError:
            raise
        except CheckpointError as error:
            if path == found[0]:
                raise CheckpointError(f"{error}; no whole checkpoint is left in {folder}; move them away to begin anew") from None
            warn(f"{error}; falling back to an older checkpoint")
            continue
        return path
    return None

