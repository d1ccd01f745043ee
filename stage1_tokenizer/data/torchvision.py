"""The data sets of ``torchvision.datasets``, by the name of their class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from intarsia.config import ConfigError, Place
from intarsia.distributed import comm
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, DataError
from stage1_tokenizer.data.decoded import Items
from stage1_tokenizer.data.hub import check_split_names
from stage1_tokenizer.data.image import ImageError
from stage1_tokenizer.data.preflight import DecodedConfig, DecodedSource, Part

DOWNLOAD = 24 * 3600.0
_VALIDATION = ("val", "valid", "validation")


class TorchvisionConfig(DecodedConfig):
    """A data set of ``torchvision.datasets``. Its own reader is used; some of those unpickle what torchvision has downloaded."""

    name: str = ""
    """The class, such as CIFAR10."""
    root: Place[str] = ""
    """The folder that holds its files."""
    download: Place[bool] = False
    """Let torchvision download what is missing."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Other arguments of the class, such as {split: letters} for EMNIST."""
    labels: bool = True
    """Take its labels; they must be one whole number each."""
    splits: dict[str, str] = Field(default_factory=dict)
    """Ours to the values of its argument ``split``, such as {train: trainval, test: test}; empty: by their usual names."""

    @field_validator("options", mode="before")
    @classmethod
    def _check_options(cls, value: Any) -> Any:
        wrong = [k for k, v in value.items() if not isinstance(v, bool | int | float | str)] if isinstance(value, Mapping) else []
        if wrong:
            raise ValueError(f"{wrong[0]} must be a number, a text or a truth value")
        return value

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, value: dict[str, str]) -> dict[str, str]:
        return check_split_names(value)


@SOURCES.register("torchvision", TorchvisionConfig)
class TorchvisionSource(DecodedSource):
    """The images of one of torchvision's data sets."""

    config: TorchvisionConfig

    def __init__(self, config: TorchvisionConfig) -> None:
        super().__init__(config)
        sets = open_sets(config)
        parts: dict[str, Part] = {}
        arrays: dict[str, ArraySplit] = {}
        names: tuple[str, ...] = ()
        for split, data in sets.items():
            labels = labels_of(data, f"{config.name} [{split}]") if config.labels else None
            pixels = _pixels(data)
            if pixels is None:
                parts[split] = Part(ObjectItems(data, f"{config.name} [{split}]"), labels)
            else:
                arrays[split] = ArraySplit(pixels, labels, config.transform)
            if labels is not None:
                numbers = [str(i) for i in range(int(labels.max()) + 1)]
                names = max(names, class_names(data) or tuple(numbers), key=len)
        if arrays and not parts:
            self._finish(arrays, names)
        else:
            self._look(parts, names)

    def _identity(self) -> dict[str, Any]:
        return {"type": "torchvision", "name": self.config.name}


def find_class(name: str) -> type[Any]:
    """Raises ConfigError for a name that is no data set of torchvision."""
    from torchvision import datasets

    found = getattr(datasets, name, None) if name in datasets.__all__ else None
    if not (isinstance(found, type) and issubclass(found, datasets.VisionDataset)):
        raise ConfigError([f"data.name: {name!r} is no data set of torchvision.datasets, such as CIFAR10"])
    return found


def open_sets(config: TorchvisionConfig) -> dict[str, Any]:
    """Split -> data set, under our names. Raises ConfigError and DataError.

    What is to be downloaded is fetched by rank 0, before the others look: they wait for up to DOWNLOAD seconds.
    """
    if not config.download or comm.world_size == 1:
        return _open_sets(config)
    wait = comm.long_barrier(DOWNLOAD)
    try:
        found = _open_sets(config) if comm.rank == 0 else {}
    finally:
        wait()
    return found or _open_sets(config)


def _open_sets(config: TorchvisionConfig) -> dict[str, Any]:
    cls = find_class(config.name)
    known = {p for base in cls.__mro__ if base is not object for p in inspect.signature(base).parameters}
    fixed: dict[str, Any] = dict(config.options)
    unknown = [k for k in fixed if k not in known]
    if unknown:
        raise ConfigError([f"data.options: {config.name} has no argument {unknown[0]!r}; it has {', '.join(sorted(known - {'kwargs'}))}"])
    if "root" in inspect.signature(cls).parameters:
        if not config.root:
            raise ConfigError([f"data.root: the folder of the files of {config.name} is needed"])
        fixed["root"] = config.root
    if config.download and "download" in known:
        fixed["download"] = True
    own = inspect.signature(cls).parameters
    if "split" in own and "split" not in fixed:
        wanted = config.splits or _usual_splits(own["split"].default)
        return _by_split(config, cls, fixed, wanted, required=set(config.splits) or {"train"})
    if config.splits:
        raise ConfigError([f"data.splits: {config.name} has no argument split of its own to choose by"])
    if "train" in known and "train" not in fixed:
        return {ours: _open(config, cls, {**fixed, "train": ours == "train"}) for ours in ("train", "test")}
    return {"train": _open(config, cls, fixed)}


def _usual_splits(default: Any) -> dict[str, str]:
    train = default if isinstance(default, str) and default.startswith("train") else "train"
    held_out = () if train == "trainval" else _VALIDATION  # which holds the validation images already
    return {"train": train, **{f"validation{i}": name for i, name in enumerate(held_out)}, "test": "test"}


def _by_split(
    config: TorchvisionConfig, cls: type[Any], fixed: dict[str, Any], wanted: dict[str, str], required: set[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ours, theirs in wanted.items():
        name = "validation" if ours.startswith("validation") else ours
        if name in found:
            continue
        try:
            found[name] = _open(config, cls, {**fixed, "split": theirs})
        except DataError:
            raise
        except ValueError as error:  # torchvision: a value that the class does not know
            if ours in required:
                raise DataError(f"data.splits: {config.name} has no split {theirs!r}: {str(error).splitlines()[0]}") from error
    return found


def _open(config: TorchvisionConfig, cls: type[Any], arguments: dict[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except (RuntimeError, OSError, TypeError) as error:
        hint = "" if config.download else "; download: true lets torchvision fetch it"
        raise DataError(f"data.root: {config.name} in {config.root!r}: {str(error).splitlines()[0]}{hint}") from error


def _pixels(data: Any) -> Tensor | None:
    """(N, C, h, w) uint8 where the data set holds its images as one array."""
    held = getattr(data, "data", None)
    if not isinstance(held, np.ndarray | Tensor) or len(held) != len(data):
        return None
    x = torch.as_tensor(held)
    if x.dtype != torch.uint8 or x.ndim not in (3, 4):
        return None
    if x.ndim == 3:
        return x[:, None]
    if x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2)
    return x if x.shape[1] in (1, 3) else None


def labels_of(data: Any, where: str) -> Tensor:
    """(N,) int64, from the data set's attributes, or else from its samples. Raises DataError."""
    for attribute in ("targets", "labels", "_labels"):
        held = getattr(data, attribute, None)
        if held is not None and len(held) == len(data) and getattr(held, "ndim", 1) == 1:  # QMNIST's are rows of particulars
            found = held
            break
    else:
        first = data[0][1] if len(data) else 0
        number = isinstance(first, Tensor | np.generic | int) and torch.as_tensor(first).ndim == 0
        found = [data[i][1] for i in range(len(data))] if number else [first]  # one is enough to say what is wrong
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: its labels are no numbers; set labels to false") from error
    if labels.shape != (len(data),) or labels.is_floating_point() or labels.is_complex():
        found = f"labels of {labels.dtype} and shape {tuple(labels.shape)}"
        raise DataError(f"{where}: {found}; expected one whole number each; labels: false takes none")
    return labels.to(torch.int64)


def class_names(data: Any) -> tuple[str, ...]:
    """The names that the data set gives its classes, or none."""
    names = getattr(data, "classes", None)
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(n, str) for n in names) else ()


class ObjectItems(Items):
    """The samples of a data set that returns (PIL image, ...) for each position; ``rows`` are those that are taken."""

    def __init__(self, data: Any, where: str, rows: Tensor | None = None) -> None:
        self.data, self.where = data, where
        self.rows = torch.arange(len(data)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, i: int) -> Any:
        from PIL.Image import Image

        try:
            image = self.data[int(self.rows[i])][0]
        except Exception as error:  # each data set has a reader of its own
            raise ImageError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        if not isinstance(image, Image):
            raise ImageError(f"a {type(image).__name__}; expected a PIL image")
        return image

    def name(self, i: int) -> str:
        return f"{self.where} sample {int(self.rows[i])}"

    def facts(self, i: int) -> bytes:
        return b""

    def content(self, i: int) -> bytes:
        image = self.open(i)
        return f"{image.mode}{image.size};".encode() + bytes(image.tobytes())

    def select(self, rows: Tensor) -> ObjectItems:
        return ObjectItems(self.data, self.where, self.rows[rows])
