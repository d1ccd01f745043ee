"""What quantisers without a codebook share: each dimension is a digit, and a code is the number that its digits write."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.base import Quantizer, check_codes

MAX_CODES = 1 << 31


class ScalarQuantizer(Quantizer):
    """code = sum_i digit_i prod_{j<i} factor_j: the first dimension is the lowest digit. Priors with a head per digit rely on it.

    Attributes:
        factors: how many values each dimension has; there are ``dim`` of them.
        vocab: their product.
    """

    places: Tensor

    def __init__(self, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.dim = len(factors)
        self.vocab = math.prod(factors)
        if self.vocab > MAX_CODES:
            raise ValueError(f"{self.vocab} codes; at most {MAX_CODES} are possible")
        places = [math.prod(factors[:i]) for i in range(self.dim)]
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64), persistent=False)
        self._flag: Tensor | None = None

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        return (LevelSpec(name, self.vocab, grid, self.factors),)

    def to_codes(self, digits: Tensor) -> Tensor:
        """(..., D) int64 digits to (...) codes."""
        return (digits * self.places).sum(-1)

    def to_digits(self, codes: Tensor) -> Tensor:
        """(...) codes to (..., D) int64 digits."""
        sizes = torch.tensor(self.factors, dtype=torch.int64, device=codes.device)
        return torch.div(codes[..., None], self.places, rounding_mode="floor") % sizes

    def values(self, digits: Tensor) -> Tensor:
        """(..., D) int64 digits to the values that they stand for, float32 or, in a model of that, float64."""
        raise NotImplementedError

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        if len(codes) != 1:
            raise ValueError(f"codes: {len(codes)} maps; {self.type_name} has one")
        check_codes(codes[0], self.vocab)
        return self.values(self.to_digits(codes[0])).movedim(-1, 1)

    def note_finite(self, finite: Tensor) -> None:
        """Remembers whether this micro-batch was finite."""
        self._flag = finite if self._flag is None else self._flag & finite

    def finite(self) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=self.places.device) if self._flag is None else self._flag

    def discard(self) -> None:
        self._flag = None

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        self._flag = None
        return {}
