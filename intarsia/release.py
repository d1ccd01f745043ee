"""A folder that is replaced as a whole: readers see the old one or the new one, or, between two renames, none; never a mixture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intarsia.files import fsync_path


def replace_folder(path: Path, fill: Callable[[Path], Any]) -> None:
    """Has ``fill`` write a temporary folder beside ``path``, or where it links to, and renames it into place. Raises OSError; then ``path``
    is as it was."""
    path = path.resolve()
    new, old = path.with_name(f".tmp-new-{path.name}"), path.with_name(f".tmp-old-{path.name}")
    restore_folder(path)
    new.mkdir(parents=True)
    try:
        fill(new)
        for file in new.rglob("*"):
            fsync_path(file)
        fsync_path(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """After a crash: puts back the old folder where the new one had not arrived, and removes what was temporary."""
    path = path.resolve()
    new, old = path.with_name(f".tmp-new-{path.name}"), path.with_name(f".tmp-old-{path.name}")
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
