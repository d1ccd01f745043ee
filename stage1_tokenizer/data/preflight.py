"""What is found out about encoded images before anything is trained: the header of every one, and the pixels of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from intarsia.config import Place
from intarsia.rng import permutation
from intarsia.run_config import LONGEST, MOST_THREADS
from stage1_tokenizer.data.base import DataError, Source, SourceConfig, Split
from stage1_tokenizer.data.decoded import DecodedSplit, Items
from stage1_tokenizer.data.image import Header, ImageError, decode, read_header
from stage1_tokenizer.data.pool import Pool
from stage1_tokenizer.data.transform import TransformConfig

SAMPLES = 512
CHUNK = 8192


class DecodedConfig(SourceConfig):
    """Base of the sources of encoded images."""

    skip_bad: bool = False
    """Leave out images that cannot be used, and count them; every image is then decoded once at the start. Else the first is an error."""
    memory: Place[int] = 1 << 30
    """Images that take up to this many bytes once decoded are held in memory as uint8; others are decoded for each batch."""
    workers: Place[Annotated[int, Field(ge=0, le=MOST_THREADS)]] = 0
    """Threads that decode; 0 = one per core, at most 8. The result does not depend on it."""
    timeout: Place[float] = 120.0
    """Seconds without any image decoded after which a batch is given up."""

    @field_validator("memory")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError("must not be negative")
        return value

    @field_validator("timeout")
    @classmethod
    def _limited(cls, value: float) -> float:
        if not 0 < value <= LONGEST:
            raise ValueError(f"must be positive and at most {LONGEST:g}: there is no unlimited wait")
        return value


@dataclass(frozen=True)
class Part:
    """What a source finds for one split, before anything is looked at."""

    items: Items
    labels: Tensor | None
    captions: Sequence[str] | None = None


class DecodedSource(Source):
    """Base of the sources of encoded images: scans them, decides the geometry, and holds small sets in memory."""

    config: DecodedConfig
    _holds = False

    def _look(self, parts: dict[str, Part], classes: tuple[str, ...]) -> None:
        """Scans all headers and decodes SAMPLES images (all with ``skip_bad``); then as ``_finish``."""
        config, pool = self.config, Pool(self.config.workers, self.config.timeout)
        usable: dict[str, tuple[Part, list[Header], Tensor]] = {}
        for name, part in parts.items():
            headers = [sane_header(header, config.transform) for header in scan_headers(part.items, pool)]
            if config.skip_bad:
                headers = try_decode(part.items, headers, pool)
            usable[name] = self._without_bad(name, part, headers)
        channels = check_geometry([(part.items, headers) for part, headers, _ in usable.values()], config.transform)
        splits: dict[str, DecodedSplit] = {}
        for name, (part, good, rows) in usable.items():
            sizes = torch.tensor([(h.height, h.width) for h in good])
            splits[name] = DecodedSplit(part.items, sizes, channels, config.transform, pool, part.labels, rows, part.captions)
        self._holds = sum(s.bytes for s in splits.values()) <= config.memory
        self._finish(splits, classes)
        if not config.skip_bad:
            for s in splits.values():
                sample = permutation(0, "data.preflight", len(s))[: max(1, SAMPLES // len(splits))].tolist()
                pool.map(s.decode, sorted(sample), s.items.name)

    def _without_bad(self, name: str, part: Part, headers: list[Header | str]) -> tuple[Part, list[Header], Tensor]:
        """The images that can be used, their headers, and their positions; the others end it, or are skipped and counted."""
        bad = [f"{part.items.name(i)}: {reason}" for i, reason in enumerate(headers) if isinstance(reason, str)]
        if bad and not self.config.skip_bad:
            raise DataError(f"{bad[0]}{f' (and {len(bad) - 1} more files)' if bad[1:] else ''}; skip_bad: true leaves such images out")
        self.skipped += tuple(bad)
        rows = torch.tensor([i for i, h in enumerate(headers) if isinstance(h, Header)], dtype=torch.int64)
        if len(rows) == 0:
            raise DataError(f"data: split {name!r}: none of its {len(headers)} images can be used; {bad[0] if bad else 'it is empty'}")
        labels = None if part.labels is None else part.labels[rows]
        captions = None if part.captions is None else [part.captions[i] for i in rows.tolist()]
        return Part(part.items.select(rows), labels, captions), [h for h in headers if isinstance(h, Header)], rows

    def split(self, name: str) -> Split:
        split = super().split(name)
        if self._holds and isinstance(split, DecodedSplit):
            split.hold()
        return split


def scan_headers(items: Items, pool: Pool) -> list[Header | str]:
    """The header of each image, or the reason why it cannot be used."""

    def look(i: int) -> Header | str:
        try:
            return read_header(items.open(i))
        except ImageError as error:
            return str(error)

    found: list[Header | str] = []
    for start in range(0, len(items), CHUNK):
        found += pool.map(look, range(start, min(start + CHUNK, len(items))), items.name)
    return found


def sane_header(header: Header | str, transform: TransformConfig) -> Header | str:
    """The header, or the reason why no image of its size can be resized."""
    return header if isinstance(header, str) else transform.too_large(header.height, header.width) or header


def try_decode(items: Items, headers: list[Header | str], pool: Pool) -> list[Header | str]:
    """``headers``, with a reason in the place of each image whose pixels cannot be decoded."""

    def look(i: int) -> Header | str:
        try:
            if isinstance(headers[i], Header):
                decode(items.open(i))
        except ImageError as error:
            return str(error)
        return headers[i]

    found: list[Header | str] = []
    for start in range(0, len(items), CHUNK):
        found += pool.map(look, range(start, min(start + CHUNK, len(items))), items.name)
    return found


def check_geometry(parts: list[tuple[Items, list[Header]]], transform: TransformConfig) -> int:
    """The number of channels. Raises DataError for mixed sizes or channels that the transform does not settle, naming two files."""
    first_items, first_headers = parts[0]
    first = first_headers[0]
    for items, headers in parts:
        for i, header in enumerate(headers):
            if transform.channels is None and header.channels != first.channels:
                raise DataError(
                    f"data: {first_items.name(0)} has {first.channels} channels, {items.name(i)} has {header.channels}; "
                    "set transform.channels to 1 or 3"
                )
            if transform.size is None and (header.height, header.width) != (first.height, first.width):
                raise DataError(
                    f"data: {first_items.name(0)} is {first.width}x{first.height}, {items.name(i)} is {header.width}x{header.height}; "
                    "set transform.size"
                )
            scaled, target = (f(header.height, header.width) for f in (transform.scaled, transform.target))
            if scaled[0] < target[0] or scaled[1] < target[1]:
                raise DataError(
                    f"data: {items.name(i)} is {header.width}x{header.height}, smaller than transform.size {target[1]}x{target[0]}; "
                    "set transform.resize to shorter or exact"
                )
    transform.check_shift(transform.target(first.height, first.width))
    return transform.channels or first.channels
