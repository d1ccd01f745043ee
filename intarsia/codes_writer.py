"""Writing codes (``codes/1``): by any number of processes, byte-identical, and resumable after a kill."""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.codes_folder import FACTS, PLAN, WORK, clear, goes_on, is_complete
from intarsia.codes_format import ShardRows, read_shard, write_table
from intarsia.codes_manifest import MANIFEST, CodesError, Manifest, ShardEntry, ShardRange, SplitEntry, read_manifest, shard_ranges
from intarsia.codes_plan import SplitPlan, plan_tree
from intarsia.distributed import Comm, comm
from intarsia.files import json_bytes, read_json, write_atomic
from intarsia.lock import RunLock
from intarsia.specs import LevelSpec, SignalSpec, to_plain
from intarsia.tally import Tally

LEFT = "left.json"  # beside the plan: the numbers of the shards that are left to write


class CodesWriter:
    """Writes the shards of a set of codes; every rank makes one and writes those that ``mine`` deals to it.

    A shard is a fixed range of rows and one file, so the number of ranks changes no byte. A killed dump is resumed by
    making the same writer again: shards that are done, of the same plan and whole, are kept, and what is left is dealt anew.

    Args:
        folder: made where missing; must be empty, or hold a dump.
        levels, signal: of the tokenizer.
        tokenizer: {"type", "fingerprint"}.
        classes: names; empty where unlabelled.
        data: what the source says of itself and its transform: a plain tree without anything that differs between two runs.
        splits: by name.
        shard_rows: rows per file.

    Attributes:
        complete: the folder already holds this very dump: nothing is left to write.

    Raises:
        CodesError: a bad argument, shards of another tokenizer or other data, or a folder of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        levels: Sequence[LevelSpec],
        *,
        signal: SignalSpec,
        tokenizer: Mapping[str, str],
        splits: Mapping[str, SplitPlan],
        classes: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
        shard_rows: int = 4096,
        comm: Comm = comm,
    ) -> None:
        self.plan = plan_tree(levels, signal, tokenizer, splits, classes, data or {}, shard_rows)
        self.folder, self.levels, self.splits, self.comm = Path(folder), tuple(levels), dict(splits), comm
        self.classes = tuple(classes)
        self._shards = [s for name, p in splits.items() for s in shard_ranges(name, p.samples * p.views, shard_rows)]
        self._lock: RunLock | None = None
        self.complete = is_complete(self.folder, self.plan)
        comm.barrier()  # all have looked before one changes anything
        if comm.rank == 0 and not self.complete:
            self._prepare()
        comm.barrier()
        left = [] if self.complete else read_json(self.folder / WORK / LEFT, CodesError)
        self._mine = [self._shards[number] for number in left[comm.rank :: comm.world_size]]

    # Before ----------------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        work = self.folder / WORK
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CodesError(f"out: {self.folder} cannot be written to: {error.strerror}") from error
        self._lock = RunLock(work, "out")
        weakref.finalize(self, self._lock.release)  # where a dump is given up without close
        for left in self.folder.rglob(".tmp-*"):
            left.unlink()
        try:
            if not goes_on(self.folder, self.plan):
                clear(self.folder, self.splits)
                write_atomic(work / PLAN, json_bytes(self.plan))
        except BaseException:
            self._lock.release()
            raise
        for name in self.splits:
            (self.folder / name).mkdir(exist_ok=True)
        write_atomic(work / LEFT, json_bytes([i for i, shard in enumerate(self._shards) if self._facts(shard) is None]))

    # Shards ----------------------------------------------------------------------------------------------------
    def mine(self) -> list[ShardRange]:
        """The shards that this rank has to write: those that an earlier, killed dump did not leave whole, dealt round-robin."""
        return list(self._mine)

    def _facts_path(self, shard: ShardRange) -> Path:
        return self.folder / WORK / f"{shard.split}-{shard.number:05d}{FACTS}"

    def _facts(self, shard: ShardRange) -> ShardEntry | None:
        """The facts of a shard that is written and whole."""
        path = self._facts_path(shard)
        if not path.exists() or not (self.folder / shard.file).exists():
            return None
        try:
            entry = ShardEntry.from_dict(read_json(path, CodesError))
        except ValueError:
            return None  # damaged: the shard is written again
        found = hashlib.sha256((self.folder / shard.file).read_bytes()).hexdigest()
        return entry if found == entry.sha256 and entry.file == shard.file and entry.rows == shard.stop - shard.start else None

    def write_shard(
        self, shard: ShardRange, codes: Sequence[Tensor], label: Tensor | None = None, caption: Sequence[str] | None = None
    ) -> None:
        """Writes one shard, whole or not at all.

        Args:
            codes: for each level an integer tensor (rows, *grid) in [0, vocab), in order of the shard's rows.
            label: (rows,) integers in [0, classes) where the split is labelled.
            caption: one text per row where the split has them.

        Raises:
            CodesError: a wrong shape or dtype, a code or label out of range.
        """
        plan = self.splits[shard.split]
        rows = shard.stop - shard.start
        if len(codes) != len(self.levels):
            raise CodesError(f"{shard.file}: codes of {len(codes)} levels; expected {len(self.levels)}")
        arrays = [
            _array(c, (rows, *level.shape), level.vocab, f"{shard.file}: level {level.name!r}")
            for level, c in zip(self.levels, codes, strict=True)
        ]
        for name, given, planned in (("label", label, plan.labelled), ("caption", caption, plan.captioned)):
            if (given is not None) != planned:
                raise CodesError(f"{shard.file}: {name} is {'missing' if planned else 'given, but was not planned'}")
        if caption is not None and len(caption) != rows:
            raise CodesError(f"{shard.file}: {len(caption)} captions; expected {rows}")
        labels = None if label is None else _array(label, (rows,), len(self.classes), f"{shard.file}: label").astype(np.int64)
        content = write_table(ShardRows(arrays, *shard.rows(plan.samples), labels, None if caption is None else list(caption)), self.levels)
        write_atomic(self.folder / shard.file, content)
        facts = ShardEntry(file=shard.file, rows=rows, sha256=hashlib.sha256(content).hexdigest())
        write_atomic(self._facts_path(shard), json_bytes(facts.to_dict()))

    # After -----------------------------------------------------------------------------------------------------
    def close(self) -> Manifest:
        """Waits for all ranks; the first reads every shard once more, counts, and writes ``codes.json``. Returns the manifest.

        Raises CodesError where a shard was not written, or, of a dump that was complete before, is damaged.
        """
        self.comm.barrier()
        if self.comm.rank == 0:
            if self.complete:
                self._count(read_manifest(self.folder).splits)
            else:
                write_atomic(self.folder / MANIFEST, json_bytes(self._manifest().to_dict()))
            shutil.rmtree(self.folder / WORK, ignore_errors=True)  # also what a dump that was killed right here left
            if self._lock is not None:
                self._lock.release()
        self.comm.barrier()
        return read_manifest(self.folder)

    def _manifest(self) -> Manifest:
        splits = []
        for name, plan in self.splits.items():
            entries = []
            for shard in (s for s in self._shards if s.split == name):
                if not self._facts_path(shard).exists():
                    raise CodesError(f"{self.folder / shard.file}: the shard was not written")
                entries.append(ShardEntry.from_dict(read_json(self._facts_path(shard), CodesError)))
            splits.append(SplitEntry(name=name, **to_plain(plan), usage=(), perplexity=(), shards=tuple(entries)))
        counts, class_counts = self._count(splits)
        measured = [
            split.to_dict() | {"usage": [len(c) for c in found], "perplexity": [_perplexity(c) for c in found]}
            for split, found in zip(splits, counts, strict=True)
        ]
        classes = [{"name": name, "count": int(count)} for name, count in zip(self.classes, class_counts, strict=True)]
        return Manifest.from_dict(self.plan | {"classes": classes, "splits": measured, "text": None})

    def _count(self, splits: Sequence[SplitEntry]) -> tuple[list[list[np.ndarray]], np.ndarray]:
        """Reads and checks every shard: for each split and level the counts of the codes that occur, and the samples of each class in
        train."""
        counts: list[list[Tally]] = []
        class_counts = np.zeros(len(self.classes), np.int64)
        for split in splits:
            counts.append([Tally(level.vocab) for level in self.levels])
            for shard, entry in zip((s for s in self._shards if s.split == split.name), split.shards, strict=True):
                rows = read_shard(self.folder / shard.file, entry, self.levels, split, len(self.classes))
                index, view = shard.rows(split.samples)
                if not (np.array_equal(rows.index, index) and np.array_equal(rows.view, view)):
                    raise CodesError(f"{self.folder / shard.file}: holds other rows than {shard.start} to {shard.stop - 1}")
                for tally, codes in zip(counts[-1], rows.codes, strict=True):
                    tally.add(torch.from_numpy(codes.astype(np.int64)))
                if split.name == "train" and rows.label is not None:
                    class_counts += np.bincount(rows.label[rows.view == 0], minlength=len(class_counts))
        return [[tally.occurred().numpy() for tally in split] for split in counts], class_counts


def _perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of the frequencies, to six digits."""
    p = counts / counts.sum()
    return float(f"{np.exp(-(p * np.log(p)).sum()):.6g}")


def _array(values: Tensor, shape: tuple[int, ...], limit: int, where: str) -> np.ndarray:
    """Integers of that shape in [0, limit) as a numpy array (rows, everything else)."""
    if tuple(values.shape) != shape:
        raise CodesError(f"{where}: shape {tuple(values.shape)}; expected {shape}")
    if values.is_floating_point() or values.is_complex():
        raise CodesError(f"{where}: dtype {values.dtype}; expected integers")
    array: np.ndarray = values.detach().cpu().numpy()
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise CodesError(f"{where}: values in [{low}, {high}]; expected [0, {limit - 1}]")
    return array.reshape(shape[0], -1) if len(shape) > 1 else array
