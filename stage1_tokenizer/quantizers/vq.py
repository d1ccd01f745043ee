"""Vector quantisation with one codebook (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.distributed import Comm
from intarsia.rng import StepRng, bits, uniform
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    at_least_float32,
    check_codes,
    check_latents,
)
from stage1_tokenizer.quantizers.search import kmeans, nearest

_NONE = (1 << 63) - 1  # the key of a restart slot that no sample has filled
_RANK_BITS = 12
_EPS = 1e-5  # Laplace smoothing of the counts


class VQConfig(QuantizerConfig):
    """A codebook of K vectors in D dimensions."""

    codes: int = 512
    """Codebook size K."""
    dim: int = 32
    """Code dimension D."""
    beta: float = 0.25
    """Weight of the commitment term, on the encoder only."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: moving averages of the assigned latents, or the codebook term |sg[z_e] - e|^2."""
    decay: float = 0.99
    """gamma of the moving averages; with `gradient`, of the counts that tell dead codes."""
    init: Literal["kmeans", "normal"] = "kmeans"
    """k-means of the first latents, or N(0, 1/D)."""
    restart: float = 0.05
    """A code used less than this share of the mean use is restarted from a current latent; 0 = never."""
    rate: float = 0.0
    """Squared error per dimension that one bit is worth: a code costs -log2 of how often it is used (Chou et al. 1989), so that
    codes carry fewer bits for the same error and are easier to model; 0 takes the nearest code."""
    cosine: bool = False
    """l2-normalised latents and codes (Yu et al. 2021, arXiv:2110.04627); wants a small D."""

    def model_post_init(self, context: Any) -> None:
        if self.codes < 1 or self.dim < 1:
            raise ValueError(f"codes {self.codes} and dim {self.dim} must be positive")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}; expected 0 <= decay < 1")
        if self.beta < 0 or self.rate < 0 or not 0 <= self.restart < 1:
            raise ValueError(f"beta {self.beta} and rate {self.rate} must not be negative; restart {self.restart} must lie in [0, 1)")


class _StraightThrough(torch.autograd.Function):
    """Forward e_k, backward identity to z_e; bit-exactly e_k, which z + (e - z).detach() is not."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, z_q: Tensor) -> Tensor:
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@QUANTIZERS.register("vq", VQConfig)
class VQ(Quantizer):
    """One map of codes. Distances and averages are float32 or wider; no N x K tensor is kept.

    The terms are means over positions and dimensions: beta |z_e - sg[e]|^2 and, with ``update: gradient``, |sg[z_e] - e|^2.
    Restarts: each of R slots holds the latent of the sample with the smallest hash of (seed, step, slot, sample), a choice
    that neither the order of samples, nor micro-batches, nor ranks can change; dead codes take the slots in their order.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        k, d = config.codes, config.dim
        vectors = torch.randn(k, d) * d**-0.5
        if config.cosine:
            vectors = F.normalize(vectors, dim=1)
        if config.update == "gradient":
            self.codebook = nn.Parameter(vectors)
        else:
            self.register_buffer("codebook", vectors)
            self.register_buffer("sums", vectors.clone())
        self.register_buffer("counts", torch.ones(k))
        self.register_buffer("initialized", torch.tensor(config.init == "normal"))
        self.slots = min(k, 256) if config.restart > 0 else 0
        self._pending: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        return f"K={self.config.codes}, D={self.config.dim}, {self.config.update}, beta={self.config.beta}"

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        return (LevelSpec(name, self.config.codes, grid),)

    def code_tensors(self) -> dict[str, Tensor]:
        return {"codebook": self.codebook} | ({"counts": self.counts} if self.config.rate else {})

    def cost(self) -> Tensor | None:
        """(K,) what each code costs beside its squared distance: D rate bits(k), by its running use; None where rate is 0."""
        if not self.config.rate:
            return None
        share = (self.counts + _EPS) / (self.counts.sum() + self.config.codes * _EPS)
        return -self.config.rate * self.dim * share.log2()

    def vectors(self) -> Tensor:
        """(K, D) the vectors that codes stand for."""
        return F.normalize(self.codebook, dim=1) if self.config.cosine else self.codebook

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if bool(self.initialized):
            return
        if z.ndim != 2 or z.shape[1] != self.dim or z.shape[0] == 0:
            raise ValueError(f"latents: shape {tuple(z.shape)}; expected (n > 0, {self.dim})")
        if not bool(torch.isfinite(z).all()):
            raise ValueError("latents: NaN or inf; the codebook is left as it was")
        z = z.to(self.codebook.dtype)
        centres, counts = kmeans(F.normalize(z, dim=1) if self.config.cosine else z, self.config.codes, rng)
        self.codebook.copy_(F.normalize(centres, dim=1) if self.config.cosine else centres)
        self.counts.copy_(counts * (self.config.codes / counts.sum()))
        if self.config.update == "ema":
            self.sums.copy_(self.codebook * self.counts[:, None])
        self.initialized.fill_(True)

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        with torch.autocast(z.device.type, enabled=False):
            rows = at_least_float32(z).movedim(1, -1).reshape(-1, self.dim)
            if self.config.cosine:
                rows = F.normalize(rows, dim=1)
            finite = torch.isfinite(rows.detach()).all()
            if not self.training and not rows.is_meta and not bool(finite):
                bad = int((~torch.isfinite(z).flatten(1).all(1)).nonzero()[0])
                raise ValueError(f"latents: NaN or inf in row {bad}")
            vectors = self.vectors().to(rows.dtype)
            cost = self.cost()
            codes = nearest(rows.detach(), vectors.detach(), None if cost is None else cost.to(rows.dtype))
            chosen = vectors[codes]
            loss = self.config.beta * F.mse_loss(rows, chosen.detach())
            if self.config.update == "gradient":
                loss = loss + F.mse_loss(chosen, rows.detach())
            if self.training:
                self._accumulate(z.shape[0], rows.detach(), codes, finite, rng)
            z_q = _StraightThrough.apply(rows, chosen.detach())
            grid = z.shape[2:]
            z_q = z_q.view(z.shape[0], *grid, self.dim).movedim(-1, 1)
            error = F.mse_loss(rows.detach(), chosen.detach())
        return Quantized(z_q, (codes.view(z.shape[0], *grid),), loss, {"quantization_error": error})

    @torch.no_grad()
    def _accumulate(self, batch: int, rows: Tensor, codes: Tensor, finite: Tensor, rng: StepRng | None) -> None:
        """Adds a micro-batch to the statistics of the step; a micro-batch with a NaN adds nothing but the flag."""
        if self.slots and rng is None:
            raise ValueError("rng: a StepRng is needed in training while restart > 0")
        if not self._pending:
            self._pending = self._nothing()
        pending = self._pending
        safe = torch.where(finite, rows, rows.new_zeros(())).to(self.counts.dtype)
        pending["finite"] &= finite
        pending["counts"].index_add_(0, codes, finite.to(self.counts.dtype).expand(codes.shape[0]))
        if self.config.update == "ema":
            pending["sums"].index_add_(0, codes, safe)
        if self.slots:
            assert rng is not None
            slot = torch.arange(self.slots, device=rows.device)
            key = bits(rng.seed, "vq/restart", rng.index.to(rows.device)[:, None], 0, slot[None], rng.step)
            key = (key & (_NONE ^ ((1 << _RANK_BITS) - 1))).masked_fill(~finite, _NONE)  # non-negative; the low bits hold the rank
            best, who = key.min(0)
            place = uniform(rng.seed, "vq/restart/position", rng.index.to(rows.device)[who], 0, slot, rng.step)
            cells = rows.shape[0] // batch
            candidate = safe.view(batch, cells, self.dim)[who, (place * cells).long()]
            better = best < pending["key"]
            pending["key"] = torch.where(better, best, pending["key"])
            pending["candidate"] = torch.where(better[:, None], candidate, pending["candidate"])

    def _nothing(self) -> dict[str, Tensor]:
        """The statistics of a step before its first sample."""
        pending = {"finite": torch.ones((), dtype=torch.bool, device=self.counts.device), "counts": torch.zeros_like(self.counts)}
        if self.config.update == "ema":
            pending["sums"] = torch.zeros_like(self.sums)
        if self.slots:
            pending["key"] = torch.full((self.slots,), _NONE, dtype=torch.int64, device=self.counts.device)
            pending["candidate"] = self.codebook.detach()[: self.slots].clone()
        return pending

    def finite(self) -> Tensor:
        return self._pending["finite"] if self._pending else torch.ones((), dtype=torch.bool, device=self.counts.device)

    def discard(self) -> None:
        self._pending = {}

    @torch.no_grad()
    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Moving averages (with Laplace smoothing in the division only), then restarts of dead codes.

        Two collectives of fixed size, on every rank in every step: the least keys, then counts, sums and candidates.
        """
        pending, self._pending = self._reduce(comm), {}
        used, gamma = pending["counts"], self.config.decay
        self.counts.mul_(gamma).add_(used, alpha=1 - gamma)
        if self.config.update == "ema":
            self.sums.mul_(gamma).add_(pending["sums"], alpha=1 - gamma)
            total = self.counts.sum()
            smooth = (self.counts + _EPS) / (total + self.config.codes * _EPS) * total
            centres = self.sums / smooth[:, None]
            self.codebook.copy_(F.normalize(centres, dim=1) if self.config.cosine else centres)
        share = used / used.sum().clamp_min(1)
        stats = {
            "perplexity": torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
            "batch_usage": (used > 0).to(used.dtype).mean(),
        }
        if self.slots:
            stats["restarts"] = self._restart(pending["key"], pending["candidate"])
        return stats

    @torch.no_grad()
    def reestimate(self, comm: Comm) -> None:
        if self.config.update == "ema":
            pending = self._reduce(comm)
            used = pending["counts"] > 0
            mean = pending["sums"] / pending["counts"].clamp_min(1)[:, None]
            mean = F.normalize(mean, dim=1) if self.config.cosine else mean
            self.codebook.copy_(torch.where(used[:, None], mean, self.codebook))
            self.counts.copy_(pending["counts"] * (self.config.codes / pending["counts"].sum().clamp_min(1)))
            self.sums.copy_(self.codebook * self.counts[:, None])
        self.discard()

    def _reduce(self, comm: Comm) -> dict[str, Tensor]:
        """The statistics of all ranks; a restart slot is filled by the rank whose sample has the least key."""
        if not self._pending and comm.world_size == 1:
            raise RuntimeError("update: no forward in training mode since the last update")
        pending = dict(self._pending) or self._nothing()  # of several ranks, one may have had no sample
        names = ["counts"] + (["sums"] if self.config.update == "ema" else [])
        if comm.world_size > 1:
            if self.slots:
                mine = torch.where(pending["key"] < _NONE, pending["key"] | comm.rank, pending["key"])
                least = comm.all_reduce_min_(mine.clone())
                won = (mine == least) & (mine < _NONE)
                pending["candidate"] = torch.where(won[:, None], pending["candidate"], 0.0)
                pending["key"] = least
                names.append("candidate")
            flat = comm.all_reduce_sum_(torch.cat([pending[name].flatten() for name in names]))
            for name, part in zip(names, flat.split([pending[name].numel() for name in names]), strict=True):
                pending[name] = part.view_as(pending[name])
        return pending

    def _restart(self, key: Tensor, candidate: Tensor) -> Tensor:
        """Dead codes take vector, sum and count of a fresh one together. Without a host sync; returns how many did."""
        mean = self.counts.mean()
        dead = self.counts < self.config.restart * mean
        slot = torch.cumsum(dead, 0) - 1
        taken = dead & (slot < self.slots)
        slot = slot.clamp(0, self.slots - 1)
        taken &= key[slot] < _NONE
        fresh = candidate[slot].to(self.codebook.dtype)
        self.codebook.copy_(torch.where(taken[:, None], fresh, self.codebook))
        self.counts.copy_(torch.where(taken, mean, self.counts))
        if self.config.update == "ema":
            self.sums.copy_(torch.where(taken[:, None], fresh * mean, self.sums))
        return taken.sum().to(self.counts.dtype)

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        if len(codes) != 1:
            raise ValueError(f"codes: {len(codes)} maps; vq has one")
        check_codes(codes[0], self.config.codes)
        return F.embedding(codes[0], self.vectors()).movedim(-1, 1)
