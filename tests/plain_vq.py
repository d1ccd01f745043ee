"""A vector quantiser as one would write it in an afternoon, short and slow, and the mistakes that one then makes.

``PlainVQ`` passes the conformance kit; every class in ``FAULTS`` changes one thing and is named with the check that must see it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.rng import StepRng, uniform
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.base import Quantized, Quantizer, check_codes, check_finite, check_latents, straight_through

K, D, GAMMA, BETA, DEAD = 12, 4, 0.8, 0.25, 0.1
Micro = tuple[Tensor, Tensor, Tensor, Tensor]  # counts (K,), sums (K, D), the draw (K,) and the latent (K, D) of each restart


class PlainVQ(Quantizer):
    """K = 12 codes in 4 dimensions, moving averages, a candidate per code for its restart: the latent with the least draw."""

    straight_through = True
    type_name = "plain"
    dim = D

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(K, D))
        self.register_buffer("counts", torch.ones(K))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))
        self.micro: list[Micro] = []
        self.flag = torch.tensor(True)

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        return (LevelSpec(name, K, grid),)

    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if not self.initialized:
            self.place(z)

    def place(self, z: Tensor) -> None:
        self.codebook.copy_(z[:: len(z) // K][:K])
        self.sums.copy_(self.codebook)
        self.initialized.fill_(True)

    def choose(self, rows: Tensor) -> Tensor:
        return torch.cdist(rows, self.codebook.to(rows.dtype), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

    def widen(self, z: Tensor) -> Tensor:
        return z if z.dtype == torch.float64 else z.float()

    def check(self, z: Tensor) -> None:
        check_latents(z, D)

    def loss(self, rows: Tensor, chosen: Tensor) -> Tensor:
        return BETA * (rows - chosen.detach()).square().mean(-1)

    def average(self, per_row: Tensor, counted: Tensor) -> Tensor:
        return (per_row * counted).mean()

    def through(self, z: Tensor, z_q: Tensor) -> Tensor:
        return straight_through(z, z_q)

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        self.check(z)
        with torch.autocast("cpu", enabled=False):
            finite = check_finite(z, self.training)
            rows = self.widen(z).movedim(1, -1).flatten(0, -2)
            cells = len(rows) // len(z)
            codes = self.choose(rows.detach())
            chosen = self.codebook[codes].to(rows.dtype)
            counted = torch.ones(len(z), dtype=torch.bool) if active is None else active
            loss = self.average(self.loss(rows, chosen), counted.repeat_interleave(cells))
            if self.training:
                self.flag = self.flag & finite
                self.note(rows.detach(), codes, self.counting(counted, cells), rng, finite)
            grid = z.shape[2:]
            z_q = self.through(rows, chosen).view(len(z), *grid, D).movedim(-1, 1)
        return Quantized(z_q, (codes.view(len(z), *grid),), loss)

    def counting(self, counted: Tensor, cells: int) -> Tensor:
        return counted.repeat_interleave(cells)

    def note(self, rows: Tensor, codes: Tensor, counted: Tensor, rng: StepRng | None, finite: Tensor) -> None:
        assert rng is not None
        if not finite:
            return
        self.micro.append(self.statistics(rows, codes, counted, rng))

    def statistics(self, rows: Tensor, codes: Tensor, counted: Tensor, rng: StepRng) -> Micro:
        onehot = F.one_hot(codes, K).to(rows.dtype) * counted[:, None]
        cells = len(rows) // len(rng.index)
        place = torch.arange(len(rows)) % cells
        sample = rng.index.repeat_interleave(cells)[:, None]
        draw = uniform(rng.seed, "plain", sample, place[:, None], torch.arange(K), rng.step, torch.float64)
        least, who = draw.masked_fill(~counted[:, None], 2.0).min(0)
        return onehot.sum(0), onehot.T @ rows, least, rows[who]

    def empty(self) -> Micro:
        nothing = torch.zeros_like(self.sums)
        return torch.zeros_like(self.counts), nothing, torch.full((K,), 2.0, dtype=torch.float64), nothing

    def merged(self) -> Micro:
        counts, sums, least, latent = self.empty()
        for n, m, draw, fresh in self.micro:
            counts, sums = counts + n, sums + m
            latent = torch.where((draw < least)[:, None], fresh, latent)
            least = torch.minimum(draw, least)
        return counts, sums, least, latent

    def reduce(self, n: Tensor, m: Tensor, least: Tensor, latent: Tensor, comm: Comm) -> Micro:
        everywhere = comm.all_reduce_min_(least.clone())
        latent = comm.all_reduce_sum_(torch.where((least == everywhere)[:, None], latent, 0.0))
        return comm.all_reduce_sum_(n.clone()), comm.all_reduce_sum_(m.clone()), everywhere, latent

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        n, m, _, latent = self.reduce(*self.merged(), comm)
        self.discard()
        self.average_in(n, m)
        dead = self.counts < DEAD * self.counts.mean()
        self.restart(dead, latent)
        return {"restarts": dead.sum().float()}

    def average_in(self, n: Tensor, m: Tensor) -> None:
        self.counts.mul_(GAMMA).add_(n, alpha=1 - GAMMA)
        self.sums.mul_(GAMMA).add_(m, alpha=1 - GAMMA)
        self.codebook.copy_(self.sums / self.smooth()[:, None])

    def smooth(self) -> Tensor:
        total = self.counts.sum()
        return (self.counts + 1e-5) / (total + K * 1e-5) * total

    def restart(self, dead: Tensor, latent: Tensor) -> None:
        mean = self.counts.mean()
        self.codebook.copy_(torch.where(dead[:, None], latent, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], latent * mean, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))

    def discard(self) -> None:
        self.micro, self.flag = [], torch.tensor(True)

    def finite(self) -> Tensor:
        return self.flag

    def vectors(self) -> Tensor:
        return self.codebook

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        self.check_codes(codes)
        return self.vectors()[codes[0]].movedim(-1, 1)

    def check_codes(self, codes: tuple[Tensor, ...]) -> None:
        if len(codes) != 1:
            raise ValueError(f"codes: {len(codes)} maps; expected one")
        check_codes(codes[0], K)


FAULTS: dict[type[PlainVQ], str] = {}


def fault(check: str) -> Any:
    """Names the check that must see a class's mistake."""

    def add(cls: type[PlainVQ]) -> type[PlainVQ]:
        FAULTS[cls] = check
        return cls

    return add


@fault("loss_terms")
class BetaOnTheCodebook(PlainVQ):
    """The commitment term without its beta, as if beta weighed the other term."""

    def loss(self, rows, chosen):
        return (rows - chosen.detach()).square().mean(-1)


@fault("loss_terms")
class LossOverTheSum(PlainVQ):
    """A sum over dimensions in place of their mean."""

    def loss(self, rows, chosen):
        return BETA * (rows - chosen.detach()).square().sum(-1)


@fault("gradient_of_z")
class GradientOnceMore(PlainVQ):
    """z + (z_q - z) with the detach at the wrong place: the encoder gets twice the gradient."""

    def through(self, z, z_q):
        return straight_through(2 * z, z_q)


@fault("accumulation")
class AveragePerMicroBatch(PlainVQ):
    """The moving average advances once per micro-batch."""

    def update(self, rng, comm):
        whole, parts = self.merged(), self.micro
        for n, m, _, _ in parts[:-1]:
            self.average_in(n, m)
        self.micro = [(parts[-1][0], parts[-1][1], whole[2], whole[3])] if parts else []
        return super().update(rng, comm)


@fault("accumulation")
class LastMicroBatchOnly(PlainVQ):
    """Each forward replaces the statistics of the one before."""

    def note(self, rows, codes, counted, rng, finite):
        if finite:
            self.micro = [self.statistics(rows, codes, counted, rng)]


@fault("forward_is_pure")
class AverageInForward(PlainVQ):
    """The codebook moves while it is used."""

    def note(self, rows, codes, counted, rng, finite):
        super().note(rows, codes, counted, rng, finite)
        onehot = F.one_hot(codes, K).to(rows.dtype)
        self.average_in(onehot.sum(0), onehot.T @ rows)


@fault("forward_is_pure")
class DiscardForgetsNothing(PlainVQ):
    """A skipped step comes back in the next one."""

    def discard(self):
        self.flag = torch.tensor(True)

    def update(self, rng, comm):
        stats = super().update(rng, comm)
        self.micro = []
        return stats


@fault("evaluation_is_pure")
class EvaluationCounts(PlainVQ):
    """Statistics are gathered in eval mode too."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        if not self.training and self.micro:
            rows = z.movedim(1, -1).flatten(0, -2)
            everything = torch.ones(len(rows), dtype=torch.bool)
            self.micro.append(self.statistics(rows, out.codes[0].flatten(), everything, StepRng(0, 0, torch.arange(len(z)))))
        return out


@fault("evaluation_is_pure")
class EvaluationUpdates(PlainVQ):
    """The running counts advance in eval mode."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        if not self.training:
            self.counts.mul_(GAMMA).add_(torch.bincount(out.codes[0].flatten(), minlength=K), alpha=1 - GAMMA)
        return out


@fault("restart_is_whole")
class RestartOfTheVectorOnly(PlainVQ):
    """Sum and count stay, so that the next average puts the vector back."""

    def restart(self, dead, latent):
        self.codebook.copy_(torch.where(dead[:, None], latent, self.codebook))


@fault("restart_raises_usage")
class RestartOfTheCountOnly(PlainVQ):
    """The code counts as alive again and stays where it was."""

    def restart(self, dead, latent):
        mean = self.counts.mean()
        self.sums.copy_(torch.where(dead[:, None], self.codebook * mean, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))


@fault("two_ranks_restart")
class RestartPerRank(PlainVQ):
    """Each rank restarts at latents of its own."""

    def reduce(self, n, m, least, latent, comm):
        n, m, _, _ = super().reduce(n, m, least, latent, comm)
        return n, m, least, latent


@fault("two_ranks")
class NothingReduced(PlainVQ):
    """Each rank averages its own latents."""

    def reduce(self, n, m, least, latent, comm):
        _, _, least, latent = super().reduce(n, m, least, latent, comm)
        return n, m, least, latent


@fault("two_ranks")
class CollectiveByData(PlainVQ):
    """A rank without samples leaves out a collective that the others wait in."""

    def reduce(self, n, m, least, latent, comm):
        return super().reduce(n, m, least, latent, comm) if n.sum() > 0 else (n, m, least, latent)


@fault("round_trip")
class CodesOffByOne(PlainVQ):
    """Codes are counted from 1, around the end."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z, ((out.codes[0] + 1) % K,), out.loss)


@fault("round_trip")
class DecodesAnotherTable(PlainVQ):
    """decode reads the averages before they are smoothed."""

    def vectors(self):
        return self.sums / self.counts.clamp_min(1e-5)[:, None] * (1 + 1e-6)


@fault("shapes")
class CodesOutOfRange(PlainVQ):
    """An offset is added for a vocabulary with a begin token."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z, (out.codes[0] + 1,), out.loss)


@fault("shapes")
class FlatCodes(PlainVQ):
    """Codes of a sample as one row, whatever the grid."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z, (out.codes[0].flatten(1),), out.loss)


@fault("nearest")
class HalfArgmin(PlainVQ):
    """Distances in bf16."""

    def choose(self, rows):
        return (rows.bfloat16()[:, None] - self.codebook.bfloat16()[None]).square().sum(-1).argmin(1)


@fault("half_precision")
class HalfInput(PlainVQ):
    """Latents stay in the precision that they come in: |z|^2 is infinite in fp16."""

    def choose(self, rows):
        e = self.codebook.to(rows.dtype)
        return (rows.square().sum(1)[:, None] - 2 * rows @ e.T + e.square().sum(1)).argmin(1)

    def widen(self, z):
        return z.half().float() if z.dtype == torch.float16 else z

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z.to(z.dtype), out.codes, out.loss)


@fault("neighbours")
class BatchNormalised(PlainVQ):
    """Latents are centred by their batch before codes are chosen."""

    def choose(self, rows):
        return super().choose(rows - 0.05 * rows.mean(0, keepdim=True))


@fault("bad_codes")
class NegativeIndex(PlainVQ):
    """Codes are not looked at: -1 is the last vector."""

    def check_codes(self, codes):
        pass


@fault("bad_latents")
class NaNPoisons(PlainVQ):
    """A micro-batch with a NaN is averaged in like any other; the flag alone tells."""

    def note(self, rows, codes, counted, rng, finite):
        self.micro.append(self.statistics(rows, codes, counted, rng))


@fault("bad_latents")
class EmptyBatchTaken(PlainVQ):
    """A batch of nothing gets codes of nothing."""

    def check(self, z):
        if len(z):
            super().check(z)

    def forward(self, z, rng=None, active=None):
        if not len(z):
            return Quantized(z, (torch.zeros(0, *z.shape[2:], dtype=torch.int64),), z.sum())
        return super().forward(z, rng, active)


@fault("moving_averages")
class SmoothingWrittenBack(PlainVQ):
    """The smoothed counts replace the counts."""

    def average_in(self, n, m):
        super().average_in(n, m)
        self.counts.copy_((self.counts + 0.01) / (self.counts.sum() + K * 0.01) * self.counts.sum())


@fault("moving_averages")
class UnsmoothedForgetting(PlainVQ):
    """gamma and 1 - gamma the wrong way round."""

    def average_in(self, n, m):
        self.counts.mul_(1 - GAMMA).add_(n, alpha=GAMMA)
        self.sums.mul_(1 - GAMMA).add_(m, alpha=GAMMA)
        self.codebook.copy_(self.sums / self.smooth()[:, None])


@fault("initialize_once")
class InitialisedAgain(PlainVQ):
    """Every start places the codebook anew, also of a resumed run."""

    def initialize(self, z, rng):
        self.place(z)


@fault("save_load")
class CountsAreLost(PlainVQ):
    """The running counts are no part of the state."""

    def __init__(self):
        super().__init__()
        del self._buffers["counts"]
        self.register_buffer("counts", torch.ones(K), persistent=False)


@fault("randomness")
class GlobalGenerator(PlainVQ):
    """Restarts draw from torch's generator."""

    def restart(self, dead, latent):
        torch.rand(1)
        super().restart(dead, latent)


@fault("inactive")
class DropoutCounts(PlainVQ):
    """Inactive samples are in the statistics."""

    def counting(self, counted, cells):
        return torch.ones_like(counted).repeat_interleave(cells)


@fault("inactive")
class MeanOfTheActive(PlainVQ):
    """The loss is a mean over the active samples, and no longer linear in the batch."""

    def average(self, per_row, counted):
        return per_row[counted].mean()
