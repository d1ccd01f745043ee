"""Data sets of the Hugging Face Hub, and local parquet, arrow, csv and json files or folders, as ``datasets`` reads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from intarsia.config import ConfigError, Place
from stage1_tokenizer.data.array_images import image_array
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, SPLITS, DataError
from stage1_tokenizer.data.decoded import Items
from stage1_tokenizer.data.image import ImageError
from stage1_tokenizer.data.preflight import DecodedConfig, DecodedSource, Part

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
MOST_CLASSES = 1 << 16  # numbers beyond are rather identifiers than classes
USUAL = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def check_split_names(value: dict[str, str]) -> dict[str, str]:
    """Raises ValueError where a key is none of train, validation and test."""
    wrong = [k for k in value if k not in SPLITS]
    if wrong or (value and "train" not in value):
        raise ValueError(f"expected the keys train and, if wanted, validation and test; got {', '.join(value)}")
    return value


class HubConfig(DecodedConfig):
    """A data set that ``datasets`` loads, by the names of its columns. Code that comes with a data set is never run."""

    path: Place[str] = ""
    """Name on the Hub, or a local file (parquet, arrow, csv, json) or folder (those, an image folder, or ``save_to_disk``)."""
    config: str = ""
    """The configuration of the data set, where it has several."""
    revision: str = ""
    """Branch, tag or commit on the Hub; name a commit to pin the data."""
    image: str = "image"
    """Column of the images: encoded images, paths in a local csv or json file, or arrays of numbers."""
    label: str = "label"
    """Column of the labels: whole numbers or names; empty for unlabelled data."""
    caption: str = ""
    """Column of the captions: one text each; empty for none."""
    splits: dict[str, str] = Field(default_factory=dict)
    """Ours to theirs, such as {train: "train[:90%]", validation: "train[90%:]"}; empty: by their usual names."""
    cache: Place[str] = ""
    """Where ``datasets`` keeps what it prepares; empty: its own default."""

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, value: dict[str, str]) -> dict[str, str]:
        return check_split_names(value)


@SOURCES.register("hub", HubConfig)
class HubSource(DecodedSource):
    """An image column of a data set that ``datasets`` reads."""

    config: HubConfig

    def __init__(self, config: HubConfig) -> None:
        super().__init__(config)
        if not config.path:
            raise ConfigError(["data.path: the name of a data set, or a local file or folder, is needed"])
        self.local = Path(config.path).exists()
        sets = self._load()
        labels, classes = self._labels(sets)
        captions = {name: self._captions(part, name) for name, part in sets.items()}
        column = next(iter(sets.values())).features[config.image]
        if _kind(column) == "array":
            self._take_arrays(sets, labels, captions, classes)
            return
        if _kind(column) == "path" and not self.local:
            raise DataError(f"data.image: the column {config.image!r} of {config.path!r} holds paths, which only local data may")
        below = str(Path(config.path).parent if Path(config.path).is_file() else config.path)
        parts = {n: Part(ArrowItems(d, config.image, f"{config.path} [{n}]", below), labels[n], captions[n]) for n, d in sets.items()}
        self._look(parts, classes)

    def _identity(self) -> dict[str, Any]:
        name = {} if self.local else {"path": self.config.path, "revision": self.config.revision}
        return {"type": "hub", "config": self.config.config, **name}

    def _load(self) -> dict[str, Dataset]:
        """Split -> data set, under our names, with the configured columns. Raises DataError."""
        try:
            found = load(self.config)
        except Exception as error:  # datasets and huggingface_hub raise many kinds, from OSError to their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"data.path: {self.config.path!r} cannot be loaded: {reason}") from error
        for name, part in found.items():
            for field, hint in (("image", ""), ("label", "; empty for unlabelled data"), ("caption", "")):
                column = getattr(self.config, field)
                if column and column not in part.column_names:
                    raise DataError(f"data.{field}: no column {column!r} in split {name!r}; it has {', '.join(part.column_names)}{hint}")
            if len(part) == 0:
                raise DataError(f"data: split {name!r} of {self.config.path!r} is empty")
        return found

    def _labels(self, sets: dict[str, Dataset]) -> tuple[dict[str, Tensor | None], tuple[str, ...]]:
        from datasets import ClassLabel

        column = self.config.label
        if not column:
            return dict.fromkeys(sets), ()
        values = {}
        for name, part in sets.items():
            values[name] = part.select_columns([column]).with_format("arrow")[:][column].to_pylist()
            for i, value in enumerate(values[name]):
                if not isinstance(value, int | str) or isinstance(value, bool):
                    raise DataError(f"data.label: split {name!r}, row {i}: {value!r}; expected a whole number or a name")
        self._check_labelled(sets, values)
        feature = next(iter(sets.values())).features[column]
        if isinstance(feature, ClassLabel):
            classes = tuple(feature.names)
        elif len(kinds := {type(v).__name__ for each in values.values() for v in each}) > 1:
            raise DataError(f"data.label: column {column!r} holds both {' and '.join(sorted(kinds))}; expected one of them")
        elif isinstance(values["train"][0], int):
            if (largest := max(max(v) for v in values.values())) >= MOST_CLASSES:
                raise DataError(f"data.label: {largest}; expected class numbers below {MOST_CLASSES}, or names (a column of strings)")
            classes = tuple(str(i) for i in range(max(max(v) for v in values.values()) + 1))
        else:
            classes = tuple(sorted(set(values["train"])))
            place = {c: i for i, c in enumerate(classes)}
            for name, names in values.items():
                unknown = [(i, n) for i, n in enumerate(names) if n not in place]
                if unknown:
                    i, label = unknown[0]
                    raise DataError(f"data.label: split {name!r}, row {i}: the label {label!r} is none of the train split's")
                values[name] = [place[n] for n in names]
        return {name: torch.tensor(v, dtype=torch.int64) for name, v in values.items()}, classes

    def _check_labelled(self, sets: dict[str, Dataset], values: dict[str, list[Any]]) -> None:
        """Raises DataError, with a way out, for a split whose labels are all -1: so the Hub marks test splits that keep theirs back."""
        bare = [name for name, labels in values.items() if set(labels) == {-1}]
        if not bare:
            return
        what = f"data.label: split {bare[0]!r} is unlabelled: all its labels are -1"
        if "train" in bare:
            raise DataError(f"{what}; data.label: '' takes no labels")
        found = self.config.splits or {name: self._theirs(name, part) for name, part in sets.items()}
        kept = {name: theirs for name, theirs in found.items() if name not in bare}
        shown = ", ".join(f"{name}: {theirs!r}" for name, theirs in kept.items())
        raise DataError(f'{what}; --data.splits "{{{shown}}}" leaves it out, data.label: \'\' takes no labels')

    def _theirs(self, name: str, part: Dataset) -> str:
        """The data set's own name of a split that was found by its usual ones; on a disk it is that of a folder."""
        return str(part.split) if part.split else next((n for n in USUAL[name] if Path(self.config.path, n).is_dir()), name)

    def _captions(self, part: Dataset, split: str) -> list[str] | None:
        column = self.config.caption
        if not column:
            return None
        values = part.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"data.caption: split {split!r}, row {i}: {value!r}; expected a text")
        return list(values)

    def _take_arrays(
        self,
        sets: dict[str, Dataset],
        labels: dict[str, Tensor | None],
        captions: dict[str, list[str] | None],
        classes: tuple[str, ...],
    ) -> None:
        splits: dict[str, ArraySplit] = {}
        for name, part in sets.items():
            values = part.select_columns([self.config.image]).with_format("numpy")[:][self.config.image]
            images = image_array(values, f"split {name!r}, row {{}}".format)
            splits[name] = ArraySplit(images, labels[name], self.config.transform, captions=captions[name])
        self._finish(splits, classes)


def load(config: HubConfig) -> dict[str, Dataset]:
    """Split -> data set, under our names."""
    import datasets

    path = Path(config.path)
    options: dict[str, Any] = {"cache_dir": config.cache or None}
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        on_disk = datasets.load_from_disk(str(path))
        everything = dict(on_disk) if isinstance(on_disk, datasets.DatasetDict) else {"train": on_disk}
        return _by_name(everything, config.splits)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"a file with the suffix {path.suffix!r}; expected one of {', '.join(READERS)}")
        arguments: tuple[str, ...] = (READERS[path.suffix],)
        options["data_files"] = {"train": str(path)}
    else:
        arguments = (config.path, config.config) if config.config else (config.path,)
        options["revision"] = None if path.is_dir() else config.revision or None
    if config.splits:
        return {ours: datasets.load_dataset(*arguments, split=theirs, **options) for ours, theirs in config.splits.items()}
    return _by_name(dict(datasets.load_dataset(*arguments, **options)), {})


def _by_name(everything: dict[str, Dataset], splits: dict[str, str]) -> dict[str, Dataset]:
    if splits:
        missing = [theirs for theirs in splits.values() if theirs not in everything]
        if missing:
            raise DataError(f"no split {missing[0]!r}; it has {', '.join(everything)}")
        return {ours: everything[theirs] for ours, theirs in splits.items()}
    found = {ours: next((everything[t] for t in usual if t in everything), None) for ours, usual in USUAL.items()}
    if found["train"] is None:
        raise DataError(f"it has no split train, but {', '.join(everything)}; name them in data.splits")
    return {ours: part for ours, part in found.items() if part is not None}


def _kind(feature: Any) -> str:
    """"image", "bytes", "path" or "array"."""
    from datasets import Image, Value

    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return "bytes"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "path"
    if isinstance(feature, Value | dict):
        raise DataError(f"data.image: a column of {feature}; expected images, bytes, paths or arrays of numbers")
    return "array"


class ArrowItems(Items):
    """The rows of one column of encoded images, of bytes, or of paths below a folder."""

    def __init__(self, rows: Dataset, column: str, where: str, below: str) -> None:
        from datasets import Image

        self.column, self.where, self.below = column, where, below
        kept = rows.select_columns([column])
        self.rows = kept.cast_column(column, Image(decode=False)) if isinstance(kept.features[column], Image) else kept

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> str | bytes:
        value = self.rows[i][self.column]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise ImageError("the value is null")
        return value if isinstance(value, bytes) else os.path.join(self.below, value)

    def name(self, i: int) -> str:
        value = self.rows[i][self.column]
        path = value["path"] if isinstance(value, dict) else value
        return f"{self.where} row {i}" + (f" ({path})" if isinstance(path, str) else "")

    def facts(self, i: int) -> bytes:
        value = self.open(i)
        return f"{len(value) if isinstance(value, bytes) else os.stat(value).st_size}\n".encode()

    def content(self, i: int) -> bytes:
        value = self.open(i)
        return value if isinstance(value, bytes) else Path(value).read_bytes()

    def select(self, rows: Tensor) -> ArrowItems:
        return ArrowItems(self.rows.select(np.asarray(rows)), self.column, self.where, self.below)
