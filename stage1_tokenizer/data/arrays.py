"""A split that is held in memory as one array; batches are cut out of it without a loop over samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.specs import KINDS, SignalSpec
from stage1_tokenizer.data.base import DataError, Split, caption_bytes, check_captions, digest_arrays
from stage1_tokenizer.data.transform import TransformConfig, take, to_signal

_KIND_OF_AXES = {axes: kind for kind, axes in KINDS.items()}


class ArraySplit(Split):
    """Signals of one size in memory, for images as for sound and video.

    Args:
        x: (N, C, *axes), uint8 in [0, 255] or floating point in [-1, 1].
        labels: (N,) integers, or None.
        transform: how to resize (images only) and augment; it is applied to ``x`` once, apart from what is random.
        origin: (N,) int64, positions in the source's own order; counted up without it.
        captions: a text for each sample, or None.

    Raises DataError naming the first bad index for another shape or dtype, NaN, inf, or values out of range.
    """

    in_memory = True

    def __init__(
        self,
        x: Any,
        labels: Any = None,
        transform: TransformConfig | None = None,
        origin: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.transform = transform or TransformConfig()
        self.raw = check_array(torch.as_tensor(x))
        self.x = resize_array(self.raw, self.transform)
        self.labels = None if labels is None else check_label_array(torch.as_tensor(labels), len(self.x))
        self.origin = torch.arange(len(self.x)) if origin is None else origin
        self.captions = check_captions(captions, len(self.x))
        sizes = self.x.shape[2:]
        self.out = tuple(self.transform.target(*sizes)) if len(sizes) == 2 else tuple(sizes)
        self.transform.check_shift(self.out)
        self.signal = SignalSpec(_KIND_OF_AXES[len(sizes)], self.x.shape[1], self.out)

    def _signals(self, indices: Tensor, epochs: Tensor | int | None, seed: int, view: int) -> Tensor:
        return to_signal(take(self.x, self.transform, self.out, indices, epochs, seed, view))

    def select(self, rows: Tensor) -> ArraySplit:
        part = copy.copy(self)  # what is resized already stays so
        part.raw = self.raw[rows]
        part.x = part.raw if self.x is self.raw else self.x[rows]
        part.labels = None if self.labels is None else self.labels[rows]
        part.origin = self.origin[rows]
        part.captions = self._captions_at(rows)
        return part

    def digest(self) -> str:
        return digest_arrays(self.raw.numpy(), None if self.labels is None else self.labels.numpy(), caption_bytes(self.captions))


def check_label_array(labels: Tensor, n: int) -> Tensor:
    """(n,) int64. Raises DataError for another shape, or for other than whole numbers."""
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"data: labels of {labels.dtype} and shape {tuple(labels.shape)}; expected {n} whole numbers, one each")
    return labels.to(torch.int64)


def check_array(x: Tensor) -> Tensor:
    """The array as uint8, or as float32 in [-1, 1]; DataError names the first bad index."""
    if x.ndim - 2 not in _KIND_OF_AXES or 0 in x.shape:
        raise DataError(f"data: an array of shape {tuple(x.shape)}; expected (samples, channels, *axes), none empty")
    if x.dtype == torch.uint8:
        return x.contiguous()
    if not x.is_floating_point():
        raise DataError(f"data: an array of {x.dtype}; expected torch.uint8, or floating point in [-1, 1]")
    worst = x.abs().flatten(1).amax(1)  # NaN propagates
    bad = (~(worst <= 1)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(f"data: sample {row} holds {worst[row].item():g} as its largest magnitude; expected finite values in [-1, 1]")
    return x.to(torch.float32).contiguous()


def resize_array(x: Tensor, transform: TransformConfig) -> Tensor:
    """(N, C, h, w) with the transform's channels, resized as it says; other signals than images pass."""
    if x.ndim != 4:
        if transform.size is not None or transform.channels not in (None, x.shape[1]):
            raise DataError(f"data.transform: size and channels are for images; the signals have shape {tuple(x.shape[1:])}")
        return x
    if transform.channels == 1 and x.shape[1] == 3:
        x = grey(x)
    elif transform.channels not in (None, x.shape[1]) and (transform.channels, x.shape[1]) != (3, 1):
        raise DataError(f"data.transform.channels: {transform.channels}, but the data have {x.shape[1]}")
    height, width = x.shape[2:]
    scaled, target = transform.scaled(height, width), transform.target(height, width)
    if scaled[0] < target[0] or scaled[1] < target[1]:
        raise DataError(
            f"data.transform.size: {target} is larger than the images, {(height, width)}; set transform.resize to shorter or exact"
        )
    if reason := transform.too_large(height, width):
        raise DataError(f"data.transform.size: {reason}")
    if scaled != (height, width):
        x = torch.stack([resize_one(image, scaled) for image in x])
    if transform.crop == "center" and transform.shift == 0:
        top, left = ((s - t) // 2 for s, t in zip(scaled, target, strict=True))
        x = x[:, :, top : top + target[0], left : left + target[1]]  # no more is ever asked for
    return x.expand(-1, transform.channels or -1, -1, -1).contiguous()


def grey(x: Tensor) -> Tensor:
    """(N, 3, h, w) to (N, 1, h, w): the luma of ITU-R 601-2, as PIL rounds it."""
    weights = torch.tensor([19595, 38470, 7471]) if x.dtype == torch.uint8 else torch.tensor([0.299, 0.587, 0.114])
    total = (x.to(weights.dtype) * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return ((total + 0x8000) >> 16).to(torch.uint8) if x.dtype == torch.uint8 else total


def resize_one(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) to (C, *size) by PIL's antialiased Lanczos filter."""
    from PIL import Image

    planes = []
    for plane in image.numpy():
        scaled = Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.LANCZOS)
        planes.append(np.asarray(scaled))
    out = torch.from_numpy(np.stack(planes))
    return out.clamp_(-1, 1) if out.is_floating_point() else out
