"""Files that are whole or absent: written under a temporary name, fsynced, renamed, with the folder fsynced after."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 26  # names and counts of 65,536 classes, or the list of a million shards, among others
MAX_JSON_DEPTH = 64


def fsync_path(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_folder(path: str | Path, name: str, error: Callable[[str], Exception], *, make: bool = True) -> Path:
    """``path`` as a folder to write to.

    Args:
        name: the argument that names it, for messages.
        error: makes the exception that is raised from a one-line message, for a file, a folder below one and one that cannot be written to.
        make: make the folder with its parents, and a temporary file in it; else only look, and change nothing.
    """
    folder = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # a name that is too long, or below a folder that may not be searched
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            raise error(f"{name}: {folder} {'is' if nearest == folder.absolute() else 'lies below'} a file; expected a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as cause:
        raise error(f"{name}: {folder} cannot be written to: {cause.strerror}") from None
    return folder


class DiskFullError(OSError):
    """There is no room for a file; the message holds its path, the bytes needed (where known) and those free."""

    def __init__(self, path: Path, cause: OSError, needed: int | None = None) -> None:
        want = "" if needed is None else f"{needed} bytes are needed, "
        self.text = f"{path}: {os.strerror(cause.errno or errno.ENOSPC)}: {want}{shutil.disk_usage(path.parent).free} are free"
        super().__init__(cause.errno or errno.ENOSPC, self.text)

    def __str__(self) -> str:
        return self.text


@contextlib.contextmanager
def atomic(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there becomes ``path`` at the end, and is removed after an error.

    Raises OSError; DiskFullError, which says how many bytes were ``needed``, where the disk is full.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise DiskFullError(path, error, needed) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, whole or not at all."""
    with atomic(path, len(content)) as temporary:
        temporary.write_bytes(content)


def json_bytes(tree: Any) -> bytes:
    """The one JSON text of a tree: indented, in its own order, without NaN."""
    return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finite_or_null(tree: Any) -> Any:
    """A plain tree for JSON, which has no infinity: numbers that are not finite become null."""
    if isinstance(tree, dict):
        return {key: finite_or_null(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_or_null(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_json(path: Path, error: Callable[[str], Exception], max_bytes: int = MAX_JSON) -> Any:
    """The tree in a JSON file: at most ``max_bytes``, at most 64 deep, no duplicate keys, no NaN or infinity.

    Args:
        error: makes the exception that is raised from a one-line message.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
        return tree

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number that may stand here")

    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error(f"{path}: {path.stat().st_size} bytes; at most {max_bytes} are read")
    try:
        tree = json.loads(content.decode(), object_pairs_hook=once, parse_constant=refuse)
        _check_depth(tree, MAX_JSON_DEPTH)
        return tree
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: no valid JSON: {str(cause).splitlines()[0]}") from None


def _check_depth(tree: Any, left: int) -> None:
    if isinstance(tree, dict | list):
        if left == 0:
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
        for part in tree.values() if isinstance(tree, dict) else tree:
            _check_depth(part, left - 1)
