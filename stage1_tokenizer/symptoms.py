"""What can be measured of a tokenizer's codes beside their use: latents, codebooks, gradients, and what fewer bits would cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.metrics import psnr, unit
from stage1_tokenizer.objectives.base import Objective
from stage1_tokenizer.probe import innermost, outermost, probe
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.tokenizers.base import Tokenizer

LARGEST_CODEBOOK = 16384  # vectors that are compared with each other
LARGEST_TABLE = 1 << 22  # codes that are counted one by one during training
ROWS = 1024


@dataclass
class LatentSums:
    """Sums over the latents of one level, as they are compared with the codes: (D,) each, float64."""

    count: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))
    error: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, z: Tensor, z_q: Tensor) -> None:
        rows, quantized = (t.detach().movedim(1, -1).reshape(-1, t.shape[1]).double().cpu() for t in (z, z_q))
        self.count += len(rows)
        self.mean = self.mean + rows.sum(0)
        self.square = self.square + rows.square().sum(0)
        self.error = self.error + (rows - quantized).square().sum(0)

    @property
    def variance(self) -> float:
        """Mean over the dimensions of the latents' variance."""
        return float((self.square / self.count - (self.mean / self.count).square()).mean())

    @property
    def quantization_error(self) -> float:
        """Mean squared difference between latents and codes' vectors, per dimension."""
        return float((self.error / self.count).mean())


@torch.no_grad()
def look(tokenizer: Tokenizer, x: Tensor, counts: Sequence[Tensor], sums: Sequence[LatentSums]) -> None:
    """Adds a batch of signals (B, C, *axes) to (vocab, positions) counts and to the latents' sums, one of each per level."""
    with probe(innermost(tokenizer)) as calls:
        tokenizer(x)
    for call, count, total in zip(calls, counts, sums, strict=True):
        codes = call.out.codes[0].flatten(1)
        place = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        flat = torch.bincount((codes * codes.shape[1] + place).flatten(), minlength=count.numel())
        count += flat.view_as(count).cpu()
        total.add(call.quantizer.compared(call.z), call.out.z)


def entropy_bits(counts: Tensor) -> Tensor:
    """(...,) bits of the distributions over the first axis of counts (vocab, ...)."""
    p = counts.double() / counts.sum(0, keepdim=True).clamp_min(1)
    return (p * p.clamp_min(1e-300).log2()).sum(0).abs()


def code_vectors(quantizer: Quantizer, level: LevelSpec) -> Tensor | None:
    """(vocab, D) what the codes of an innermost quantiser stand for; None where there are too many to compare."""
    if level.vocab > LARGEST_CODEBOOK:
        return None
    held = itertools.chain(quantizer.parameters(), quantizer.buffers(), [torch.zeros(0)])  # buffers of FSQ are in no state_dict
    codes = torch.arange(level.vocab, device=next(held).device)
    return quantizer.decode((codes[:, None],))[:, :, 0].detach()


def share_tables(levels: Sequence[tuple[Tensor, Quantizer]]) -> list[tuple[Tensor, Tensor | None]]:
    """Counts of levels by codebook: stages that share one use different parts of it.

    Args:
        levels: (vocab,) counts and innermost quantiser of each.

    Returns:
        for each level its counts, and those of its whole codebook: with the first level of the codebook, None with the others.
    """
    tables: dict[int, Tensor] = {}
    for counts, quantizer in levels:
        tables[id(quantizer)] = tables.get(id(quantizer), 0) + counts
    return [(counts, tables.pop(id(quantizer), None)) for counts, quantizer in levels]


def nearest_codes(vectors: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of (N, D): the index into ``among`` (M,) of row numbers, and the distance, of the nearest other or same row."""
    rows = _for_distances(vectors)
    found = [torch.cdist(part, rows[among]).min(1) for part in rows.split(ROWS)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).to(vectors.dtype)


def nearest_pairs(vectors: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Of the used codes: (n, 2) pairs (code, nearest other used code), nearest first, and their distances (n,)."""
    rows = used.nonzero()[:, 0]
    chosen = _for_distances(vectors[rows])
    best: list[Tensor] = []
    for start in range(0, len(rows), ROWS):
        distance = torch.cdist(chosen[start : start + ROWS], chosen)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = math.inf
        best.append(torch.stack([distance.amin(1), distance.argmin(1).to(distance.dtype)], 1))
    if len(rows) < 2:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0)
    table = torch.cat(best)
    pairs = torch.stack([rows, rows[table[:, 1].long()]], 1)
    order = table[:, 0].argsort()
    return pairs[order], table[order, 0].to(vectors.dtype)


def _for_distances(vectors: Tensor) -> Tensor:
    """(N, D) float64 about their mean: ``cdist`` takes differences of squares, which at a large offset leave nothing of a distance."""
    vectors = vectors.double()
    return vectors - vectors.mean(0)


@torch.no_grad()
def rate_distortion(tokenizer: Tokenizer, x: Tensor, counts: Sequence[Tensor]) -> list[dict[str, float | str]]:
    """What fewer bits would cost: the leading levels alone, and each level with only its most used codes.

    A code that is left out is replaced by the nearest of those that stay. Bits are entropies of the codes of ``x``, per sample.

    Args:
        x: signals (B, C, *axes).
        counts: (vocab,) use of each level's codes.

    Returns:
        rows of ``kind`` ("all", "levels 0:n", "level NAME, m codes"), ``bits`` and ``psnr``.
    """
    levels, quantizers = tokenizer.level_specs(), level_quantizers(tokenizer, x)
    assert quantizers is not None
    codes = tokenizer.encode(x)

    def point(kind: str, given: Sequence[Tensor]) -> dict[str, float | str]:
        bits = 0.0
        for c, level in zip(given, levels, strict=False):
            bits += float(entropy_bits(torch.bincount(c.flatten(), minlength=level.vocab))) * level.positions
        quality = psnr(unit(x), unit(tokenizer.decode(list(given)).to(x.dtype)))
        return {"kind": kind, "bits": bits, "psnr": float(quality.mean())}

    rows = [point("all", codes)]
    rows += [point(f"levels 0:{n}", codes[:n]) for n in tokenizer.prefixes() if n < len(levels)]
    for i, (level, quantizer) in enumerate(zip(levels, quantizers, strict=True)):
        vectors = code_vectors(quantizer, level)
        if vectors is None:
            continue
        ranked = counts[i].to(vectors.device).argsort(descending=True)
        kept = int((counts[i] > 0).sum()) // 2
        while kept >= 2:
            among = ranked[:kept]
            replaced = among[nearest_codes(vectors, among)[0]]
            rows.append(point(f"level {level.name}, {kept} codes", [replaced[c] if j == i else c for j, c in enumerate(codes)]))
            kept //= 2
    return rows


@torch.no_grad()
def level_quantizers(tokenizer: Tokenizer, x: Tensor) -> list[Quantizer] | None:
    """The innermost quantiser of each level, as a forward of one signal calls them; None for a tokenizer that gets its codes otherwise."""
    was_training = tokenizer.training
    tokenizer.eval()
    with probe(innermost(tokenizer)) as calls:
        tokenizer(x[:1])
    tokenizer.train(was_training)
    return [call.quantizer for call in calls] if len(calls) == len(tokenizer.level_specs()) else None


def gradients(tokenizer: Tokenizer, objective: Objective, x: Tensor) -> dict[str, dict[str, float]]:
    """Norms of gradients by outermost quantiser, of one batch in training mode; no weight and no statistic changes.

    ``task`` and ``quantiser``: with respect to the latents, of the reconstruction's terms and of the quantiser's own.
    ``codebook``: of the whole loss, with respect to what the optimizer trains of the quantiser.
    """
    was_training = tokenizer.training
    tokenizer.train()
    rng = StepRng(0, 10**6, torch.arange(len(x), device=x.device))  # schedules are past their warm-up
    parts = outermost(tokenizer)
    with torch.enable_grad(), probe(list(parts.values())) as calls:
        out = tokenizer(x, rng=rng)
        loss, _ = objective.tokenizer_loss(out, x, rng.step, rng)
        found: dict[str, dict[str, float]] = {}
        for name, call in zip(parts, calls, strict=True):
            task, own = (_norm(term, [call.z]) for term in (loss - out.loss, out.loss))
            trained = [p for p in call.quantizer.parameters() if p.requires_grad]
            found[name] = {"task": task, "quantiser": own, "codebook": _norm(loss, trained) if trained else 0.0}
    tokenizer.discard()
    tokenizer.train(was_training)
    return found


def _norm(loss: Tensor, inputs: Sequence[Tensor]) -> float:
    if not loss.requires_grad:
        return 0.0
    grads = torch.autograd.grad(loss, list(inputs), retain_graph=True, allow_unused=True)
    return float(sum(g.double().square().sum() for g in grads if g is not None)) ** 0.5
