"""Several paths in one option."""

from __future__ import annotations

import os
from pathlib import Path


def split_paths(text: str) -> list[str]:
    """Paths or Hub ids joined by commas; a text that is a path as it stands is that one alone, commas and all."""
    return [text] if Path(text).exists() else [os.path.expanduser(one.strip()) for one in text.split(",")]
