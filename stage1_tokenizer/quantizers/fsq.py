"""Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505): each dimension is bounded and rounded; no codebook, no loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    active_mean,
    at_least_float32,
    check_finite,
    check_latents,
    straight_through,
)
from stage1_tokenizer.quantizers.scalar import ScalarQuantizer

_MARGIN = 1e-3  # the bound lies this share outside of the outermost levels, so that their gradient does not vanish
_MOST = 512  # levels of one dimension; from 1 / _MARGIN on the margin would round to a level of its own


class FSQConfig(QuantizerConfig):
    """Levels per dimension; their number is D and their product K."""

    levels: tuple[int, ...] = (8, 8, 8)
    """L_i values for dimension i, odd or even. The paper: (8, 6, 5) for 2^8 codes, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12,
    (8, 8, 8, 6, 5) for 2^14, (8, 8, 8, 5, 5, 5) for 2^16; at least 5 each is recommended."""

    def model_post_init(self, context: Any) -> None:
        if not self.levels or not all(3 <= size <= _MOST for size in self.levels):
            raise ValueError(f"levels: {self.levels}; expected at least one, each of 3 to {_MOST} (lfq has two values a dimension)")


@QUANTIZERS.register("fsq", FSQConfig)
class FSQ(ScalarQuantizer):
    """q_i = round(bound_i(z_i)) / (L_i // 2) with bound_i(z) = h_i tanh(z + s_i) - o_i, where h_i = (1 + 0.001) (L_i - 1) / 2.

    Even L have no middle level: o_i = 1/2 and s_i = artanh(o_i / h_i), so that bound(0) = 0; for odd L both are 0. (The paper's
    listing has tan for artanh, which maps 0 to somewhere near.) Values are -1 ... 1 for odd L and -1 ... 1 - 2 / L for even L.
    The gradient passes the rounding unchanged and the bound by its derivative.
    """

    advice = Quantizer.advice | {"collapse": "fewer levels or dimensions; a smaller learning rate"}

    middle: Tensor
    radius: Tensor
    offset: Tensor
    shift: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config.levels)
        self.config = config
        half = [(size - 1) * (1 + _MARGIN) / 2 for size in config.levels]
        offset = [0.5 if size % 2 == 0 else 0.0 for size in config.levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        middle = [float(size // 2) for size in config.levels]
        for name, column in (("middle", middle), ("radius", half), ("offset", offset), ("shift", shift)):
            self.register_buffer(name, torch.tensor(column), persistent=False)
        self.shrink = 1 / (min(config.levels) - 1)

    def extra_repr(self) -> str:
        return f"levels={self.config.levels}, K={self.vocab}"

    def bound(self, z: Tensor) -> Tensor:
        """(..., D) latents to the open interval around the levels, in units of one level."""
        half, offset, shift = (t.to(z.dtype) for t in (self.radius, self.offset, self.shift))
        return half * torch.tanh(z + shift) - offset

    def compared(self, z: Tensor) -> Tensor:
        bounded = self.bound(at_least_float32(z).movedim(1, -1))
        return (bounded / self.middle.to(bounded.dtype)).movedim(-1, 1)

    def values(self, digits: Tensor) -> Tensor:
        return (digits - self.middle) / self.middle

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            finite = check_finite(z, self.training)
            if self.training:
                self.note_finite(finite)
            bounded = self.bound(at_least_float32(z).movedim(1, -1))
            digits = (bounded.detach().nan_to_num(0.0).round() + self.middle.to(bounded.dtype)).long()
            scaled = bounded / self.middle.to(bounded.dtype)
            chosen = self.values(digits).to(scaled.dtype)
            z_q = straight_through(scaled, chosen)
            error = active_mean((scaled.detach() - chosen).square(), active)
        return Quantized(z_q.movedim(-1, 1), (self.to_codes(digits),), z_q.new_zeros(()), {"quantization_error": error})
