"""A full disk, said so that its owner can act."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def why_not_written(error: OSError, path: Path, needed: int) -> str:
    """One line: the path and the cause; where the disk is full, also the bytes that are needed and free."""
    if error.errno not in FULL:
        return f"{path}: could not be written: {error.strerror or error}"
    return f"{path}: {os.strerror(error.errno)}: {needed} bytes are needed, {shutil.disk_usage(path.parent).free} are free"
