"""Files that are whole or absent: written under a temporary name, fsynced, renamed, with the folder fsynced after."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 26  # names and counts of 65,536 classes, or the list of a million shards, among others
MAX_JSON_DEPTH = 64
BESIDE = (".log", ".out", ".err", ".sh", ".yaml", ".yml")  # what a command was started by, and what it printed
NEUTRAL = ("README.md", "LICENSE", "log.txt")  # of a clone of a repository, and a log
NEUTRAL_FOLDERS = ("logs", "wandb", "lost+found")
IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2")
RUN_FILES = ("config.yaml", "metrics.jsonl")
FIGURES = ("evaluation.json", "timing.json", "comparison.json", "guidance.json", "completions.json", "doctor.json")
EVALUATED = (*FIGURES, "samples.png", "baseline.png", "nearest.png", *RUN_FILES, "pipeline.json")
"""What marks a folder that evaluations may write to: each adds a few files, so that they may share one, a run's and a pipeline's too."""


def fsync_path(path: Path) -> None:
    """Forces a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def foreign(folder: Path, own: Sequence[str], *, alone: bool = False) -> str:
    """What speaks against writing to ``folder``: "" where it is new, empty, or holds one of ``own``, the names that this command leaves.

    Elsewhere a data set of images is refused, flat or with a folder per class: what is written there would make another of it.

    Args:
        alone: refuse all else too but hidden files, logs, scripts and configurations (BESIDE), NEUTRAL and NEUTRAL_FOLDERS.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in own):
        return ""
    lacks = f"but no {next(name for name in own if name[0] != '.')}; expected a new or empty folder, or one that this command wrote"
    names = sorted(p.name for p in _some(folder) if not (p.name[0] == "." or _neutral(p)))
    if alone and names:
        return f"holds {names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''}, {lacks}"
    classes = (path for path in _some(folder) if path.is_dir() and path.name[0] != ".")
    found = next((path for path in (folder, *itertools.islice(classes, 64)) if _mostly_images(path)), None)
    return "" if found is None else f"holds images{'' if found == folder else f' in {found.name!r}'}, {lacks}"


def _some(folder: Path) -> Iterator[Path]:
    """The first of a folder's entries: enough to tell what it is."""
    return itertools.islice(folder.iterdir(), 1000)


def _neutral(path: Path) -> bool:
    return path.name in NEUTRAL_FOLDERS if path.is_dir() else path.name in NEUTRAL or path.suffix in BESIDE


def _mostly_images(folder: Path) -> bool:
    suffixes = [path.suffix.lower() for path in _some(folder) if path.name[0] != "."]
    return 2 * sum(suffix in IMAGES for suffix in suffixes) > len(suffixes)


def writable_folder(
    path: str | Path,
    name: str,
    error: Callable[[str], Exception],
    *,
    make: bool = True,
    own: Sequence[str] | None = None,
    alone: bool = False,
) -> Path:
    """``path`` as a folder to write to.

    Args:
        name: the argument that names it, for messages.
        error: makes the exception that is raised from a one-line message, for a file, a folder below one, one that cannot be written to,
            and one of other things (``own``).
        make: make the folder with its parents, and a temporary file in it; else only look, and change nothing.
        own, alone: as for ``foreign``, which decides where ``own`` is given.
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
        if own is not None and (found := foreign(folder, own, alone=alone)):
            raise error(f"{name}: {folder} {found}")
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
