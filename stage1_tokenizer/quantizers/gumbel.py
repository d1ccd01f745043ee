"""Gumbel-Softmax quantisation (Jang et al. 2016, arXiv:1611.01144), as in DALL-E (Ramesh et al. 2021, arXiv:2102.12092)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from intarsia.config import Added
from intarsia.inference import whole_float32
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
from stage1_tokenizer.quantizers.codebook import CodebookQuantizer
from stage1_tokenizer.quantizers.search import kmeans

SHARP = 16.0  # the scale that `remedies` sets
_NOISE_CELLS = 1 << 18  # draws made at once: the hash works on 64-bit integers


class GumbelConfig(QuantizerConfig):
    """K codes in D dimensions that are drawn in training and chosen afterwards."""

    codes: Annotated[int, Field(ge=1)] = 512
    """Codebook size K."""
    dim: Annotated[int, Field(ge=1)] = 32
    """D, of the latents and of the codes' vectors."""
    logits: Literal["distance", "linear"] = "distance"
    """-scale |z_e - e_j|^2, or a linear head of its own (which starts as the distance)."""
    scale: Added[Annotated[float, Field(gt=0)]] = 16.0
    """How much more a code's logit falls than its squared distance grows. At 1 noise outweighs the distances of a young net."""
    hard: bool = True
    """In training z is the vector of the code drawn, with the mixture's gradient; otherwise the mixture itself."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of the first step."""
    temperature_end: Annotated[float, Field(gt=0)] = 0.0625
    """tau of the last."""
    temperature_steps: Annotated[int, Field(ge=1)] = 5000
    """Steps from the one to the other, by a constant factor."""
    kl: Annotated[float, Field(ge=0)] = 5e-4
    """Weight of KL(softmax(logits) | uniform), in nats per position; 0 = off."""
    init: Literal["kmeans", "normal"] = "kmeans"
    """k-means of the first latents, or N(0, 1/D)."""


@QUANTIZERS.register("gumbel", GumbelConfig)
class Gumbel(CodebookQuantizer):
    """y = softmax((logits + g) / tau) with Gumbel noise g, and z = sum_j y_j e_j (soft) or e_k with k = argmax y (hard).

    tau(t) = tau_0 (tau_1 / tau_0)^min(1, t / T) with t = ``rng.step``; the noise is a function of (seed, step, sample, position, code).
    In eval mode, and where neither the latents nor the codebook learn, k = argmax of the logits, without noise, and z = e_k: then
    ``decode(codes)`` is z. So it is in training, where hard; a soft z is a mixture that no code stands for, and its codes are those drawn.

    The relaxation needs y for every code: N x K floats are kept for the backward pass, which no vector quantiser here does otherwise.
    The codebook learns from the decoder's gradient and through the logits.
    """

    advice = Quantizer.advice | {"collapse": "init: kmeans; scale: 16; fewer codes", "far": "init: kmeans"}

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__(config.codes, config.dim)
        self.config = config
        self.soft = not config.hard
        self._scale = config.scale  # a remedy may change it
        self.codebook = nn.Parameter(nn.init.normal_(torch.empty(config.codes, config.dim), std=config.dim**-0.5))
        self.head = nn.Linear(config.dim, config.codes) if config.logits == "linear" else None
        self.register_buffer("initialized", torch.tensor(config.init == "normal"))
        self._start_head()

    def extra_repr(self) -> str:
        return f"K={self.config.codes}, D={self.config.dim}, {self.config.logits}, {'hard' if self.config.hard else 'soft'}"

    def vectors(self) -> Tensor:
        return self.codebook

    @torch.no_grad()
    def _start_head(self) -> None:
        """The distance's logits."""
        if self.head is not None:
            weight, bias = self._of_distance(self.codebook)
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def _of_distance(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """scale (2 z.e_j - |e_j|^2): minus the scaled distance, up to a constant of z, which no softmax sees."""
        return 2 * self._scale * vectors, -self._scale * vectors.square().sum(1)

    def remedies(self) -> tuple[str, ...]:
        """Codes set anew by k-means (and a head that starts from them); then sharper logits, that noise outweighs them no more."""
        sharper = (f"scale {SHARP:g}",) if self.head is None and self.config.scale < SHARP else ()
        return ("k-means of the latents as they are", *sharper)

    def remedy(self, name: str, again: bool = False) -> None:
        super().remedy(name, again)
        if name != self.remedies()[0]:
            self._scale = SHARP

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if bool(self.initialized):
            return
        self._check_first(z)
        self.codebook.copy_(kmeans(z.to(self.codebook.dtype), self.codes, rng)[0])
        self._start_head()
        self.initialized.fill_(True)

    def temperature(self, step: int) -> float:
        """tau(step)."""
        c = self.config
        return float(c.temperature * math.exp(min(1.0, step / c.temperature_steps) * math.log(c.temperature_end / c.temperature)))

    def logits(self, rows: Tensor) -> Tensor:
        """(..., D) to (..., K), up to a constant of each row."""
        with whole_float32():
            if self.head is not None:
                return F.linear(rows, self.head.weight.to(rows.dtype), self.head.bias.to(rows.dtype))
            vectors = self.codebook.to(rows.dtype)
            centre = vectors.detach().mean(0)  # a constant of the row; far from the origin, rounding of the squares would choose the code
            return F.linear(rows - centre, *self._of_distance(vectors - centre))

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        if self.training and rng is None:
            raise ValueError("rng: a StepRng is needed in training: Gumbel noise and the temperature come from it")
        batch, grid = z.shape[0], z.shape[2:]
        with torch.autocast(z.device.type, enabled=False):
            rows = at_least_float32(z).movedim(1, -1).reshape(batch, -1, self.dim)
            finite = check_finite(rows, self.training)
            logits, vectors = self.logits(rows), self.codebook.to(rows.dtype)
            log_q = torch.log_softmax(logits, -1)
            kl = active_mean((log_q.exp() * log_q).sum(-1) + math.log(self.codes), active)
            stats = {"kl": kl.detach()}
            if self.training and (rows.requires_grad or self.codebook.requires_grad):
                assert rng is not None
                tau = self.temperature(rng.step)
                noisy = (logits + gumbel_noise(rng, rows.shape[1], self.codes, rows)) / tau
                codes, likely = noisy.detach().argmax(-1), logits.detach().argmax(-1)
                z_q = self._mix(torch.softmax(noisy, -1), codes, vectors)
                stats["temperature"] = torch.full((), tau, dtype=rows.dtype, device=z.device)
            else:
                codes = likely = logits.argmax(-1)
                z_q = vectors[codes]
            if self.training:
                self._count(rows.reshape(-1, self.dim), codes.flatten(), batch, finite, active, rng)
            stats["quantization_error"] = active_mean((rows - z_q).detach().square(), active)
        z_q = z_q.view(batch, *grid, self.dim).movedim(-1, 1)
        maps = tuple(c.view(batch, *grid) for c in (codes, likely))
        return Quantized(z_q, maps[:1], self.config.kl * kl, stats, likely=maps[1:])

    def _mix(self, y: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
        """sum_j y_j e_j; where hard e_k, with the gradient of a one-hot y that passes straight through to the soft one."""
        if not self.config.hard:
            return y @ vectors
        chosen = vectors[codes]
        return straight_through(y @ vectors.detach(), chosen.detach()) + (chosen - chosen.detach())


def gumbel_noise(rng: StepRng, positions: int, codes: int, like: Tensor) -> Tensor:
    """(B, positions, K) standard Gumbel noise, made a few samples at a time: the 64-bit hash would take many times its memory."""
    noise = like.new_empty((rng.index.shape[0], positions, codes))
    size = max(1, _NOISE_CELLS // (positions * codes))
    for start in range(0, noise.shape[0], size):
        part = StepRng(rng.seed, rng.step, rng.index[start : start + size].to(like.device))
        noise[start : start + size] = part.gumbel("gumbel", positions, codes)
    return noise
