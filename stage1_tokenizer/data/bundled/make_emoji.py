"""Makes the bundled set ``emoji`` from an archive of its glyphs.

    python stage1_tokenizer/data/bundled/make_emoji.py --glyphs FILE.npz [--out FOLDER]

FILE.npz holds ``rgb`` (N, 64, 64, 3) uint8 on white and, for each glyph, ``caption``, ``category``, ``subcategory``, ``short_name``
and ``split``: the base set of Google's Noto emoji as the npm package ``emoji-datasource-google`` 16.0.0 lays it out, divided by a hash
of the short name. Tiles are ordered by split, within a split as in the archive. The sheet is a lossless WebP, a quarter smaller
than the PNG; it takes a minute, and its bytes are those of the libwebp that wrote it, its pixels are not.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")
CLASSES = (
    "Smileys & Emotion", "People & Body", "Component", "Animals & Nature", "Food & Drink",
    "Travel & Places", "Activities", "Objects", "Symbols", "Flags",
)  # fmt: skip
COLUMNS = 44
TEXTS = ("caption", "short_name", "subcategory")  # columns of the .tsv


def order_of(split: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Positions in the archive, split after split. Raises ValueError for a split of another name."""
    unknown = sorted(set(split.tolist()) - set(SPLITS))
    if unknown:
        raise ValueError(f"split: {unknown[0]!r}; expected one of {', '.join(SPLITS)}")
    return np.concatenate([np.flatnonzero(split == name) for name in SPLITS])


def sheet_of(tiles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N, h, w, C) to one picture with COLUMNS tiles in a row, white where there is none."""
    n, h, w, c = tiles.shape
    rows = -(-n // COLUMNS)
    whole = np.full((rows * COLUMNS, h, w, c), 255, np.uint8)
    whole[:n] = tiles
    return whole.reshape(rows, COLUMNS, h, w, c).transpose(0, 2, 1, 3, 4).reshape(rows * h, COLUMNS * w, c)


def files_of(glyphs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, bytes]:
    """The three files by name. Raises ValueError for a text that a line of the table cannot hold, or an unknown category."""
    from PIL import Image

    order = order_of(glyphs["split"])
    picture, table = io.BytesIO(), io.BytesIO()
    Image.fromarray(sheet_of(glyphs["rgb"][order])).save(picture, "WEBP", lossless=True, quality=100, method=6)
    labels = np.array([CLASSES.index(name) for name in glyphs["category"][order].tolist()])
    np.save(table, np.stack([labels, order], 1).astype("<u2"), allow_pickle=False)
    lines = ["\t".join(TEXTS)]
    for texts in zip(*(glyphs[name][order].tolist() for name in TEXTS), strict=True):
        if not all(text.isprintable() and text for text in texts):
            raise ValueError(f"texts: {texts} hold an empty one, or what is not printable")
        lines.append("\t".join(texts))
    return {"emoji.webp": picture.getvalue(), "emoji.npy": table.getvalue(), "emoji.tsv": ("\n".join(lines) + "\n").encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glyphs", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    with np.load(args.glyphs, allow_pickle=False) as glyphs:
        files = files_of(glyphs)
    for name, data in files.items():
        (args.out / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
