"""The data sets that come with the package: small, real, lossless, their hashes pinned here."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
import torch

from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, DataError, Source, SourceConfig


@dataclass(frozen=True)
class BundledSet:
    """One sheet of tiles, row by row, and an ``.npy`` table (N, 2) uint16 of (label, index in the original set) beside it.

    Attributes:
        splits: the counts of consecutive tiles.
        near: see ``Source.near_duplicates``.
        texts: a table with a heading line, tabs between its columns, and a line per tile; ``caption`` is one of them.
    """

    sheet: str
    sheet_sha256: str
    table: str
    table_sha256: str
    tile: tuple[int, int]
    splits: dict[str, int]
    classes: tuple[str, ...]
    origin: str
    near: float | None = None
    texts: str = ""
    texts_sha256: str = ""


BUNDLED = {
    "fashion": BundledSet(
        sheet="fashion.png",
        sheet_sha256="501d9bcb6e6e2fbba02d01b1c14011b0a8ad9efe637d8d91890bdea083315809",
        table="fashion.npy",
        table_sha256="8f47fb00717f180d2112720a90c3bd209a935fa08c7dba3eca0f53db7858826e",
        tile=(28, 28),
        splits={"train": 10_000, "validation": 2_000},
        classes=("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        origin="Fashion-MNIST (Zalando SE, MIT licence), 12,000 images of its train part",
    ),
    "emoji": BundledSet(
        sheet="emoji.webp",
        sheet_sha256="7ee8ddc19791a6b70523a62615f09948f771d4e4cae2711011bbcb7b7aae059e",
        table="emoji.npy",
        table_sha256="885655b03d63f2d5325ca11069f5ad2adcf735f00f2c510e736ef03af3982772",
        tile=(64, 64),
        splits={"train": 1_562, "validation": 182, "test": 167},
        classes=(
            "Smileys & Emotion",
            "People & Body",
            "Component",
            "Animals & Nature",
            "Food & Drink",
            "Travel & Places",
            "Activities",
            "Objects",
            "Symbols",
            "Flags",
        ),
        origin="Noto emoji (Google, Apache-2.0 licence), the base set of emoji-datasource-google 16.0.0 on white",
        near=0.5,
        texts="emoji.tsv",
        texts_sha256="bbcb7a8897d3d9c08d5edd6e07fdbd60be4327eb68881cf46b2120a3a8c739ed",
    ),
}


class BundledConfig(SourceConfig):
    """A data set that comes with the package."""

    name: Literal["fashion", "emoji"] = "fashion"
    """``fashion``: 12,000 images of Fashion-MNIST's train part, 10,000 to train and 2,000 to validate, balanced over the classes.
    ``emoji``: 1,911 colour glyphs of 64 px on white with captions, 1,562 to train, 182 to validate and 167 to test."""


@SOURCES.register("bundled", BundledConfig)
class BundledSource(Source):
    """A set of images that ships with the package, held in memory."""

    config: BundledConfig

    def __init__(self, config: BundledConfig) -> None:
        super().__init__(config)
        facts = BUNDLED[config.name]
        self.near_duplicates = facts.near
        tiles, table = read_bundled(facts)
        captions = read_captions(facts)
        splits, start = {}, 0
        for name, count in facts.splits.items():
            rows = slice(start, start + count)
            labels, origin = (torch.from_numpy(table[rows, i].astype(np.int64)) for i in (0, 1))
            splits[name] = ArraySplit(tiles[rows], labels, config.transform, origin, captions and captions[rows])
            start += count
        self._finish(splits, facts.classes)

    def _identity(self) -> dict[str, Any]:
        facts = BUNDLED[self.config.name]
        return {"type": "bundled", "name": self.config.name, "origin": facts.origin, "sha256": facts.sheet_sha256}


def _read_pinned(name: str, sha256: str) -> bytes:
    data = (resources.files("stage1_tokenizer.data") / "bundled" / name).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(f"bundled/{name}: sha256 {found[:16]}..., expected {sha256[:16]}...: the installed file is damaged")
    return data


def read_bundled(facts: BundledSet) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The tiles (N, C, h, w) uint8 and the table (N, 2) uint16; DataError where a file is not the pinned one."""
    from PIL import Image

    with Image.open(io.BytesIO(_read_pinned(facts.sheet, facts.sheet_sha256))) as image:
        sheet = np.asarray(image)
    table = np.load(io.BytesIO(_read_pinned(facts.table, facts.table_sha256)), allow_pickle=False)
    return tiles_of(sheet, facts.tile)[: len(table)], table


def read_captions(facts: BundledSet) -> tuple[str, ...] | None:
    """The caption of each tile, or None where the set has none; DataError where the file is not the pinned one."""
    if not facts.texts:
        return None
    heading, *lines = _read_pinned(facts.texts, facts.texts_sha256).decode().splitlines()
    column = heading.split("\t").index("caption")
    return tuple(line.split("\t")[column] for line in lines)


def tiles_of(sheet: np.ndarray[Any, Any], tile: tuple[int, int]) -> np.ndarray[Any, Any]:
    """(H, W) or (H, W, C) to (tiles, C, h, w), row by row."""
    (h, w), (rows, columns) = tile, (sheet.shape[0] // tile[0], sheet.shape[1] // tile[1])
    grid = sheet.reshape(rows, h, columns, w, -1)
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3)).reshape(rows * columns, -1, h, w)
