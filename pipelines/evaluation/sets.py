"""Sets of images as the figures need them: features, predicted classes, small pixel vectors; never all images in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intarsia.rng import permutation
from intarsia.specs import SignalSpec
from pipelines.evaluation.distances import FeatureSet
from pipelines.evaluation.features import FeatureModel
from pipelines.evaluation.memorisation import pixel_vectors
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.metrics import unit
from stage1_tokenizer.sizes import rows_at_once

Labelled = tuple[Tensor, Tensor | None]  # images (b, C, H, W) in [0, 1], labels (b,) int64


@dataclass(frozen=True)
class ImageSet:
    """What is kept of n images.

    Attributes:
        name: as it stands in the figures.
        features: (n, F) float32.
        predicted: (n,) int64, the classes that the feature model sees.
        labels: (n,) int64, the true classes or those asked for; None where there are none.
        pixels: (n, D) float32, see ``pixel_vectors``; None where not asked for.
        images: (m, C, H, W) uint8, the first m images, in a temporary file that goes with the tensor; None where not asked for.
        balanced: the number of images per class was fixed, and resampling keeps it.
    """

    name: str
    features: Tensor
    predicted: Tensor
    labels: Tensor | None
    pixels: Tensor | None = None
    images: Tensor | None = None
    balanced: bool = False

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def strata(self) -> Tensor | None:
        """The labels that resampling keeps the numbers of; None where it keeps none."""
        return self.labels if self.balanced else None

    def feature_set(self) -> FeatureSet:
        return FeatureSet(self.name, self.features, self.strata)

    def right(self) -> Tensor:
        """(n,) bool: the feature model sees the class that the image should have."""
        if self.labels is None:
            raise ValueError(f"{self.name}: these images have no labels")
        return self.predicted == self.labels


class OnDisk:
    """Rows of bytes that grow in a temporary file, then one tensor over it: any number of images in little memory.

    Args:
        folder: where the file is; the system's temporary folder where None, which may lie in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file, self._shape = tempfile.TemporaryFile(dir=folder), [0]  # noqa: SIM115 (``tensor`` closes it)

    def __len__(self) -> int:
        return self._shape[0]

    def add(self, rows: Tensor) -> None:
        """rows: (m, *shape) uint8 on the CPU, of one shape."""
        self._file.write(rows.contiguous().numpy().data)
        self._shape = [len(self) + len(rows), *rows.shape[1:]]

    def tensor(self) -> Tensor:
        """(n, *shape) uint8; the file goes with it. Once, at the end, with at least one row."""
        with self._file:
            return torch.from_numpy(np.memmap(self._file, np.uint8, "r+", shape=tuple(self._shape)))


def measure(
    name: str,
    batches: Iterable[Labelled],
    model: FeatureModel,
    *,
    pixels: bool = False,
    images: int = 0,
    folder: Path | None = None,
    balanced: bool = False,
) -> ImageSet:
    """Runs the feature model over ``batches``, and keeps pixel vectors and the first ``images`` images; all results on the CPU.

    Args:
        folder: of the temporary file that holds the images; see ``OnDisk``.
    """
    features, predicted, labels, vectors = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    kept = OnDisk(folder)
    for x, label in batches:
        f, p = model(x)
        features.append(f.cpu())
        predicted.append(p.cpu())
        if label is not None:
            labels.append(label.cpu())
        if pixels:
            vectors.append(pixel_vectors(x).cpu())
        if images > len(kept):
            kept.add((x[: images - len(kept)] * 255).round().to(torch.uint8).cpu())
    if not features:
        raise ValueError(f"{name}: the set holds no images")
    return ImageSet(
        name,
        torch.cat(features),
        torch.cat(predicted),
        torch.cat(labels) if labels else None,
        torch.cat(vectors) if pixels else None,
        kept.tensor() if images else None,
        balanced and bool(labels),
    )


def real_batches(split: Split, rows: Tensor | None = None) -> Iterator[Labelled]:
    """The images of a split at ``rows`` (all by default)."""
    for part in (torch.arange(len(split)) if rows is None else rows).split(rows_at_once(split.signal)):
        batch = split.batch(part)
        yield unit(batch["x"]), batch.get("label")


def in_batches(rows: Iterable[tuple[int, Tensor]], labels: Tensor | None, signal: SignalSpec) -> Iterator[Labelled]:
    """What ``TwoStagePipeline.stream`` gives, images of ``signal``, stacked; ``labels`` (n,) are those asked for."""
    size = rows_at_once(signal)
    ids: list[int] = []
    images: list[Tensor] = []
    for i, x in rows:
        ids.append(i)
        images.append(x)
        if len(ids) == size:
            yield torch.stack(images), None if labels is None else labels[ids]
            ids, images = [], []
    if ids:
        yield torch.stack(images), None if labels is None else labels[ids]


def balanced_labels(n: int, classes: int) -> Tensor:
    """(n,) int64: the classes in turn, so that every leading part is balanced, too."""
    return torch.arange(n) % classes


def can_balance(split: Split, n: int, classes: int) -> bool:
    """Whether ``n`` rows of a split, or all of them where there are no more, can hold equally many of each class, to one row."""
    if split.labels is None or classes < 1:
        return False
    counts = torch.bincount(split.labels, minlength=classes)
    if n >= len(split):
        return int(counts.max() - counts.min()) <= 1
    return int(counts.min()) >= -(-n // classes)


def choose_rows(split: Split, n: int, seed: int, classes: int = 0) -> Tensor:
    """(min(n, N),) int64: ``n`` of the N rows of a split, drawn without replacement.

    With ``classes`` > 0 the drawn rows hold the classes in turn, as ``balanced_labels``; ValueError where a class has too few.
    All rows, in random order, where there are no more than ``n``; with ``classes`` ValueError where they are not balanced.
    """
    order = permutation(seed, "reference", len(split))
    if classes == 0:
        return order[:n]
    if split.labels is None:
        raise ValueError("reference: the split has no labels to balance; set balanced to false")
    if n >= len(split):
        if not can_balance(split, n, classes):
            counts = torch.bincount(split.labels, minlength=classes).tolist()
            raise ValueError(f"reference: {len(split)} images with {min(counts)} to {max(counts)} per class are not balanced; lower n")
        return order
    asked = balanced_labels(n, classes)
    out = torch.empty(n, dtype=torch.int64)
    for c in range(classes):
        places = (asked == c).nonzero()[:, 0]
        mine = order[split.labels[order] == c]
        if len(mine) < len(places):
            raise ValueError(f"reference: {n} balanced images need {len(places)} of class {c}, there are {len(mine)}; lower n")
        out[places] = mine[: len(places)]
    return out
