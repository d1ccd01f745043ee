"""Lookup-free quantisation (Yu et al. 2023, MAGVIT-v2, arXiv:2310.05737): the sign of each dimension is a bit of the code."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from intarsia.distributed import Comm
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
from stage1_tokenizer.quantizers.entropy import bits_mean_entropy
from stage1_tokenizer.quantizers.scalar import ScalarQuantizer

_LEAST = 1e-6  # of a running mean of probabilities, before its logarithm


class SignConfig(QuantizerConfig):
    """2^d codes from the signs of d dimensions, and an entropy term that keeps them apart and all in use."""

    bits: Annotated[int, Field(ge=1, le=31)] = 9
    """d: the dimensions of the latents; K = 2^d."""
    beta: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the commitment term."""
    entropy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the entropy term, in nats per bit (per code it would be d times less); 0 = none."""
    diversity: Annotated[float, Field(ge=0)] = 1.0
    """Weight, inside the entropy term, of the entropy of the mean assignment."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the assignment p(c | z) ~ exp(-|z - c|^2 / tau)."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """gamma of the running mean of the assignment."""
    group: Annotated[int, Field(ge=1, le=12)] = 9
    """Bits whose joint mean assignment is kept exactly; groups of bits are treated as independent (Zhao et al. 2024)."""


class LFQConfig(SignConfig):
    """Signs of the latents themselves, values -1 and 1."""


class SignQuantizer(ScalarQuantizer):
    """The machinery of LFQ and BSQ, which differ in ``project`` and in the size of the values.

    L = beta |z - sg[q]|^2 + entropy (E H(p(c|z)) - diversity H(E p(c|z))) / d, in nats per bit, so that no weight depends on d.
    Given z the bits are independent, so the first entropy is the sum of the bits' entropies, exactly. The second is kept for
    groups of bits; the sum over the groups is an upper bound of it, and exact for one group (d <= group).

    The entropies are of training: in eval mode L is the first term alone.

    H(E p) is no mean over samples. It is replaced by its first-order expansion about a running mean m that ``update`` advances:
    -H(E p) becomes sum_c E p(c) log m(c), which has the gradient of -H at m and is linear in the batch.
    """

    advice = Quantizer.advice | {"collapse": "a larger entropy, with a diversity of 1 or more; fewer bits", "far": "beta: 0.25"}
    usage: Tensor
    value: float = 1.0
    shrink = 0.5

    def __init__(self, config: SignConfig) -> None:
        super().__init__((2,) * config.bits)
        self.config = config
        self._entropy, self._diversity = config.entropy, config.diversity  # remedies may change them
        starts = range(0, config.bits, config.group)
        self.groups = [slice(start, min(start + config.group, config.bits)) for start in starts]
        self.sizes = [1 << (group.stop - group.start) for group in self.groups]
        self.register_buffer("usage", torch.cat([torch.full((size,), 1.0 / size) for size in self.sizes]))
        self._pending: dict[str, Tensor] = {}

    def code_tensors(self) -> dict[str, Tensor]:
        return {}  # the running mean is the entropy's; a code is its signs

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, K={self.vocab}, beta={self.config.beta}, entropy={self.config.entropy}"

    def remedies(self) -> tuple[str, ...]:
        """The entropy term with its default weights, where those given are smaller."""
        usual = {name: type(self.config).model_fields[name].default for name in ("entropy", "diversity")}
        return tuple(f"{name} {weight:g}" for name, weight in usual.items() if getattr(self.config, name) < weight)

    def remedy(self, name: str, again: bool = False) -> None:
        if name not in self.remedies():
            super().remedy(name)
        kind, weight = name.split()
        setattr(self, f"_{kind}", float(weight))

    def project(self, rows: Tensor) -> Tensor:
        """(..., D) latents to where they are compared with the codes."""
        return rows

    def compared(self, z: Tensor) -> Tensor:
        return self.project(at_least_float32(z).movedim(1, -1)).movedim(-1, 1)

    def values(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1).to(self.usage.dtype) * self.value

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            finite = check_finite(z, self.training)
            u = self.compared(z).movedim(1, -1)
            digits = (u.detach() > 0).long()
            chosen = self.values(digits).to(u.dtype)
            error = active_mean((u - chosen).square(), active)
            loss, stats = self.config.beta * error, {"quantization_error": error.detach()}
            if self._entropy and self.training:
                # log p(1) - log p(0) = ((u + v)^2 - (u - v)^2) / tau
                logits = 4 * self.value / self.config.tau * u
                own = active_mean(_bit_entropy(logits).sum(-1), active) / self.dim
                mean = self._mean_term(logits, finite, active) / self.dim
                loss = loss + self._entropy * (own + self._diversity * mean)
                stats |= {"code_entropy": own.detach(), "mean_entropy": -mean.detach()}
            if self.training:
                self.note_finite(finite)
        return Quantized(straight_through(u, chosen).movedim(-1, 1), (self.to_codes(digits),), loss, stats)

    def _mean_term(self, logits: Tensor, finite: Tensor, active: Tensor | None) -> Tensor:
        """() sum over groups of sum_c E p(c) log m(c); the sums of p are added to the statistics of the step."""
        shares = [mean.clamp_min(_LEAST).to(logits.dtype) for mean in self.usage.split(self.sizes)]
        total, sums = bits_mean_entropy(logits, shares, self.groups, finite, active)
        counted = finite if active is None else finite & active
        if not self._pending:
            self._pending = self._nothing()
        self._pending["usage"] += torch.cat(sums).to(self.usage.dtype)
        self._pending["positions"] += counted.sum() * (logits[..., 0].numel() // counted.numel())
        return total

    def _nothing(self) -> dict[str, Tensor]:
        return {"usage": torch.zeros_like(self.usage), "positions": self.usage.new_zeros(1)}

    def discard(self) -> None:
        super().discard()
        self._pending = {}

    @torch.no_grad()
    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Advances the running mean of the assignment. One collective of fixed size."""
        if self._flag is None and comm.world_size == 1:
            raise RuntimeError("update: no forward in training mode since the last update")
        pending = self._pending or self._nothing()
        self.discard()
        if not self._entropy:
            return {}
        flat = comm.all_reduce_sum_(torch.cat([pending["usage"], pending["positions"]]))
        mean = flat[:-1] / flat[-1].clamp_min(1)
        self.usage.copy_(torch.where(flat[-1] > 0, torch.lerp(mean, self.usage, self.config.decay), self.usage))
        return {}


def _bit_entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of a bit that is 1 with probability sigmoid(logits)."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


@QUANTIZERS.register("lfq", LFQConfig)
class LFQ(SignQuantizer):
    """q_i = sign(z_i)."""

    straight_through = True
