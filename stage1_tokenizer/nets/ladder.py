"""Grids coarser than a net's own: what leads down to them, up from them, and from any of them straight to a signal."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from intarsia.config import Config
from stage1_tokenizer.nets.blocks import CONV, Activation, Upsample, downsample, stage, unpatch

LEAST_WIDTH = 32


class GridConfig(Config):
    """One coarser grid."""

    width: Annotated[int, Field(ge=1)] = 128
    """Channels on this grid."""
    factor: Annotated[int, Field(ge=2)] = 2
    """Cells of the next finer grid per cell, along each axis; a power of two."""
    blocks: Annotated[int, Field(ge=0)] = 2
    """Residual blocks on the way up, from the codes."""
    encoder_blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks on the way down, to the codes."""
    attention: bool = False
    """Self-attention after the blocks, in both directions."""

    def model_post_init(self, context: object) -> None:
        if self.factor & (self.factor - 1):
            raise ValueError(f"factor: {self.factor}; expected a power of two")

    @property
    def doublings(self) -> int:
        """log2 of the factor."""
        return self.factor.bit_length() - 1


class Down(nn.Sequential):
    """Activated features of the next finer grid (B, finer, *grid) to activated ones of this: (B, width, *(grid / factor))."""

    def __init__(self, axes: int, config: GridConfig, finer: int, norm: str) -> None:
        layers: list[nn.Module] = [downsample(axes, finer, config.width)]
        for _ in range(config.doublings - 1):
            layers += [Activation(config.width, norm), downsample(axes, config.width, config.width)]
        layers += stage(axes, config.width, norm, config.encoder_blocks, config.attention)
        super().__init__(*layers, Activation(config.width, norm))


class Up(nn.Sequential):
    """Features of this grid (B, width, *grid) to features of the next finer one: (B, finer, *(factor grid))."""

    def __init__(self, axes: int, config: GridConfig, finer: int, norm: str, kind: str) -> None:
        layers = stage(axes, config.width, norm, config.blocks, config.attention)
        width = config.width
        for _ in range(config.doublings):
            layers += [Activation(width, norm), Upsample(axes, width, finer, kind)]
            width = finer
        super().__init__(*layers)


class Head(nn.Module):
    """Features of any grid to the signal, cheaply: blocks on the grid, few and narrowing layers above it, patches at the end.

    Args:
        stride: samples of the signal per cell, along each axis. It is halved by upsampling, and the width with it (not below
            32), until two samples are left on some axis; the rest is a patch.
    """

    def __init__(self, axes: int, width: int, stride: tuple[int, ...], channels: int, blocks: int, norm: str, kind: str) -> None:
        super().__init__()
        layers = [*stage(axes, width, norm, blocks), Activation(width, norm)]
        while min(stride) > 2 and all(s % 2 == 0 for s in stride):
            narrower = min(width, max(LEAST_WIDTH, width // 2))
            layers += [Upsample(axes, width, narrower, kind), Activation(narrower, norm)]
            stride, width = tuple(s // 2 for s in stride), narrower
        self.patch = stride
        self.layers = nn.Sequential(*layers, CONV[axes](width, channels * math.prod(stride), 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        return unpatch(self.layers(features), self.patch)
