"""Vector quantisation with one codebook (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.config import Added
from intarsia.distributed import Comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers import statistics
from stage1_tokenizer.quantizers.assign import Estimator, assign
from stage1_tokenizer.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    at_least_float32,
    check_finite,
    check_latents,
    direction,
)
from stage1_tokenizer.quantizers.codebook import CodebookQuantizer
from stage1_tokenizer.quantizers.entropy import EntropyConfig, mean_entropy
from stage1_tokenizer.quantizers.growth import codes_at, split
from stage1_tokenizer.quantizers.restart import SLOTS, revive
from stage1_tokenizer.quantizers.search import kmeans, nearest

RESTART, WEAK_BETA = 0.05, 0.1  # what `remedies` set
_EPS = 1e-5  # Laplace smoothing of the counts
_LEAST = 1e-3  # a code used less stays where it is: smoothing would draw it to 0


class VQConfig(QuantizerConfig):
    """A codebook of K vectors in D dimensions."""

    codes: int = 512
    """Codebook size K."""
    dim: int = 32
    """Code dimension D."""
    beta: float = 0.25
    """Weight of the commitment term, on the encoder only."""
    beta_warmup: Added[int] = 0
    """Over so many steps T the weight rises: beta(t) = beta min(1, t / T); 0 = at once."""
    update: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: moving averages of the assigned latents, or the codebook term |sg[z_e] - e|^2."""
    decay: float = 0.99
    """gamma of the moving averages; with `gradient`, of the counts that tell dead codes."""
    init: Literal["kmeans", "normal"] = "kmeans"
    """k-means of the first latents, or N(0, 1/D)."""
    restart: float = 0.05
    """A code used less than this share of the mean use is restarted from a current latent; 0 = never."""
    rate: Added[float] = 0.0
    """Squared error per dimension that one bit is worth: a code costs -log2 of how often it is used (Chou et al. 1989), so that
    codes carry fewer bits for a little more error and are easier to model; 0 takes the nearest code."""
    cosine: bool = False
    """l2-normalised latents and codes (Yu et al. 2021, arXiv:2110.04627); wants a small D."""
    estimator: Added[Estimator] = "straight_through"
    """What the decoder's gradient becomes for the encoder: the same, or turned back with z_e to e_k (Fifty et al. 2024)."""
    entropy: Added[EntropyConfig] = EntropyConfig()
    """A bonus for using all codes alike, by the counts that restarts go by."""
    grow: Added[tuple[int, ...]] = ()
    """Steps at which the codes in use double, K at last: K = 512 and two steps begin with 128. Each code is split in two."""

    def model_post_init(self, context: Any) -> None:
        if self.codes < 1 or self.dim < 1:
            raise ValueError(f"codes {self.codes} and dim {self.dim} must be positive")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}; expected 0 <= decay < 1")
        if self.beta < 0 or self.rate < 0 or not 0 <= self.restart < 1:
            raise ValueError(f"beta {self.beta} and rate {self.rate} must not be negative; restart {self.restart} must lie in [0, 1)")
        if self.beta_warmup < 0:
            raise ValueError(f"beta_warmup: {self.beta_warmup} must not be negative")
        if any(at < 1 for at in self.grow) or list(self.grow) != sorted(set(self.grow)):
            raise ValueError(f"grow: {list(self.grow)}; expected rising steps from 1 on")
        if self.codes < 2 ** len(self.grow):
            raise ValueError(f"grow: {len(self.grow)} doublings; {self.codes} codes allow {self.codes.bit_length() - 1}")


@QUANTIZERS.register("vq", VQConfig)
class VQ(CodebookQuantizer):
    """One map of codes. Distances and averages are float32 or wider; no N x K tensor is kept, for the backward pass neither.

    The terms are means over positions and dimensions: beta |z_e - sg[e]|^2 and, with ``update: gradient``, |sg[z_e] - e|^2.
    ``restart.offer`` says which latents restart codes, ``entropy.mean_entropy`` what the bonus is.

    Plain torch on every device. On CUDA a training step of ``forward``, backward and ``update`` never waits for the device: what
    depends on data (restarts, the finite flag, growth) is decided by tensor operations. ``initialize`` and eval mode do wait.
    """

    advice = Quantizer.advice | {
        "collapse": "update: ema in place of gradient; restart: 0.05; init: kmeans; beta: 0.1; an entropy bonus; a codebook that grows;"
        " cosine: true with dim 8; fewer codes; a smaller rate, where one is set",
        "far": "init: kmeans; beta: 0.25; update: ema",
        "twins": "fewer codes, or rate: 0.01",
    }
    codebook: Tensor
    counts: Tensor
    sums: Tensor
    used: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config.codes, config.dim)
        self.config = config
        self.straight_through = not config.cosine and config.estimator == "straight_through"
        self.averages = config.update == "ema"
        k, d = config.codes, config.dim
        vectors = nn.init.normal_(torch.empty(k, d), std=d**-0.5)
        if config.cosine:
            vectors = F.normalize(vectors, dim=1)
        first = codes_at(0, k, config.grow) if config.grow else k
        counts = torch.ones(k)
        counts[first:] = 0
        if config.grow:
            self.register_buffer("used", torch.tensor(first))
        self._at_least = first  # known of ``used`` without asking the device
        if config.update == "gradient":
            self.codebook = nn.Parameter(vectors)
        else:
            self.register_buffer("codebook", vectors)
            self.register_buffer("sums", vectors.clone())
            self.sums[first:] = 0
        self.register_buffer("counts", counts)
        self.register_buffer("initialized", torch.tensor(config.init == "normal"))
        self.slots = min(k, SLOTS) if config.restart > 0 else 0
        self._restart, self._beta = config.restart, config.beta  # remedies may change them

    def extra_repr(self) -> str:
        return f"K={self.config.codes}, D={self.config.dim}, {self.config.update}, beta={self.config.beta}"

    def code_tensors(self) -> dict[str, Tensor]:
        return (
            {"codebook": self.codebook}
            | ({"counts": self.counts} if self.config.rate else {})
            | ({"used": self.used} if self.config.grow else {})
        )

    def share(self) -> Tensor:
        """(K,) the running share of each code among the assignments, smoothed: positive."""
        return (self.counts + _EPS) / (self.counts.sum() + self.codes * _EPS)

    def cost(self) -> Tensor | None:
        """(K,) what a code costs beside its squared distance: D rate bits(k), inf where it is not in use yet; None for nothing."""
        cost = -self.config.rate * self.dim * self.share().log2() if self.config.rate else None
        if not self.config.grow:
            return cost
        return torch.where(self._in_use(), self.counts.new_zeros(()) if cost is None else cost, float("inf"))

    def _in_use(self) -> Tensor:
        return torch.arange(self.codes, device=self.counts.device) < self.used

    def vectors(self) -> Tensor:
        return F.normalize(self.codebook, dim=1) if self.config.cosine else self.codebook

    def compared(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) if self.config.cosine else z

    def codes_in_use(self, vocab: int) -> int:
        return int(self.used) if self.config.grow else vocab

    def remedies(self) -> tuple[str, ...]:
        """Codes set anew by k-means and restarted from now on where they die; then a weaker pull on the encoder. None where codes cost
        their bits: they go out of use by intention, and would again."""
        if self.config.rate:
            return ()
        beta = () if self.config.beta <= WEAK_BETA else (f"beta {WEAK_BETA}",)
        return (f"k-means of the latents as they are, and restart {self.config.restart or RESTART}", *beta)

    def remedy(self, name: str, again: bool = False) -> None:
        super().remedy(name, again)
        if name == self.remedies()[0]:
            self._restart = self.config.restart or RESTART
            self.slots = min(self.codes, SLOTS)
        else:
            self._beta = WEAK_BETA

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if bool(self.initialized):
            return
        self._check_first(z)
        z = z.to(self.codebook.dtype)
        used = int(self.used) if self.config.grow else self.codes
        centres, counts = kmeans(F.normalize(z, dim=1) if self.config.cosine else z, used, rng)
        self.codebook[:used] = F.normalize(centres, dim=1) if self.config.cosine else centres
        self.counts[:used] = counts * (used / counts.sum())
        if self.averages:
            self.sums.copy_(self.codebook * self.counts[:, None])
        self.initialized.fill_(True)

    def beta(self, rng: StepRng | None) -> float:
        """beta(t) with t = ``rng.step``; beta itself in eval mode."""
        warmup = self.config.beta_warmup
        if not warmup or not self.training:
            return self._beta
        if rng is None:
            raise ValueError("rng: a StepRng is needed in training while beta_warmup > 0")
        return self._beta * min(1.0, rng.step / warmup)

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        check_latents(z, self.dim)
        batch, grid = z.shape[0], z.shape[2:]
        with torch.autocast(z.device.type, enabled=False):
            rows = at_least_float32(z).movedim(1, -1).reshape(-1, self.dim).contiguous()
            finite = check_finite(rows.view(batch, -1), self.training)
            if self.config.cosine:
                rows = direction(rows, 1)
            vectors, cost = self.vectors().to(rows.dtype), self.cost()
            cost = None if cost is None else cost.to(rows.dtype)
            codes = nearest(rows.detach(), vectors.detach(), cost)
            z_q, loss, error = assign(rows, vectors, codes, batch, self.beta(rng), not self.averages, active, self.config.estimator)
            if self.training:
                if self.config.entropy.weight:
                    share, bonus = self.share().to(rows.dtype), self.config.entropy
                    loss = loss + bonus.weight * mean_entropy(rows, vectors, share, bonus.temperature, batch, cost, active)
                self._count(rows, codes, batch, finite, active, rng)
        z_q = z_q.view(batch, *grid, self.dim).movedim(-1, 1)
        return Quantized(z_q, (codes.view(batch, *grid),), loss, {"quantization_error": error.detach()})

    @torch.no_grad()
    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Moving averages (with Laplace smoothing in the division only; codes hardly used stay), then restarts of dead codes, then growth.

        Two collectives of fixed size, on every rank in every step: the least keys, then counts, sums and candidates.
        """
        pending = self._reduce(comm)
        gamma = self.config.decay
        self.counts.lerp_(pending["counts"], 1 - gamma)
        if self.averages:
            self.sums.lerp_(pending["sums"], 1 - gamma)
            total = self.counts.sum()
            smooth = (self.counts + _EPS) / (total + self.codes * _EPS) * total
            known = self.counts > _LEAST
            self.codebook.copy_(torch.where(known[:, None], self.sums / smooth[:, None], self.codebook))
            self._normalize()
        stats = statistics.usage(pending["counts"])
        used = self.used if self.config.grow else self.codes
        if self.slots:
            mean = self.counts.sum() / used
            dead = self.counts < self._restart * mean
            dead = dead & self._in_use() if self.config.grow else dead
            sums = self.sums if self.averages else None
            taken = revive(dead, pending["key"], pending["candidate"], self.codebook, self.counts, sums, mean)
            stats["restarts"] = taken.sum().to(self.counts.dtype)
        if self.config.grow:
            now = codes_at(rng.step + 1, self.codes, self.config.grow)
            if now > self._at_least:
                split(self.codebook, self.counts, self.sums if self.averages else None, self.used, now, rng)
                self._at_least = now
            self._normalize()
            stats["codes_in_use"] = self.used.to(self.counts.dtype)
        return stats

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing is known of what is loaded: the next ``update`` brings it to the codes that are due."""
        self._at_least = 0
        super()._load_from_state_dict(*args)

    def _normalize(self) -> None:
        if self.config.cosine and self.averages:
            self.codebook.copy_(F.normalize(self.codebook, dim=1))

    @torch.no_grad()
    def reestimate(self, comm: Comm, number: int = 0) -> None:
        if self.averages:
            pending = self._reduce(comm)
            used = pending["counts"] > 0
            mean = pending["sums"] / pending["counts"].clamp_min(1)[:, None]
            mean = F.normalize(mean, dim=1) if self.config.cosine else mean
            self.codebook.copy_(torch.where(used[:, None], mean, self.codebook))
            self.counts.copy_(pending["counts"] * (self.codes / pending["counts"].sum().clamp_min(1)))
            self.sums.copy_(self.codebook * self.counts[:, None])
        self.discard()
