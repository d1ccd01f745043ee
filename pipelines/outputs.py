"""Signals on their way into a pipeline and out of it: public ranges, arrays, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intarsia.specs import SignalSpec

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = (1, 3)  # of images that Pillow holds as grey or RGB
OUTPUTS = ("pt", "np", "pil")


def to_public(x: Tensor, signal: SignalSpec) -> Tensor:
    """[-1, 1] inside to [0, 1] outside (audio stays in [-1, 1]), clamped, in float32 or wider."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.clamp(-1, 1) if signal.kind == "audio" else ((x + 1) / 2).clamp(0, 1)


def from_public(x: Any, signal: SignalSpec) -> Tensor:
    """[0, 1] outside to [-1, 1] inside (audio stays). Raises ValueError naming ``x`` and its first bad row."""
    low = -1.0 if signal.kind == "audio" else 0.0
    axes = ", ".join(map(str, signal.shape))
    if not isinstance(x, Tensor):
        raise ValueError(f"x: a {type(x).__name__}; expected a tensor (batch, {signal.channels}, {axes}) in [{low:g}, 1]")
    if x.ndim != 2 + len(signal.shape) or x.shape[1] != signal.channels:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected (batch, {signal.channels}, {axes})")
    if not x.is_floating_point():
        raise ValueError(f"x: dtype {x.dtype}; expected floating point in [{low:g}, 1]")
    if x.numel():
        least, most = x.flatten(1).aminmax(dim=1)  # NaN propagates
        bad = ~((least >= low - 5e-5) & (most <= 1 + 5e-5))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"x: row {row} holds values in [{least[row]:g}, {most[row]:g}]; expected [{low:g}, 1]")
    return x if signal.kind == "audio" else x * 2 - 1


def check_output(output: Any, signal: SignalSpec) -> None:
    """Raises ValueError where ``output`` is none of "pt", "np", "pil", or the signal is no picture that "pil" can hold."""
    if output not in OUTPUTS:
        raise ValueError(f"output: {output!r} is none of {', '.join(map(repr, OUTPUTS))}")
    if output == "pil" and (signal.kind != "image" or signal.channels not in CHANNELS):
        raise ValueError(f"output: 'pil' holds images of 1 or 3 channels; these are {signal.kind} of {signal.channels}")


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (n, C, H, W) in [0, 1] to (n, H, W, C) uint8, rounded."""
    return (x.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def to_pil(x: Tensor) -> list[Image]:
    """Images (n, C, H, W) in [0, 1] of 1 or 3 channels to pictures of mode L or RGB."""
    from PIL import Image

    return [Image.fromarray(rows[..., 0] if rows.shape[-1] == 1 else rows) for rows in to_uint8(x)]


def converted(x: Tensor, output: str) -> Tensor | np.ndarray | list[Image]:
    """(n, C, *axes) as ``output`` says: the tensor, an array of the same shape, or a list of pictures."""
    return x if output == "pt" else x.numpy() if output == "np" else to_pil(x)
