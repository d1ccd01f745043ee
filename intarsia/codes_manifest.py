"""``codes.json``, the manifest of a set of codes in the format ``codes/1``, and how it is read without trust.

It is written last: without it a dump is incomplete. Shard s of a split holds the rows from ``s * shard_rows``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.config import Config, ConfigError
from intarsia.files import read_json
from intarsia.specs import CodesSpec, LevelSpec, SignalSpec

FORMAT = "codes/1"
MANIFEST = "codes.json"


class CodesError(ValueError):
    """A set of codes is incomplete, damaged or of another tokenizer; one line that names the file and both values."""


class LevelEntry(Config):
    """One map of codes (LevelSpec)."""

    name: str
    vocab: int
    shape: tuple[int, ...]
    factors: tuple[int, ...]


class SignalEntry(Config):
    """The geometry of the signals (SignalSpec)."""

    kind: str
    channels: int
    shape: tuple[int, ...]
    rate: float | None


class TokenizerEntry(Config):
    """Who made the codes."""

    type: str
    fingerprint: str


class ClassEntry(Config):
    """A class and the number of its samples in the training split (views not counted)."""

    name: str
    count: int


class ShardEntry(Config):
    """A file of the set."""

    file: str
    rows: int
    sha256: str


class SplitEntry(Config):
    """A split: ``samples * views`` rows; for each level the number of codes that occur and their perplexity."""

    name: str
    samples: int
    views: int
    labelled: bool
    captioned: bool
    usage: tuple[int, ...]
    perplexity: tuple[float, ...]
    shards: tuple[ShardEntry, ...]


class Manifest(Config):
    """``codes.json``."""

    format: str
    levels: tuple[LevelEntry, ...]
    signal: SignalEntry
    tokenizer: TokenizerEntry
    classes: tuple[ClassEntry, ...]
    data: dict[str, Any]
    shard_rows: int
    splits: tuple[SplitEntry, ...]
    text: None

    @property
    def level_specs(self) -> tuple[LevelSpec, ...]:
        return tuple(LevelSpec.from_dict(level.to_dict()) for level in self.levels)

    @property
    def spec(self) -> CodesSpec:
        """What a prior is told."""
        names, counts = tuple(c.name for c in self.classes), tuple(c.count for c in self.classes)
        return CodesSpec(self.level_specs, self.tokenizer.fingerprint, names, counts)

    @property
    def signal_spec(self) -> SignalSpec:
        return SignalSpec.from_dict(self.signal.to_dict())

    def split(self, name: str) -> SplitEntry:
        """Raises CodesError with the known names."""
        for entry in self.splits:
            if entry.name == name:
                return entry
        raise CodesError(f"split: {name!r} is none of {', '.join(s.name for s in self.splits)}")


@dataclass(frozen=True)
class ShardRange:
    """Shard ``number`` of a split: the rows [start, stop)."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:05d}.parquet"

    def rows(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, view) of its rows, each int64."""
        rows = np.arange(self.start, self.stop)
        return rows % samples, rows // samples


def shard_ranges(split: str, rows: int, shard_rows: int) -> list[ShardRange]:
    """The shards of a split, in order."""
    return [ShardRange(split, i, start, min(start + shard_rows, rows)) for i, start in enumerate(range(0, rows, shard_rows))]


def read_manifest(folder: str | Path) -> Manifest:
    """The checked ``codes.json``. Raises CodesError: missing (an incomplete dump), damaged, of a newer format."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CodesError(f"codes: {str(folder)!r} is no folder")
    if not path.is_file() and not ((folder / ".dump").is_dir() or any(folder.glob("*/*.parquet"))):
        raise CodesError(f"codes: {str(folder)!r} is no dump of codes: it holds neither {MANIFEST} nor shards")
    if not path.is_file():
        raise CodesError(f"{path}: is missing: the dump of codes is incomplete; run the same encode command again to complete it")
    tree = read_json(path, CodesError)
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise CodesError(f"{path}: format {found!r}; this version of intarsia reads {FORMAT!r}")
    try:
        manifest = Manifest.from_dict(tree)
        _ = (manifest.spec, manifest.signal_spec)
    except ConfigError as error:
        raise CodesError("; ".join(f"{path}: {line}" for line in error.errors)) from None
    except ValueError as error:
        raise CodesError(f"{path}: {error}") from None
    if manifest.shard_rows < 1:
        raise CodesError(f"{path}: shard_rows {manifest.shard_rows} must be positive")
    _check_splits(manifest, path)
    return manifest


def _check_splits(manifest: Manifest, path: Path) -> None:
    """Raises CodesError where what is said of the splits, or of the classes, cannot be."""
    for what, names in (("splits", [s.name for s in manifest.splits]), ("classes", [c.name for c in manifest.classes])):
        if twice := {name for name in names if names.count(name) > 1}:
            raise CodesError(f"{path}: {what}: {min(twice)!r} is there twice")
    for split in manifest.splits:
        if not split.name.isidentifier():
            raise CodesError(f"{path}: splits: {split.name!r} is no name such as 'train'")
        if split.samples < 1 or split.views < 1:
            raise CodesError(f"{path}: split {split.name!r}: {split.samples} samples of {split.views} views; expected one or more of each")
        if not len(split.usage) == len(split.perplexity) == len(manifest.levels):
            found = f"usage of {len(split.usage)} levels and perplexity of {len(split.perplexity)}"
            raise CodesError(f"{path}: split {split.name!r}: {found}; there are {len(manifest.levels)}")
        expected = [(s.file, s.stop - s.start) for s in shard_ranges(split.name, split.samples * split.views, manifest.shard_rows)]
        if [(s.file, s.rows) for s in split.shards] != expected:
            raise CodesError(
                f"{path}: split {split.name!r} lists {len(split.shards)} shards of {sum(s.rows for s in split.shards)} rows; "
                f"expected {len(expected)} of {split.samples * split.views}"
            )
