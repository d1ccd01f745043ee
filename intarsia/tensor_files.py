"""Safetensors files read without trust: a bounded header, compared with what is expected, before any tensor is read.

Bytes are read into memory that the process owns. A memory map would let a file that changes later change live weights,
or end the process with SIGBUS where it was cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from intarsia.files import atomic

MAX_HEADER = 1 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFileError(ValueError):
    """The file is damaged, or holds something else than expected; one line that names it."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype, shape and the range of its bytes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The live parameters and persistent buffers by name; a tensor that has several names (tied weights) stands under its first."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def hash_tensors(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """sha256 over ``start`` and the name, dtype, shape and bytes of each tensor, in order of name; the device does not enter."""
    digest = hashlib.sha256(start)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor.cpu().contiguous()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all. Raises OSError (DiskFullError)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    needed = sum(t.numel() * t.element_size() for t in plain.values())
    with atomic(path, needed) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; save_file would leave a file that nobody else can read
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
        except SafetensorError as error:  # what it raises on a full disk, without an errno
            raise OSError(errno.ENOSPC, str(error)) from error


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds. Raises TensorFileError unless header and sizes agree to the byte."""
    with path.open("rb") as file:
        return _header(file, path)


def _header(file: BinaryIO, path: Path) -> dict[str, Entry]:
    def bad(why: str) -> TensorFileError:
        return TensorFileError(f"{path}: no valid safetensors file: {why}")

    size = file.seek(0, 2)
    file.seek(0)
    if size < 8:
        raise bad(f"{size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAX_HEADER, size - 8):
        raise bad(f"a header of {length} bytes in a file of {size}; at most {MAX_HEADER} are read")
    try:
        tree = json.loads(file.read(length).decode())
    except (ValueError, RecursionError) as error:
        raise bad(f"the header is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise bad("the header is no mapping")
    tree.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, item in tree.items():
        entry = _entry(item, 8 + length)
        if entry is None:
            raise bad(f"the entry of tensor {name!r} is malformed")
        entries[name] = entry
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if entry.start != place:
            raise bad(f"tensor {name!r} starts at byte {entry.start}; expected {place}")
        place = entry.stop
    if place != size:
        raise bad(f"the file has {size} bytes; its header describes {place}")
    return entries


def _entry(item: Any, base: int) -> Entry | None:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        return None
    name, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return None
    if len(shape) > 16 or any(type(v) is not int or not 0 <= v < 1 << 63 for v in shape + offsets):
        return None
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        return None
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def compare(entries: Mapping[str, Entry | Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises TensorFileError where names, shapes or dtypes differ from those of ``expected`` (which may lie on the meta device)."""
    for what, names in (("lacks", expected.keys() - entries.keys()), ("holds the unknown", entries.keys() - expected.keys())):
        if names:
            shown = ", ".join(repr(n) for n in sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise TensorFileError(f"{where}: {what} tensors {shown}")
    for name, tensor in expected.items():
        found, wanted = entries[name], (tensor.dtype, tuple(tensor.shape))
        if (found.dtype, tuple(found.shape)) != wanted:
            raise TensorFileError(f"{where}: tensor {name!r} is {found.dtype} {tuple(found.shape)}; the model has {wanted[0]} {wanted[1]}")


def read_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills the CPU tensors ``targets`` in place from a file that holds exactly those. Raises TensorFileError."""
    with path.open("rb") as file:
        entries = _header(file, path)
        compare(entries, targets, str(path))
        for name, entry in sorted(entries.items(), key=lambda pair: pair[1].start):
            target = targets[name].detach()
            owned = target if target.is_contiguous() else torch.empty(entry.shape, dtype=entry.dtype)
            view = _bytes_of(owned)
            file.seek(entry.start)
            if file.readinto(view) != len(view):
                raise TensorFileError(f"{path}: cut short while it was read")
            if entry.dtype == torch.bool and len(view) and max(view) > 1:
                raise TensorFileError(f"{path}: tensor {name!r} holds bytes that are no booleans")
            if owned is not target:
                target.copy_(owned)
