"""The format ``codes/1``: how a shard is laid out, and how one is read without trust.

A folder holds ``<split>/00000.parquet`` and so on, and ``codes.json`` (``codes_manifest``). Row r of a split with n samples is sample
``r % n`` of view ``r // n``. Columns: ``codes_0``, ``codes_1``, ... (fixed-length lists, row-major, of the smallest unsigned type
that holds vocab - 1), ``index``, ``view``, and ``label`` and ``caption`` where the split has them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intarsia.codes_manifest import MANIFEST, CodesError, ShardEntry, SplitEntry
from intarsia.specs import LevelSpec

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class ShardRows:
    """What a shard holds: codes (rows, positions) unsigned for each level; index, view and label (rows,) int64."""

    codes: list[np.ndarray]
    index: np.ndarray
    view: np.ndarray
    label: np.ndarray | None
    caption: list[str] | None


def code_dtype(vocab: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds ``vocab - 1``."""
    return np.min_scalar_type(vocab - 1)


def write_table(rows: ShardRows, levels: Sequence[LevelSpec]) -> bytes:
    """The bytes of a shard: one row group, no compression beyond parquet's dictionaries, which pack a code into log2 K bits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for i, (level, codes) in enumerate(zip(levels, rows.codes, strict=True)):
        flat = pa.array(codes.astype(code_dtype(level.vocab), copy=False).reshape(-1))
        columns[f"codes_{i}"] = pa.FixedSizeListArray.from_arrays(flat, level.positions)
    packed = [f"codes_{i}.list.element" for i in range(len(levels))] + ["view"]
    columns |= {"index": pa.array(rows.index), "view": pa.array(rows.view)}
    if rows.label is not None:
        columns["label"] = pa.array(rows.label)
        packed.append("label")
    if rows.caption is not None:
        columns["caption"] = pa.array(rows.caption, pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=max(1, len(rows.index)), compression="none", use_dictionary=packed)
    return sink.getvalue()


def read_shard(path: Path, entry: ShardEntry, levels: Sequence[LevelSpec], split: SplitEntry, classes: int) -> ShardRows:
    """The rows of a shard, all checked. Raises CodesError: missing, sha256, columns, dtypes, rows, ranges.

    The bytes are read once: what is hashed is what is parsed, and a file that changes later changes nothing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CodesError(f"{path}: the shard is missing; {MANIFEST} lists it with {entry.rows} rows") from None
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise CodesError(f"{path}: sha256 {found}; {MANIFEST} says {entry.sha256}")
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_layout(file, path, entry, levels, split)
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CodesError(f"{path}: no readable parquet file: {str(error).splitlines()[0]}") from None
    for name in table.column_names:
        if table[name].null_count:
            raise CodesError(f"{path}: column {name!r} has {table[name].null_count} missing values; expected none")
    codes = [_codes(table[f"codes_{i}"], level, f"{path}: codes_{i}") for i, level in enumerate(levels)]
    index = _integers(table, "index", path, split.samples)
    view = _integers(table, "view", path, split.views)
    label = _integers(table, "label", path, classes) if split.labelled else None
    return ShardRows(codes, index, view, label, table["caption"].to_pylist() if split.captioned else None)


def _check_layout(file: pq.ParquetFile, path: Path, entry: ShardEntry, levels: Sequence[LevelSpec], split: SplitEntry) -> None:
    """Rows, columns and the lengths of the lists, from the footer: what bounds the memory that reading will take."""
    import pyarrow as pa

    if file.metadata.num_rows != entry.rows:
        raise CodesError(f"{path}: {file.metadata.num_rows} rows; {MANIFEST} says {entry.rows}")
    wanted = {f"codes_{i}" for i in range(len(levels))} | {"index", "view"}
    wanted |= {name for name, there in (("label", split.labelled), ("caption", split.captioned)) if there}
    schema = file.schema_arrow
    if sorted(schema.names) != sorted(wanted):
        raise CodesError(f"{path}: columns {sorted(schema.names)}; expected {sorted(wanted)}")
    for i, level in enumerate(levels):
        kind = schema.field(f"codes_{i}").type
        if not pa.types.is_fixed_size_list(kind) or kind.list_size != level.positions:
            grid = f"level {level.name!r} has a grid of {level.shape}, expected lists of {level.positions}"
            raise CodesError(f"{path}: codes_{i}: {kind}; {grid}")


def _codes(column: pa.ChunkedArray, level: LevelSpec, where: str) -> np.ndarray:
    import pyarrow as pa

    wanted = pa.from_numpy_dtype(code_dtype(level.vocab))
    flat = column.combine_chunks().flatten()
    if flat.type != wanted:
        small = pa.types.is_unsigned_integer(flat.type) and flat.type.bit_width < wanted.bit_width
        why = f", which is too small for vocab {level.vocab}" if small else ""
        if pa.types.is_signed_integer(flat.type) and len(flat) and (low := int(flat.to_numpy().min())) < 0:
            why = f" and holds {low}"
        raise CodesError(f"{where}: dtype {flat.type}{why}; level {level.name!r} needs {wanted}")
    values: np.ndarray = flat.to_numpy().reshape(-1, level.positions)
    if len(flat) and (high := int(values.max())) >= level.vocab:
        row = int((values >= level.vocab).any(1).argmax())
        raise CodesError(f"{where}: row {row} holds {high}; level {level.name!r} allows [0, {level.vocab - 1}]")
    return values


def _integers(table: pa.Table, name: str, path: Path, limit: int) -> np.ndarray:
    import pyarrow as pa

    if table[name].type != pa.int64():
        raise CodesError(f"{path}: column {name!r} is {table[name].type}; expected int64")
    values: np.ndarray = table[name].to_numpy()
    bad = (values < 0) | (values >= limit)
    if bad.any():
        row = int(bad.argmax())
        raise CodesError(f"{path}: {name} {int(values[row])} in row {row}; expected [0, {limit - 1}]")
    return values
