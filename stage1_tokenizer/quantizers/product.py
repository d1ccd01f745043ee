"""Product quantisation (Jegou et al. 2011): the channels in groups, each with a quantiser of its own; K^M effective codes."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, QuantizerConfig, check_latents
from stage1_tokenizer.quantizers.composite import Composite, joined_likely, named
from stage1_tokenizer.quantizers.vq import VQConfig


class ProductConfig(QuantizerConfig):
    """M quantisers of one configuration, side by side."""

    groups: Annotated[int, Field(ge=1, le=256)] = 4
    """M: the latents have M times the channels that ``inner`` takes."""
    inner: QuantizerConfig = VQConfig(codes=256, dim=8)
    """The quantiser of each group; every group has weights of its own."""


@QUANTIZERS.register("product", ProductConfig)
class Product(Composite):
    """Group i of D / M channels makes the maps "name/i". The loss is the mean of the groups', so that with a plain VQ inside its
    terms stay means over positions and all D dimensions."""

    def __init__(self, config: ProductConfig) -> None:
        super().__init__(config.inner, config.groups)
        self.config = config
        self.dim = config.groups * self.part(0).dim
        self.straight_through = self.part(0).straight_through
        self.soft = self.part(0).soft
        self.shrink = self.part(0).shrink

    def initialize(self, z: Tensor, rng: StepRng) -> None:
        for i, columns in enumerate(z.chunk(self.count, 1)):
            self.part(i).initialize(columns, rng.sub(i))

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        if self.training:  # a NaN in one group keeps the whole micro-batch out of the statistics of all
            z = torch.where(torch.isfinite(z.detach()).all(), z, torch.nan)
        outs = [
            self.part(i)(columns, None if rng is None else rng.sub(i), active=active) for i, columns in enumerate(z.chunk(self.count, 1))
        ]
        return Quantized(
            torch.cat([out.z for out in outs], 1),
            tuple(codes for out in outs for codes in out.codes),
            torch.stack([out.loss for out in outs]).mean(),
            named([out.stats for out in outs]),
            likely=joined_likely(outs),
        )

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        return torch.cat([self.part(i).decode(part) for i, part in enumerate(self.split_codes(codes))], 1)
