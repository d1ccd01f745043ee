"""Residual quantisation (Zeghidour et al. 2021, arXiv:2107.03312; Lee et al. 2022, arXiv:2203.01941): each stage quantises what the
stages before it left."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from intarsia.config import Added
from intarsia.distributed import Comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    active_mean,
    at_least_float32,
    check_latents,
    straight_through,
)
from stage1_tokenizer.quantizers.composite import Composite, joined_likely, named
from stage1_tokenizer.quantizers.vq import VQConfig

_LEAST_SCALE = 1e-7  # what a stage may be to the first: below it float32 rounds more than the stage says


class ResidualConfig(QuantizerConfig):
    """L stages of one configuration, one after the other."""

    stages: Annotated[int, Field(ge=1, le=64)] = 4
    """L: the maps of codes per position, where ``inner`` has one."""
    shared: bool = False
    """One codebook for all stages (Lee et al.), instead of one each (Zeghidour et al.)."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Quantiser dropout: the share of samples whose depth is drawn from 1 to L in a step; one model then serves every depth."""
    depth_weights: Added[tuple[float, ...] | None] = None
    """How often dropout draws each depth, against the others; null = all alike."""
    shallow_gradient: Added[Annotated[float, Field(ge=0, le=1)]] = 1.0
    """The share of the decoder's gradient that samples of fewer stages pass on to the encoder: most of their error is detail, which no
    first stages can give, noise to it."""
    inner: QuantizerConfig = VQConfig(codes=512, dim=32)
    """The quantiser of each stage."""

    def model_post_init(self, context: Any) -> None:
        weights = self.depth_weights
        if weights is not None and (len(weights) != self.stages or min(weights) < 0 or sum(weights) == 0):
            raise ValueError(f"depth_weights: {weights}; expected {self.stages} numbers, one for each stage, none negative, not all 0")
        if weights is not None and self.dropout == 0:
            raise ValueError(f"depth_weights: {weights}, but dropout is 0 and draws no depth")
        if self.shallow_gradient != 1 and self.dropout == 0:
            raise ValueError(f"shallow_gradient: {self.shallow_gradient:g}, but dropout is 0: all samples have all stages")


@QUANTIZERS.register("residual", ResidualConfig)
class Residual(Composite):
    """z_hat = sum_l q_l with q_l = Q_l(z - sum_{j<l} q_j). Stage l makes the maps "name/l".

    Every stage is computed for every sample; under quantiser dropout a stage beyond a sample's depth adds nothing to z_hat, to the
    loss and to the statistics. The loss is the sum of the stages', which for VQ is beta sum_l |z - sg[sum_{j<=l} e_j]|^2 (Lee et
    al., eq. 6); that of a stage which sees what is left magnified by 1 / s counts s^2, so that it is in units of z and for LFQ the same.

    Gradients: where the inner quantiser is ``straight_through``, what one stage hands to the next has the gradient of z, and
    z_hat passes its own on to z once, not once per stage. Any other (Gumbel, FSQ, ...) is differentiated through as it stands.
    An inner quantiser of fixed range (FSQ, LFQ) sees what is left magnified by 1 / ``shrink`` per stage. Cosine codes all have length
    1, which bounds how near they can come: they are a poor choice here.

    With a shared codebook the statistics of all stages add up to one update, and k-means sees the latents of all stages together;
    those of the later ones are what a throw-away codebook per stage leaves.
    """

    depth_ends: Tensor | None

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__(config.inner, config.stages, config.shared)
        self.config = config
        first = self.part(0)
        self.dim = first.dim
        self.replaces, self.soft = first.straight_through, first.soft  # z_hat stands in z's place, with its gradient
        self.straight_through = self.replaces and config.shallow_gradient == 1
        if config.shallow_gradient != 1 and not self.replaces:
            how = f"the gradient goes through an inner {config.inner.type_name} quantizer as it is, to what it learns too"
            raise ValueError(f"shallow_gradient: {config.shallow_gradient:g}, but {how}; expected 1")
        self.scales = [first.shrink**i for i in range(config.stages)]
        if self.scales[-1] < _LEAST_SCALE:
            most = 1 + int(math.log(_LEAST_SCALE) / math.log(first.shrink))
            finer = f"{1 / first.shrink:g} times as fine as the one before"
            raise ValueError(f"stages: {config.stages}; float32 tells {most} of {config.inner.type_name} apart, each {finer}")
        self.shrink = first.shrink**config.stages
        ends = None if config.depth_weights is None else torch.tensor(config.depth_weights, dtype=torch.float64).cumsum(0)
        self.register_buffer("depth_ends", ends, persistent=False)

    @property
    def passes(self) -> int:
        return len(self.parts) * super().passes

    def reestimate(self, comm: Comm, number: int = 0) -> None:
        """A shared codebook in one pass, which moves it under all its stages."""
        turn, inside = divmod(number, super().passes)
        for i, part in self.distinct():
            if i == turn:
                part.reestimate(comm, inside)
            else:
                part.discard()

    def extra_repr(self) -> str:
        return f"stages={self.config.stages}, shared={self.config.shared}, dropout={self.config.dropout}"

    def prefixes(self) -> tuple[int, ...]:
        least = 1 if self.config.dropout else self.count
        return tuple(self.maps * depth for depth in range(least, self.count + 1))

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if not self.config.shared:
            left = z
            for i in range(self.count):
                self.part(i).initialize(left / self.scales[i], rng.sub(i))
                left = self._leave(self.part(i), left, i)
            return
        pool, left, fresh = [z], z, copy.deepcopy(self.part(0))
        for i in range(self.count - 1):
            stage = copy.deepcopy(fresh)
            stage.initialize(left / self.scales[i], rng.sub(i))
            left = self._leave(stage, left, i)
            pool.append(left / self.scales[i + 1])
        self.part(0).initialize(torch.cat(pool), rng)

    def _leave(self, stage: Quantizer, rows: Tensor, i: int) -> Tensor:
        """What ``stage`` leaves of rows (N, D)."""
        was_training = stage.training
        q = stage.eval()((rows / self.scales[i])[..., None]).z[..., 0]
        stage.train(was_training)
        return rows - q.to(rows.dtype) * self.scales[i]

    def depth(self, rng: StepRng, dtype: torch.dtype = torch.float64) -> Tensor:
        """(B,) int64: the stages that count for each sample in this step."""
        draw = rng.uniform("residual/dropout", 2, dtype=dtype)
        if self.depth_ends is None:
            drawn = (draw[:, 1] * self.count).long() + 1
        else:
            ends = self.depth_ends.to(draw)
            drawn = torch.searchsorted(ends, draw[:, 1] * ends[-1], right=True).clamp(max=self.count - 1) + 1
        return torch.where(draw[:, 0] < self.config.dropout, drawn, self.count)

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        depth = None
        if self.training and self.config.dropout:
            if rng is None:
                raise ValueError("rng: a StepRng is needed in training while dropout > 0")
            depth = self.depth(rng).to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            left, total, loss = z, torch.zeros_like(z), z.new_zeros(())
            outs: list[Quantized] = []
            stats: list[dict[str, Tensor]] = []
            for i, scale in enumerate(self.scales):
                counts = active if depth is None else depth > i if active is None else active & (depth > i)
                out = self.part(i)(left / scale, None if rng is None else rng.sub(i), active=counts)
                q = out.z * scale
                outs.append(out)
                loss = loss + out.loss * scale**2  # of what is left as it is, not magnified
                total = total + (q if depth is None else _masked(q, depth > i))
                left = left - (q.detach() if self.replaces else q)
                stats.append({**out.stats, "quantization_error": left.detach().square().mean()})
            z_q = straight_through(self._passing(z, depth), total.detach()) if self.replaces else total
            error = active_mean((z - z_q).detach().square(), active)
        codes = tuple(codes for out in outs for codes in out.codes)
        return Quantized(z_q, codes, loss, {"quantization_error": error, **named(stats)}, depth, joined_likely(outs))

    def _passing(self, z: Tensor, depth: Tensor | None) -> Tensor:
        """``z``, whose gradient is multiplied by ``shallow_gradient`` for samples of fewer stages."""
        if depth is None or self.config.shallow_gradient == 1:
            return z
        share = torch.where(depth < self.count, self.config.shallow_gradient, 1.0).to(z.dtype)
        out: Tensor = _ScaledGradient.apply(z, share.view(-1, *[1] * (z.ndim - 1)))
        return out

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        """``codes``: all maps or those of the leading stages; ``depth`` (B,): how many stages count for each sample."""
        total: Tensor | None = None
        for i, part in enumerate(self.split_codes(codes)):
            q = self.part(i).decode(part) * self.scales[i]
            q = q if depth is None else _masked(q, depth > i)
            total = torch.zeros_like(q) + q if total is None else total + q
        assert total is not None
        return total


class _ScaledGradient(torch.autograd.Function):
    """z itself; its gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


def _masked(q: Tensor, keep: Tensor) -> Tensor:
    """``q`` (B, D, *grid) where ``keep`` (B,), else 0."""
    return torch.where(keep.view(-1, *[1] * (q.ndim - 1)), q, 0.0)
