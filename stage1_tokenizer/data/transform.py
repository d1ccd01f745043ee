"""The transform of a data source: resize, crop, flip, shift and channels, as a function of (seed, epoch or view, index).

Resizing and the conversion of channels happen once, when a signal is decoded. What is random is where the window of the
final size lies in the resized signal and whether it is mirrored; both are index vectors, one per axis, so that a whole
batch is cut out of an array in memory by two gathers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from intarsia.config import Config
from intarsia.rng import uniform
from stage1_tokenizer.data.errors import DataError

MAX_ENLARGED = 1 << 24


class TransformConfig(Config):
    """What becomes of an image before a tokenizer sees it. Only training and extra views of a dump are augmented."""

    size: int | tuple[int, int] | None = None
    """Final size in pixels, one number or (height, width); without it, all images must have one size already."""
    resize: Literal["shorter", "exact", "none"] = "shorter"
    """How an image comes to ``size``: scaled to cover it and cropped, stretched to it, or cropped only. Antialiased (Lanczos)."""
    margin: int = 0
    """With ``resize: shorter``, the pixels by which the scaled image goes beyond ``size``, to be cropped away; at most ``size``."""
    crop: Literal["center", "random"] = "center"
    """Where training crops; evaluation always takes the centre."""
    flip: bool = False
    """Mirror left and right at random."""
    shift: int = 0
    """Move by up to this many pixels along each axis at random, fewer than there are; the border is repeated."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (colour); without it, what all images have."""

    @field_validator("size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        numbers = value if isinstance(value, tuple | list) else (value,)
        whole = all(type(n) is int and 0 < n <= 1 << 14 for n in numbers)
        if value is not None and not (whole and len(numbers) in (1, 2)):
            raise ValueError("expected a number of pixels, (height, width), each in [1, 16384], or null")
        return numbers[0] if value is not None and len(numbers) == 1 else value

    @field_validator("margin", "shift")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ValueError("must not be negative")
        return value

    def model_post_init(self, context: Any) -> None:
        if self.crop == "random" and (self.size is None or self.resize == "exact"):
            raise ValueError(f"crop: random, but size {self.size} with resize {self.resize!r} leaves nothing to crop away")
        if self.margin and (self.size is None or self.resize != "shorter"):
            raise ValueError(f"margin: {self.margin} with size {self.size} and resize {self.resize!r}; 'shorter' to a size has one")
        shorter = min(self.size) if isinstance(self.size, tuple) else self.size
        if shorter is not None and self.margin > shorter:
            raise ValueError(f"margin: {self.margin} with size {self.size}; expected at most {shorter}")
        if shorter is not None and self.shift >= shorter:
            raise ValueError(f"shift: {self.shift} with size {self.size}; expected less than {shorter}")

    @property
    def augments(self) -> bool:
        return self.flip or self.shift > 0 or self.crop == "random"

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The size to which an image of this size is resized, before the crop."""
        if self.size is None or self.resize == "none":
            return height, width
        h, w = self.target(height, width)
        if self.resize == "exact":
            return h, w
        factor = max((h + self.margin) / height, (w + self.margin) / width)
        return max(h, round(height * factor)), max(w, round(width * factor))

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The final size of an image of this size."""
        if self.size is None:
            return height, width
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def too_large(self, height: int, width: int) -> str:
        """Why an image of this size cannot be resized: a strip of a few pixels would become gigabytes; "" where it can be.

        It may have MAX_ENLARGED pixels then, or four times those of the final size, or as many as before.
        """
        (h, w), (rows, columns) = self.scaled(height, width), self.target(height, width)
        most = max(MAX_ENLARGED, 4 * rows * columns, height * width)
        return f"{width}x{height} becomes {w}x{h} for the size {columns}x{rows}; at most {most} pixels" if h * w > most else ""

    def check_shift(self, out: tuple[int, ...]) -> None:
        """Raises DataError where ``shift`` moves everything out of a signal of the final lengths ``out``."""
        if self.shift >= min(out):
            raise DataError(f"data.transform.shift: {self.shift}; expected less than {min(out)}, the shortest axis of the signals")


def windows(
    transform: TransformConfig,
    sizes: Tensor,
    out: tuple[int, ...],
    indices: Tensor,
    epochs: Tensor | int | None = None,
    seed: int = 0,
    view: int = 0,
) -> list[Tensor]:
    """Where each final sample lies in its resized signal.

    Args:
        sizes: (B, A) int64, the lengths of the A axes of each resized signal, each at least ``out``.
        out: the final lengths.
        indices: (B,) int64, the samples' indices; with ``epochs``, ``seed`` and ``view`` they key every draw.

    Returns:
        For each axis the positions (B, out[axis]) int64, each in [0, size).
    """
    slack = sizes - torch.tensor(out)
    start = slack // 2
    mirror = None
    if transform.augments and (epochs is not None or view > 0):
        epoch = torch.as_tensor(0 if epochs is None else epochs, dtype=torch.int64).reshape(-1, 1)
        draws = torch.arange(2 * len(out) + 1) + (view << 8)
        u = uniform(seed, "data.augment", indices[:, None], epoch, draws[None], dtype=torch.float64)
        if transform.crop == "random":
            start = (u[:, 1 : 1 + len(out)] * (slack + 1)).long()
        if transform.shift:
            start = start + (u[:, 1 + len(out) :] * (2 * transform.shift + 1)).long() - transform.shift
        mirror = u[:, 0] < 0.5 if transform.flip else None
    found = []
    for axis, length in enumerate(out):
        steps = torch.arange(length)
        if mirror is not None and axis == len(out) - 1:
            steps = torch.where(mirror[:, None], length - 1 - steps, steps)
        place = start[:, axis, None] + steps
        found.append(place.clamp_(min=0).minimum(sizes[:, axis, None] - 1) if transform.shift else place)
    return found


def cut(x: Tensor, rows: Tensor, places: list[Tensor]) -> Tensor:
    """``x[rows]`` (B, C, *out) at ``places`` (from ``windows``), from an array (N, C, *axes).

    The first axis is picked as whole rows of memory, the others by ``gather``: ten times faster than one advanced index.
    """
    batch, channels, axes = len(rows), x.shape[1], x.shape[2:]
    lines = (rows[:, None] * channels + torch.arange(channels))[:, :, None] * axes[0] + places[0][:, None]
    found = x.view(-1, *axes[1:]).index_select(0, lines.reshape(-1)).view(*lines.shape, *axes[1:])
    for axis, place in enumerate(places[1:], start=3):
        shape = [batch, *[1] * (len(axes) + 1)]
        shape[axis] = place.shape[1]
        wide = list(found.shape)
        wide[axis] = place.shape[1]
        found = found.gather(axis, place.view(shape).expand(wide))
    return found


def take(
    x: Tensor,
    transform: TransformConfig,
    out: tuple[int, ...],
    indices: Tensor,
    epochs: Tensor | int | None = None,
    seed: int = 0,
    view: int = 0,
) -> Tensor:
    """Rows ``indices`` of (N, C, *axes) as (B, C, *out): the centre, or where ``windows`` says for training and views."""
    axes = x.shape[2:]
    if transform.augments and (epochs is not None or view > 0):
        sizes = torch.tensor(axes).expand(len(indices), -1)
        return cut(x, indices, windows(transform, sizes, out, indices, epochs, seed, view))
    picked = x[indices]
    for axis, (size, length) in enumerate(zip(axes, out, strict=True), start=2):
        picked = picked.narrow(axis, (size - length) // 2, length)
    return picked


def to_signal(x: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]; floats pass."""
    return x.to(torch.float32).div_(127.5).sub_(1.0) if x.dtype == torch.uint8 else x

