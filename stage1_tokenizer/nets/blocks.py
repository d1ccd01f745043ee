"""What convolutional nets are built from, on 1, 2 or 3 axes: residual blocks, attention, layers that change the grid."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
HEAD_WIDTH = 64
Norm = Literal["group", "none"]
Upsampling = Literal["transposed", "nearest"]


def norm_layer(kind: str, width: int) -> nn.Module:
    """Group norm with at most 32 groups, of at least 8 channels unless there are fewer; a power of two that divides the width."""
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(math.gcd(32, max(1, width // 8), width), width)


def unpatch(x: Tensor, patch: int | tuple[int, ...]) -> Tensor:
    """(B, C prod(patch), *grid) to (B, C, *(patch grid)): a cell's channels become its patch (sub-pixel convolution, Shi et al. 2016).

    Args:
        patch: samples per cell, for all axes or for each.
    """
    sizes = (patch,) * (x.ndim - 2) if isinstance(patch, int) else patch
    if set(sizes) == {1}:
        return x
    axes = "xyz"[: x.ndim - 2]
    inside = " ".join(f"p{a}" for a in axes)
    outside = " ".join(f"({a} p{a})" for a in axes)
    factors = {f"p{a}": size for a, size in zip(axes, sizes, strict=True)}
    return rearrange(x, f"b (c {inside}) {' '.join(axes)} -> b c {outside}", **factors)


class Modulation(nn.Module):
    """x (1 + a_k) + b_k: channels scaled and shifted by the kind k of a sample (FiLM, Perez et al. 2018, arXiv:1709.07871).

    At first a = b = 0.
    """

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(kinds, width)), nn.Parameter(torch.zeros(kinds, width))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """x: (B, C, *grid); kind: (B,) int64."""
        scale, shift = (table[kind].view(*x.shape[:2], *[1] * (x.ndim - 2)).to(x.dtype) for table in (self.scale, self.shift))
        return x * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """x + conv3(act(norm(conv3(act(norm(x)))))), the last convolution starting small."""

    def __init__(self, axes: int, width: int, norm: str) -> None:
        super().__init__()
        conv = CONV[axes]
        self.norm1, self.conv1 = norm_layer(norm, width), conv(width, width, 3, padding=1)
        self.norm2, self.conv2 = norm_layer(norm, width), conv(width, width, 3, padding=1)
        self.told1: Modulation | None = None
        self.told2: Modulation | None = None
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def tell(self, kinds: int) -> None:
        """Makes ``forward`` take the kind of a sample, (B,) int64 in [0, kinds)."""
        self.told1, self.told2 = Modulation(kinds, self.conv1.in_channels), Modulation(kinds, self.conv2.in_channels)

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(_told(self.norm1(x), self.told1, kind)))
        return x + self.conv2(F.silu(_told(self.norm2(h), self.told2, kind)))


def _told(x: Tensor, modulation: Modulation | None, kind: Tensor | None) -> Tensor:
    if modulation is None:
        return x
    if kind is None:
        raise ValueError("kind: None; this decoder was told of kinds of samples and needs one for each")
    return modulation(x, kind)


class AttentionBlock(nn.Module):
    """x + out(attention(norm(x))) of every cell over the whole grid, in heads of about 64 channels; ``out`` starts small.

    The memory grows with the square of the number of cells, the receptive field is global.
    """

    def __init__(self, axes: int, width: int, norm: str) -> None:
        super().__init__()
        conv = CONV[axes]
        self.heads = math.gcd(width, max(1, width // HEAD_WIDTH))
        self.norm, self.qkv, self.out = norm_layer(norm, width), conv(width, 3 * width, 1), conv(width, width, 1)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)).flatten(2), "b (three h d) n -> three b h n d", three=3, h=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b (h d) n")
        return x + self.out(h.reshape(x.shape))


class Activation(nn.Module):
    """Normalisation and SiLU, before a layer that changes the grid or the width."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.width, self.norm = width, norm_layer(norm, width)
        self.told: Modulation | None = None

    def tell(self, kinds: int) -> None:
        """Makes ``forward`` take the kind of a sample, (B,) int64 in [0, kinds)."""
        self.told = Modulation(kinds, self.width)

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        return F.silu(_told(self.norm(x), self.told, kind))


def downsample(axes: int, width_in: int, width_out: int) -> nn.Module:
    """A 4-wide convolution that halves the grid."""
    return CONV[axes](width_in, width_out, 4, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles the grid."""

    def __init__(self, axes: int, width_in: int, width_out: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv: nn.Module
        if kind == "transposed":
            self.conv = TRANSPOSED[axes](width_in, width_out, 4, stride=2, padding=1)
        else:
            self.conv = CONV[axes](width_in, width_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.kind == "transposed" else F.interpolate(x, scale_factor=2.0, mode="nearest"))


def stage(axes: int, width: int, norm: str, blocks: int, attention: bool = False) -> list[nn.Module]:
    """The blocks of one grid: residual ones, then self-attention where it is on."""
    residual: list[nn.Module] = [ResidualBlock(axes, width, norm) for _ in range(blocks)]
    return [*residual, AttentionBlock(axes, width, norm)] if attention else residual
