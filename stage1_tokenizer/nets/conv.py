"""Convolutional encoder and decoder on 1, 2 or 3 axes: strided stages with residual blocks, mirrored."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from intarsia.config import Added
from intarsia.specs import SignalSpec
from stage1_tokenizer.nets.base import NETS, Net, NetConfig
from stage1_tokenizer.nets.blocks import CONV, Activation, Norm, ResidualBlock, Upsample, Upsampling, downsample, stage, unpatch

__all__ = ["CONV", "ConvConfig", "ConvNet", "unpatch"]


class ConvConfig(NetConfig):
    """One stage per width; each after the first halves the grid: the stride is patch * 2^(len(widths) - 1)."""

    widths: tuple[int, ...] = (64, 96)
    """Channels of the stages, fine to coarse."""
    blocks: tuple[int, ...] = (1, 2)
    """Residual blocks of each stage in the decoder."""
    encoder_blocks: tuple[int, ...] | None = (1, 0)
    """Residual blocks of each stage in the encoder; null = as in the decoder."""
    patch: Annotated[int, Field(ge=1)] = 2
    """The first and last layer work on patches of this many samples an axis: nothing runs at full resolution. 1 = off."""
    norm: Norm = "group"
    """Normalisation in the residual blocks; `none` keeps the receptive field finite."""
    upsample: Upsampling = "transposed"
    """4-wide transposed convolutions, or nearest-neighbour upsampling and a 3-wide convolution."""
    attention: Added[tuple[int, ...]] = ()
    """Stages (0 = the finest) whose blocks end with self-attention over the grid, in encoder and decoder."""

    def model_post_init(self, context: Any) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths: {self.widths} must be one or more positive numbers")
        for name, blocks in (("blocks", self.blocks), ("encoder_blocks", self.encoder_blocks)):
            if blocks is not None and (len(blocks) != len(self.widths) or min(blocks) < 0):
                raise ValueError(f"{name}: {blocks}; expected {len(self.widths)} counts, one for each of widths {self.widths}")
        if len(set(self.attention)) != len(self.attention) or not set(self.attention) <= set(range(len(self.widths))):
            raise ValueError(f"attention: {self.attention}; expected different stages in [0, {len(self.widths) - 1}]")


@NETS.register("conv", ConvConfig)
class ConvNet(Net):
    """4-wide strided convolutions downwards, the mirror upwards (the reference of van den Oord et al. 2017, normalised)."""

    def __init__(self, config: ConvConfig, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        axes, widths = len(signal.shape), config.widths
        patch, factor = config.patch, config.patch * 2 ** (len(widths) - 1)
        if any(s % factor for s in signal.shape):
            made = f"patch {patch} and {len(widths)} widths make a stride of {factor}"
            raise ValueError(f"net: {made}; signal shape {signal.shape} is no multiple of it")
        self.config = config
        self.width = widths[-1]
        self.stride = (factor,) * axes
        self.grid = tuple(s // factor for s in signal.shape)
        encoder_blocks = config.blocks if config.encoder_blocks is None else config.encoder_blocks
        conv, norm = CONV[axes], config.norm

        first = conv(signal.channels, widths[0], 3, padding=1) if patch == 1 else conv(signal.channels, widths[0], patch, stride=patch)
        down: list[nn.Module] = [first]
        for i, width in enumerate(widths):
            if i:
                down += [Activation(widths[i - 1], norm), downsample(axes, widths[i - 1], width)]
            down += stage(axes, width, norm, encoder_blocks[i], i in config.attention)
        self.encoder = nn.Sequential(*down, Activation(widths[-1], norm))

        up: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            up += stage(axes, widths[i], norm, config.blocks[i], i in config.attention)
            up += [Activation(widths[i], norm)]
            if i:
                up += [Upsample(axes, widths[i], widths[i - 1], config.upsample)]
        self.decoder = nn.Sequential(*up, conv(widths[0], signal.channels * patch**axes, 3, padding=1))
        self.halo = None if norm == "group" or config.attention else max(self._encoder_reach(encoder_blocks), self._decoder_reach())

    def _encoder_reach(self, blocks: tuple[int, ...]) -> int:
        """How many cells beyond its own patch a code sees: the cell's interval of samples, followed from the code back."""
        first, last = 0, 0
        for i in reversed(range(len(blocks))):
            first, last = first - 2 * blocks[i], last + 2 * blocks[i]
            if i:
                first, last = 2 * first - 1, 2 * last + 2
        if self.config.patch == 1:
            first, last = first - 1, last + 1
        else:
            first, last = self.config.patch * first, self.config.patch * last + self.config.patch - 1
        return math.ceil(max(-first, last - (self.stride[0] - 1)) / self.stride[0])

    def _decoder_reach(self) -> int:
        """How many cells beyond its own a sample depends on, followed from a cell's patch back to the codes."""
        first, last = 0, self.stride[0] // self.config.patch - 1
        first, last = first - 1, last + 1
        for i, blocks in enumerate(self.config.blocks):
            first, last = first - 2 * blocks, last + 2 * blocks
            if i < len(self.config.blocks) - 1:
                first, last = (first - 1) // 2, (last + 1) // 2  # both kinds of upsampling: at most one sample on either side
        return max(-first, last)

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder[-1].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, features: Tensor, kind: Tensor | None = None) -> Tensor:
        for layer in self.decoder:
            features = layer(features, kind) if isinstance(layer, (ResidualBlock, Activation)) else layer(features)
        return unpatch(features, self.config.patch)

    def tell(self, kinds: int) -> None:
        for layer in self.decoder:
            if isinstance(layer, (ResidualBlock, Activation)):
                layer.tell(kinds)
