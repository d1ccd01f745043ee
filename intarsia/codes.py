"""Codes on disk: THE contract between the stages. A prior trains from ``CodesDataset`` alone, without the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.codes_format import read_shard
from intarsia.codes_manifest import CodesError, Manifest, read_manifest, shard_ranges
from intarsia.codes_plan import SplitPlan
from intarsia.codes_writer import CodesWriter
from intarsia.distributed import Comm
from intarsia.specs import CodesSpec, LevelSpec, SignalSpec, TokenizerSpec

__all__ = ["CodesDataset", "CodesError", "CodesWriter", "Manifest", "SplitPlan", "check_match", "read_manifest", "write_codes"]


def check_match(levels: Sequence[LevelSpec], fingerprint: str, expected: CodesSpec | TokenizerSpec, where: str) -> None:
    """Raises CodesError where codes are not those of the tokenizer (or code set) ``expected``: fingerprint, levels, vocab, grid."""
    if len(levels) != len(expected.levels):
        raise CodesError(f"{where}: {len(levels)} levels; expected {len(expected.levels)}")
    for found, wanted in zip(levels, expected.levels, strict=True):
        for field in ("name", "vocab", "shape", "factors"):
            a, b = getattr(found, field), getattr(wanted, field)
            if a != b:
                raise CodesError(f"{where}: level {found.name!r} has {'a grid of' if field == 'shape' else field} {a}; expected {b}")
    if fingerprint != expected.fingerprint:
        raise CodesError(f"{where}: made by the tokenizer {fingerprint}; expected {expected.fingerprint}")


def write_codes(
    folder: str | Path,
    splits: Mapping[str, tuple[Sequence[Tensor], Tensor | None]],
    levels: Sequence[LevelSpec],
    *,
    signal: SignalSpec,
    tokenizer: Mapping[str, str],
    classes: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    shard_rows: int = 4096,
) -> Manifest:
    """Writes codes that are in memory, in one process.

    Args:
        splits: name -> (codes per level, each (N, *grid) integers; labels (N,) or None).
    """
    plans = {name: SplitPlan(len(codes[0]), labelled=label is not None) for name, (codes, label) in splits.items()}
    writer = CodesWriter(
        folder, levels, signal=signal, tokenizer=tokenizer, splits=plans, classes=classes, data=data, shard_rows=shard_rows, comm=Comm()
    )
    for shard in writer.mine():
        codes, label = splits[shard.split]
        rows = slice(shard.start, shard.stop)
        writer.write_shard(shard, [c[rows] for c in codes], None if label is None else label[rows])
    return writer.close()


class CodesDataset:
    """One split of a set of codes, in memory as unsigned integers, every file checked.

    Args:
        folder: holds ``codes.json``.
        split: "train", "validation" or "test".
        expected: the tokenizer or code set that it must fit, where given.

    Attributes:
        manifest, spec: what ``codes.json`` says, and the part of it that a prior is told.
        codes: for each level (N, positions), row-major, in [0, vocab).
        index, view: (N,) int64, the sample of the source and its augmented view (0 = none).
        label: (N,) int64 in [0, classes), or None where unlabelled.
        caption: texts, or None.

    Raises:
        CodesError: an incomplete or damaged set, one of another tokenizer, an unknown split.
    """

    in_memory = True  # no thread prepares batches ahead

    def __init__(self, folder: str | Path, split: str, expected: CodesSpec | TokenizerSpec | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        self.spec: CodesSpec = self.manifest.spec
        if expected is not None:
            check_match(self.spec.levels, self.spec.fingerprint, expected, str(self.folder))
        entry = self.manifest.split(split)
        n, levels = entry.samples * entry.views, self.spec.levels
        ranges = shard_ranges(split, n, self.manifest.shard_rows)

        def load(i: int) -> Any:
            return read_shard(self.folder / ranges[i].file, entry.shards[i], levels, entry, len(self.spec.classes))

        self.codes: list[np.ndarray] = []
        self.index, self.view = np.empty(n, np.int64), np.empty(n, np.int64)
        self.label: np.ndarray | None = np.empty(n, np.int64) if entry.labelled else None
        self.caption: list[str] | None = [] if entry.captioned else None
        with ThreadPoolExecutor(2) as pool:  # hashing and parsing release the interpreter
            for shard, rows in zip(ranges, pool.map(load, range(len(ranges))), strict=True):
                part = slice(shard.start, shard.stop)
                index, view = shard.rows(entry.samples)
                if (wrong := (rows.index != index) | (rows.view != view)).any():
                    r = int(wrong.argmax())
                    found = f"sample {rows.index[r]} of view {rows.view[r]}; expected {index[r]} of view {view[r]}"
                    raise CodesError(f"{self.folder / shard.file}: row {r} is {found}")
                if not self.codes:
                    self.codes = [np.empty((n, level.positions), c.dtype) for level, c in zip(levels, rows.codes, strict=True)]
                for whole, c in zip(self.codes, rows.codes, strict=True):
                    whole[part] = c
                self.index[part], self.view[part] = rows.index, rows.view
                if self.label is not None:
                    self.label[part] = rows.label
                if self.caption is not None:
                    self.caption += rows.caption

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices: Tensor, epochs: Tensor | None = None) -> dict[str, Any]:
        """The rows ``indices`` (B,) int64 of this split.

        Args:
            epochs: taken for the sake of the interface; codes are not augmented when they are read.

        Returns:
            "codes": for each level (B, *grid) int64; "label": (B,) int64, or None; "index": ``indices`` itself, which
            tells two views of one sample apart.
        """
        rows = indices.numpy()
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"indices: values in [{rows.min()}, {rows.max()}]; expected [0, {len(self) - 1}]")
        codes = [
            torch.from_numpy(c[rows].astype(np.int64)).view(-1, *level.shape) for c, level in zip(self.codes, self.spec.levels, strict=True)
        ]
        return {"codes": codes, "label": None if self.label is None else torch.from_numpy(self.label[rows]), "index": indices}
