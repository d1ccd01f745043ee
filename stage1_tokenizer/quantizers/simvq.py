"""SimVQ (Zhu et al. 2024, arXiv:2411.02038): the codebook is a frozen random basis times a learned linear map."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from intarsia.inference import whole_float32
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.assign import Estimator, assign
from stage1_tokenizer.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    at_least_float32,
    check_finite,
    check_latents,
)
from stage1_tokenizer.quantizers.codebook import CodebookQuantizer
from stage1_tokenizer.quantizers.search import nearest

WEAK_BETA = 0.1  # what `remedies` set


class SimVQConfig(QuantizerConfig):
    """K codes in D dimensions that move together."""

    codes: Annotated[int, Field(ge=1)] = 512
    """Codebook size K."""
    dim: Annotated[int, Field(ge=1)] = 32
    """Code dimension D."""
    beta: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the commitment term, on the encoder only."""
    init: Literal["moments", "identity"] = "moments"
    """The map at first: the one that gives the codes mean and covariance of the first latents, or I/D, for codes from N(0, I/D)."""
    estimator: Estimator = "straight_through"
    """What the decoder's gradient becomes for the encoder: the same, or turned back with z_e to e_k (Fifty et al. 2024)."""


@QUANTIZERS.register("simvq", SimVQConfig)
class SimVQ(CodebookQuantizer):
    """e_k = W c_k + b, with c_k drawn from N(0, D I) once and never trained; W and b learn by the codebook term |sg[z_e] - e|^2.

    The gradient of the codes in use moves all others with them, so that fewer are left behind than of free vectors; there are no
    averages and no restarts.
    Deviations from the paper: the offset b (its published code has it too); the start from the latents' moments, in place of a
    random W, so that codes lie where latents are from the first step on; and c_k of length D, not 1. Adam moves an entry of W by
    about the learning rate, so a code by that times the length of c_k: shorter ones fall behind the encoder.
    """

    advice = Quantizer.advice | {"collapse": "init: moments; beta: 0.1; fewer codes", "far": "init: moments; beta: 0.25"}
    basis: Tensor

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config.codes, config.dim)
        self.config = config
        self._beta = config.beta  # a remedy may change it
        self.straight_through = config.estimator == "straight_through"
        self.register_buffer("basis", nn.init.normal_(torch.empty(config.codes, config.dim), std=config.dim**0.5))
        self.register_buffer("initialized", torch.tensor(config.init == "identity"))
        self.map = nn.Linear(config.dim, config.dim)
        with torch.no_grad():
            nn.init.eye_(self.map.weight).div_(config.dim)
        nn.init.zeros_(self.map.bias)

    def extra_repr(self) -> str:
        return f"K={self.config.codes}, D={self.config.dim}, beta={self.config.beta}"

    def vectors(self) -> Tensor:
        kind = "cpu" if self.basis.is_meta else self.basis.device.type  # "meta" knows no autocast
        with whole_float32(), torch.autocast(kind, enabled=False):
            return self.map(self.basis)  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        """W = sqrt(cov(z) / D) and b = mean(z): the basis has covariance D I."""
        if bool(self.initialized):
            return
        self._check_first(z)
        mean = z.double().mean(0)
        centred = z.double() - mean
        values, axes = torch.linalg.eigh(centred.t() @ centred / (self.dim * z.shape[0]))
        root = (axes * values.clamp_min(0).sqrt()) @ axes.t()
        self.map.weight.copy_(root)
        self.map.bias.copy_(mean)
        self.initialized.fill_(True)

    def remedies(self) -> tuple[str, ...]:
        """The map set anew from the latents as they are; then a weaker pull on the encoder."""
        return ("a new map from the moments of the latents", *((f"beta {WEAK_BETA}",) if self.config.beta > WEAK_BETA else ()))

    def remedy(self, name: str, again: bool = False) -> None:
        super().remedy(name, again)
        if name != self.remedies()[0]:
            self._beta = WEAK_BETA

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        batch, grid = z.shape[0], z.shape[2:]
        with torch.autocast(z.device.type, enabled=False):
            rows = at_least_float32(z).movedim(1, -1).reshape(-1, self.dim).contiguous()
            finite = check_finite(rows.view(batch, -1), self.training)
            vectors = self.vectors().to(rows.dtype)
            codes = nearest(rows.detach(), vectors.detach())
            z_q, loss, error = assign(rows, vectors, codes, batch, self._beta, True, active, self.config.estimator)
            if self.training:
                self._count(rows, codes, batch, finite, active, rng)
        z_q = z_q.view(batch, *grid, self.dim).movedim(-1, 1)
        return Quantized(z_q, (codes.view(batch, *grid),), loss, {"quantization_error": error})
