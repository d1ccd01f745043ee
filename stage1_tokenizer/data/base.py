"""The data interface: a source holds splits, a split gives batches by index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor

from intarsia.config import Config
from intarsia.registry import Registry
from intarsia.specs import SignalSpec
from stage1_tokenizer.data.errors import DataError
from stage1_tokenizer.data.holdout import Holdout, check_holdout, held_out
from stage1_tokenizer.data.transform import TransformConfig

SOURCES: Registry[Source] = Registry("data source", "stage1_tokenizer.data")
SPLITS = ("train", "validation", "test")


class SourceConfig(Config, registry=SOURCES):
    """Base of the sources' configurations."""

    transform: TransformConfig = TransformConfig()
    """Size, crop, flip, shift and channels."""
    holdout: Holdout = None
    """Train samples held out as validation: a count, a share, or a list of indices (a shipped name, a ``.npy`` or text file);
    null: 5 % where the source has no validation split of its own; 0: none."""
    @field_validator("holdout", mode="before")
    @classmethod
    def _check_holdout(cls, value: Any) -> Any:
        return check_holdout(value)


class Split:
    """Samples by position. Thread-safe; the same batch for the same arguments on every rank.

    Attributes:
        signal: geometry of a sample after the transform.
        labels: (N,) int64 in [0, classes), or None where unlabelled.
        captions: a text for each sample, or None.
        origin: (N,) int64, the position of each sample in the source's own order, before anything was held out or skipped.
        in_memory: whether a batch is only looked up, not decoded.
    """

    signal: SignalSpec
    labels: Tensor | None
    captions: tuple[str, ...] | None = None
    origin: Tensor
    in_memory: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.origin.shape[0]

    def batch(self, indices: Tensor, epochs: Tensor | int | None = None, seed: int = 0, view: int = 0) -> dict[str, Tensor]:
        """The samples at ``indices`` (B,) int64, each in [0, N).

        Args:
            epochs: (B,) int64 or one number in training; None leaves the samples as they are, unless ``view`` > 0.
            seed: of the run. A draw is a function of (seed, epoch, view, index).
            view: the augmented copy that a dump asks for; 0 is the sample itself.

        Returns:
            ``x`` float32 (B, C, *axes) in [-1, 1], ``index`` int64 (B,) and, where labelled, ``label`` int64 (B,).
        """
        if view < 0:
            raise ValueError(f"view: {view} must not be negative")
        low, high = (int(v) for v in torch.aminmax(indices)) if indices.numel() else (0, -1)
        if low < 0 or high >= len(self):
            raise ValueError(f"indices: values in [{low}, {high}]; the split holds [0, {len(self) - 1}]")
        out = {"x": self._signals(indices, epochs, seed, view), "index": indices}
        if self.labels is not None:
            out["label"] = self.labels[indices]
        return out

    def _signals(self, indices: Tensor, epochs: Tensor | int | None, seed: int, view: int) -> Tensor:
        """float32 (B, C, *axes) in [-1, 1]."""
        raise NotImplementedError

    def loader(self, seed: int) -> Loader:
        """This split with a run's seed filled in, as a training loop reads it."""
        return Loader(self, seed)

    def select(self, rows: Tensor) -> Split:
        """The split that holds only ``rows`` (n,) int64, in that order."""
        raise NotImplementedError

    def _captions_at(self, rows: Tensor) -> tuple[str, ...] | None:
        """For ``select``."""
        return None if self.captions is None else tuple(self.captions[i] for i in rows.tolist())

    def digest(self) -> str:
        """sha256 of what the split holds: the data themselves, or the names and sizes of its files, labels and captions; the same on
        every machine."""
        raise NotImplementedError

    def sketch(self) -> str:
        """sha256 that tells most other data apart without a look at every sample, where that would take long: a run begins with it."""
        return self.digest()


@dataclass(frozen=True)
class Loader:
    """``len`` and ``batch(indices, epochs)`` of a split under one seed."""

    split: Split
    seed: int

    @property
    def in_memory(self) -> bool:
        """Whether a batch is only looked up."""
        return self.split.in_memory

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Tensor, epochs: Tensor | None = None) -> dict[str, Tensor]:
        return self.split.batch(indices, epochs, self.seed)


class Source:
    """Base class: ``__init__(config)``; raises DataError for data that cannot be used, before any training.

    Attributes:
        signal: geometry of a sample after the transform.
        classes: names of the labels; empty where unlabelled.
        skipped: the files that were left out, with the reason (``skip_bad``).
        near_duplicates: the distance (``near_duplicates.nearest``) up to which a held-out sample has a near neighbour in train, for
            data where that is frequent: an evaluation then reports those without one apart. None: it does not look.
    """

    type_name: ClassVar[str]
    signal: SignalSpec
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    near_duplicates: float | None = None

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._splits: dict[str, Split] = {}

    def _finish(self, splits: Mapping[str, Split], classes: tuple[str, ...]) -> None:
        """Takes the splits that the source itself has, checks the labels and holds out the validation split."""
        self.classes = classes
        found = dict(splits)
        if "train" not in found:
            raise DataError(f"data: no train split; found {', '.join(found) or 'none'}")
        for name, split in found.items():
            if len(split) == 0:
                raise DataError(f"data: the split {name!r} is empty")
            check_labels(split, name, len(classes))
            if split.signal != found["train"].signal:
                a, b = found["train"].signal, split.signal
                raise DataError(
                    f"data: train has {a.channels} channels of {a.shape}, {name} has {b.channels} of {b.shape}; "
                    "set transform.size and transform.channels"
                )
            for what in ("labels", "captions"):
                if (getattr(split, what) is None) != (getattr(found["train"], what) is None):
                    raise DataError(f"data: of the splits train and {name}, one has {what} and the other has none")
        held = held_out(self.config.holdout, len(found["train"]), "validation" in found)
        if held is not None:
            train = found["train"]
            found["validation"] = train.select(held.nonzero()[:, 0])
            found["train"] = train.select((~held).nonzero()[:, 0])
        self._splits = {name: found[name] for name in SPLITS if name in found}
        self.signal = found["train"].signal

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, among train, validation and test."""
        return tuple(self._splits)

    def split(self, name: str) -> Split:
        """Raises DataError for a split that the source does not have."""
        if name not in self._splits:
            raise DataError(f"data: no split {name!r}; this source has {', '.join(self._splits)}")
        return self._splits[name]

    def describe(self) -> dict[str, Any]:
        """What codes.json records of the data: names, counts, hashes and the transform; nothing that differs between two machines."""
        splits: dict[str, dict[str, Any]] = {}
        for name, split in self._splits.items():
            splits[name] = {"count": len(split), "sha256": split.digest()}
            if split.labels is not None:
                splits[name]["class_counts"] = torch.bincount(split.labels, minlength=len(self.classes)).tolist()
        return self._identity() | {
            "classes": list(self.classes),
            "splits": splits,
            "skipped": len(self.skipped),
            "transform": self.config.transform.to_dict(),
        }

    def summary(self) -> list[str]:
        """Lines for a reader: geometry, splits, classes, and what was left out."""
        axes = "x".join(map(str, self.signal.shape))
        lines = [f"{self.type_name}: {self.signal.kind}, {self.signal.channels} channels of {axes}"]
        for name, split in self._splits.items():
            counts = [] if split.labels is None else torch.bincount(split.labels, minlength=len(self.classes)).tolist()
            shown = ", ".join(f"{c} {n}" for c, n in zip(self.classes[:20], counts, strict=False))
            shown += ", ..." if len(counts) > 20 else ""
            lines.append(f"{name}: {len(split)} samples" + (f" ({shown})" if counts else ", unlabelled"))
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} that cannot be used:")
            lines += [f"  {line}" for line in self.skipped[:20]]
        return lines

    def _identity(self) -> dict[str, Any]:
        """The type, and what names the data without a path of this machine."""
        return {"type": self.type_name}


def check_labels(split: Split, name: str, classes: int) -> None:
    """Raises DataError for the first label outside [0, classes)."""
    if split.labels is None:
        return
    bad = ((split.labels < 0) | (split.labels >= classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        where = f"data: split {name!r}, sample {int(split.origin[row])}"
        raise DataError(f"{where}: label {int(split.labels[row])}; expected [0, {classes - 1}]")


def check_captions(captions: Sequence[str] | None, n: int) -> tuple[str, ...] | None:
    """Raises DataError for another number of captions than ``n``."""
    if captions is not None and len(captions) != n:
        raise DataError(f"data: {len(captions)} captions of {n} samples; expected one each")
    return None if captions is None else tuple(captions)


def caption_bytes(captions: Sequence[str] | None) -> np.ndarray[Any, Any] | None:
    """uint8, what a digest holds of captions."""
    return None if captions is None else np.frombuffer("\0".join(captions).encode(), np.uint8)


def digest_arrays(*arrays: np.ndarray[Any, Any] | None) -> str:
    """sha256 over shapes, types and values."""
    sha = hashlib.sha256()
    for array in arrays:
        if array is not None:
            sha.update(f"{array.dtype.str}{array.shape};".encode())
            sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
