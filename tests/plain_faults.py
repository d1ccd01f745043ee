"""The mistakes that one makes in a vector quantiser: every class changes one thing in ``PlainVQ``.

``FAULTS`` names the check of the conformance kit that must see it. The rows of its table in docs/conformance.md are these docstrings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import Quantized, straight_through
from tests.plain_vq import BETA, GAMMA, K, PlainVQ

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


@fault("loss_terms")
class AnotherLossInEvaluation(PlainVQ):
    """Eval mode has another weight of the commitment term."""

    def loss(self, rows, chosen):
        return super().loss(rows, chosen) * (1 if self.training else 2)


@fault("gradient_of_z")
class NoGradientInEvaluation(PlainVQ):
    """In eval mode z is looked up, and no gradient reaches the latents."""

    def through(self, z, z_q):
        return super().through(z, z_q) if self.training else z_q


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


@fault("restart_is_whole")
class SumOfTheLatentOnce(PlainVQ):
    """The sum of a restarted code is its latent once, whatever its count."""

    def restart(self, dead, latent):
        super().restart(dead, latent)
        self.sums.copy_(torch.where(dead[:, None], latent, self.sums))


@fault("restart_is_whole")
class OneLatentForAll(PlainVQ):
    """All dead codes of a step restart at one and the same latent."""

    def restart(self, dead, latent):
        super().restart(dead, latent[:1].expand_as(latent))


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


@fault("shapes")
class SqueezedSample(PlainVQ):
    """The codes of a batch of one have lost its axis."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z, (out.codes[0].squeeze(0),), out.loss)


@fault("shapes")
class SqueezedPosition(PlainVQ):
    """The codes of a grid of one position have lost its axis."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        return Quantized(out.z, (out.codes[0].squeeze(-1),), out.loss)


@fault("nearest")
class SquaresFarOff(PlainVQ):
    """Distances from squares and a product in float32, wherever the latents lie."""

    def choose(self, rows):
        e = self.codebook.to(rows.dtype)
        return (e.square().sum(1) - 2 * rows @ e.T).argmin(1)


@fault("nearest")
class HalfArgmin(PlainVQ):
    """Distances in bf16."""

    def choose(self, rows):
        return (rows.bfloat16()[:, None] - self.codebook.bfloat16()[None]).square().sum(-1).argmin(1)


@fault("half_precision")
class HalfInput(PlainVQ):
    """Latents stay in the precision that they come in, where their squares overflow."""

    def choose(self, rows):
        return (rows[:, None] - self.codebook.to(rows.dtype)).square().sum(2).argmin(1)

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
class FlagOfTheLast(PlainVQ):
    """The finite flag tells of the last micro-batch only."""

    def forward(self, z, rng=None, active=None):
        if self.training:
            self.flag = torch.tensor(True)
        return super().forward(z, rng, active)


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
        self.counts.copy_(self.smooth())


@fault("moving_averages")
class GammaSwapped(PlainVQ):
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


@fault("inactive")
class InactiveRestart(PlainVQ):
    """Dead codes restart at latents of inactive samples, too."""

    def statistics(self, rows, codes, counted, rng):
        n, m, _, _ = super().statistics(rows, codes, counted, rng)
        _, _, least, latent = super().statistics(rows, codes, torch.ones_like(counted), rng)
        return n, m, least, latent


@fault("inactive")
class InactiveGradient(PlainVQ):
    """The loss leaves inactive samples out, its gradient does not."""

    def average(self, per_row, counted):
        whole = per_row.mean()
        return whole + (super().average(per_row, counted) - whole).detach()


@fault("inactive")
class InactiveLeftOut(PlainVQ):
    """Inactive samples are not quantised: z is 0 and so are their codes."""

    def forward(self, z, rng=None, active=None):
        out = super().forward(z, rng, active)
        if active is None:
            return out
        keep = active.view(-1, *[1] * (z.ndim - 1))
        return Quantized(torch.where(keep, out.z, 0.0), (torch.where(keep[:, 0], out.codes[0], 0),), out.loss)
