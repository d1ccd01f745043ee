"""Images that a data set holds as arrays of numbers: what is accepted, and the conversion to one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stage1_tokenizer.data.errors import DataError


def image_array(values: Sequence[Any] | np.ndarray[Any, Any], name: Callable[[int], str] = "image {}".format) -> np.ndarray[Any, Any]:
    """(N, C, h, w), uint8 or float32 in [-1, 1], C = 1 or 3.

    Args:
        values: N images (h, w), (h, w, C) or (C, h, w); whole numbers in [0, 255] or floating point in [0, 1].
        name: what to call an image in an error.

    Raises DataError for the first image of another shape or dtype, with NaN, inf, or values out of range.
    """
    images = [np.asarray(v) for v in values]
    if not images:
        raise DataError("data: no images")
    first = images[0]
    for i, image in enumerate(images):
        if image.shape != first.shape:
            raise DataError(f"data: {name(0)} has shape {first.shape}, {name(i)} has {image.shape}; arrays must be of one size")
        if image.dtype != first.dtype or image.dtype.kind not in "iuf":
            expected = "whole numbers in [0, 255] or floating point in [0, 1], all alike"
            raise DataError(f"data: {name(i)} holds {image.dtype}; expected {expected}")
    x = _channels_first(np.stack(images), name)
    top = 1.0 if x.dtype.kind == "f" else 255
    flat = x.reshape(len(x), -1)
    bad = np.flatnonzero(~((flat.min(1) >= 0) & (flat.max(1) <= top)))  # NaN compares as false
    if len(bad):
        i = int(bad[0])
        kind = "floating point" if top == 1 else "whole numbers"
        raise DataError(f"data: {name(i)} holds values in [{flat[i].min()}, {flat[i].max()}]; expected {kind} in [0, {top:g}]")
    return (2 * x - 1).astype(np.float32) if x.dtype.kind == "f" else x.astype(np.uint8)


def _channels_first(x: np.ndarray[Any, Any], name: Callable[[int], str]) -> np.ndarray[Any, Any]:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return x
    raise DataError(f"data: {name(0)} has shape {x.shape[1:]}; expected (h, w), (h, w, C) or (C, h, w) with 1 or 3 channels")
