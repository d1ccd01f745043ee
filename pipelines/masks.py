"""Masks of what is to be generated (True), on the axes of a signal: which codes stay, how seams are blended, how canvases grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.specs import SignalSpec
from pipelines.fit import whole

_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CELLS = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def check_size(x: Any, signal: SignalSpec) -> None:
    """Raises ValueError where the axes of ``x`` are not those that the priors were trained for."""
    if isinstance(x, Tensor) and x.ndim == 2 + len(signal.shape) and tuple(x.shape[2:]) != signal.shape:
        raise ValueError(f"x: axes {tuple(x.shape[2:])}; the priors were trained for {signal.shape}")


def check_mask(mask: Any, n: int, signal: SignalSpec) -> None:
    """Raises ValueError unless ``mask`` is a boolean tensor (n, 1, *axes)."""
    expected = (n, 1, *signal.shape)
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: a {type(mask).__name__}; expected a torch.bool tensor {expected}, True where to generate")
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}; expected torch.bool {expected}, True where to generate")


def kept_cells(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """(n, *grid) bool: the cells whose patch the mask (n, 1, *axes) leaves untouched.

    A cell's patch is its share of each axis, rounded outwards where the grid does not divide it. On a grid of another number of axes than
    the signal's, such as a row of tokens over an image, a cell's patch is the whole signal.
    """
    if len(grid) != mask.ndim - 2:
        return ~mask.flatten(1).any(1).view(-1, *[1] * len(grid)).expand(-1, *grid)
    touched = _CELLS[mask.ndim - 2](mask.float(), tuple(grid))
    return touched[:, 0] == 0


def filled(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (n, C, *axes) with each sample under the mask (n, 1, *axes), bool, replaced by the nearest known one along an axis.

    Beside a straight border that is the border repeated, as ``enlarged`` does it. A row of which nothing is known stays as it is.
    """
    mask = mask & ~mask.flatten(1).all(1).view(-1, *[1] * (mask.ndim - 1))
    while bool(mask.any()):
        nearest, best = torch.full(mask.shape, max(x.shape[2:]), device=x.device), x
        for axis in range(2, x.ndim):
            place = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (x.ndim - axis - 1))
            before = place.masked_fill(mask, -1).cummax(axis).values
            after = place.masked_fill(mask, x.shape[axis]).flip(axis).cummin(axis).values.flip(axis)
            for known, there in ((before, before >= 0), (after, after < x.shape[axis])):
                nearer = there & mask & ((place - known).abs() < nearest)
                nearest = torch.where(nearer, (place - known).abs(), nearest)
                values = x.gather(axis, known.clamp(0, x.shape[axis] - 1).expand_as(x))
                best = torch.where(nearer, values, best)
        x, mask = best, mask & (nearest == max(x.shape[2:]))
    return x


def generated_share(mask: Tensor, blend: int) -> Tensor:
    """(n, 1, *axes) float32: 1 inside the mask, falling linearly to 0 over ``blend`` samples outside of it (Chebyshev distance)."""
    share = mask.float()
    for distance in range(1, blend + 1):
        near = _POOL[mask.ndim - 2](mask.float(), 2 * distance + 1, stride=1, padding=distance)
        share = torch.maximum(share, near * (1 - distance / (blend + 1)))
    return share


def enlarged(x: Tensor, margins: Any, signal: SignalSpec) -> tuple[Tensor, Tensor]:
    """``x`` (n, C, *axes) on a canvas of the signal's size, and the mask (n, 1, *axes) of what is new.

    What is new repeats the border, so that codes beside it meet nothing foreign.

    Args:
        margins: for each axis (before, after), in samples.

    Raises:
        ValueError: for anything but a pair of whole numbers per axis, where they do not complete ``x`` to the signal's size, and for an
            ``x`` that is no floating-point tensor of as many axes.
    """
    axes = len(signal.shape)
    if not isinstance(margins, Sequence) or len(margins) != axes or any(not isinstance(m, Sequence) or len(m) != 2 for m in margins):
        raise ValueError(f"margins: {margins!r}; expected (before, after) for each of the {axes} axes")
    pairs = [tuple(whole(f"margins[{i}]", value, 0) for value in pair) for i, pair in enumerate(margins)]
    if not isinstance(x, Tensor) or x.ndim != 2 + axes or min(x.shape[2:]) == 0:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: {shape}; expected a tensor (batch, {signal.channels}, {axes} axes of at least 1)")
    if not x.is_floating_point():
        raise ValueError(f"x: dtype {x.dtype}; expected floating point")
    canvas = tuple(before + size + after for (before, after), size in zip(pairs, x.shape[2:], strict=True))
    if canvas != signal.shape:
        raise ValueError(f"margins: {margins!r} make {canvas} of {tuple(x.shape[2:])}; the priors were trained for {signal.shape}")
    sides = [side for pair in reversed(pairs) for side in pair]  # F.pad counts from the last axis
    mask = F.pad(x.new_zeros((x.shape[0], 1, *x.shape[2:])), sides, value=1.0).bool()
    return F.pad(x, sides, mode="replicate"), mask
