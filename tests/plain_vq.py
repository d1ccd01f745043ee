"""A vector quantiser as one would write it in an afternoon, short and slow. It passes the conformance kit."""

from __future__ import annotations

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

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor
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
        twice = (latent[:, None] == latent).all(2).tril(-1).any(1)  # their codes wait for the next step
        dead = dead & ~twice
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
