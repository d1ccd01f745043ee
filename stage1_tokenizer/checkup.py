"""The examination of a tokenizer's codes that the doctor reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_tokenizer.advice import TWINS, Finding, LevelFacts, findings
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.levels import LevelMetrics, partners
from stage1_tokenizer.metrics import ReconstructionMetrics, code_statistics, unit
from stage1_tokenizer.objectives.base import Objective
from stage1_tokenizer.sizes import rows_at_once
from stage1_tokenizer.symptoms import (
    LatentSums,
    code_vectors,
    entropy_bits,
    gradients,
    level_quantizers,
    look,
    nearest_pairs,
    rate_distortion,
    share_tables,
)
from stage1_tokenizer.tokenizers.base import Tokenizer

CURVE, GRADIENT_BATCH, PAIRS = 512, 64, 5
MOST_COUNTED = 1 << 28  # codes times positions of a level: 2 GB


@dataclass(frozen=True)
class Checkup:
    """What was found.

    Attributes:
        levels: of each level.
        position_bits: (positions,) entropy of each position, for each level.
        pairs: for each level the nearest pairs of used codes as (code, code, distance).
        curve: rate against distortion; see ``symptoms.rate_distortion``.
        gradients: by quantiser; see ``symptoms.gradients``.
    """

    levels: list[LevelFacts]
    position_bits: list[Tensor]
    pairs: list[list[tuple[int, int, float]]]
    curve: list[dict[str, float | str]]
    gradients: dict[str, dict[str, float]]

    @property
    def findings(self) -> list[Finding]:
        return findings(self.levels, self.gradients)


def examine(tokenizer: Tokenizer, objective: Objective, split: Split, samples: int = 5000) -> Checkup:
    """Looks at a tokenizer without changing it.

    Args:
        samples: as in ``DoctorConfig``.

    Raises:
        ValueError: for a vocabulary whose use by position would not fit into memory, or a tokenizer whose codes no Quantizer makes.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    n = len(split) if samples == 0 else min(samples, len(split))
    rows = torch.linspace(0, len(split) - 1, n).round().long().unique()
    levels = tokenizer.level_specs()
    for level in levels:
        if level.vocab * level.positions > MOST_COUNTED:
            counted = f"{level.vocab} codes at {level.positions} positions are more than the {MOST_COUNTED} that are counted"
            raise ValueError(f"level {level.name}: {counted}")
    quantizers = level_quantizers(tokenizer, split.batch(rows[:1])["x"].to(tokenizer.device, tokenizer.dtype))
    if quantizers is None:
        raise ValueError(f"tokenizer: a {tokenizer.type_name} does not call one Quantizer for each level, which is what is examined here")
    counts = [torch.zeros(level.vocab, level.positions, dtype=torch.int64) for level in levels]
    sums = [LatentSums() for _ in levels]
    at_once = rows_at_once(tokenizer.signal, tokenizer.config.micro_batch)
    for part in rows.split(at_once):
        look(tokenizer, split.batch(part)["x"].to(tokenizer.device, tokenizer.dtype), counts, sums)
    shown = rows[torch.linspace(0, len(rows) - 1, min(CURVE, 2 * at_once, len(rows))).round().long().unique()]
    x = split.batch(shown)["x"].to(tokenizer.device, tokenizer.dtype)
    swaps = _swap_costs(tokenizer, x)

    facts, pairs = [], []
    tables = share_tables([(count.sum(1), quantizer) for count, quantizer in zip(counts, quantizers, strict=True)])
    for i, (level, count, total, quantizer) in enumerate(zip(levels, counts, sums, quantizers, strict=True)):
        use, table = tables[i]
        statistics, by_position = code_statistics(use, level), entropy_bits(count)
        vectors = code_vectors(quantizer, level)
        nearest: list[tuple[int, int, float]] = []
        twins = None
        if vectors is not None:
            found, distance = nearest_pairs(vectors.cpu(), use > 0)
            each = {tuple(sorted((int(a), int(b)))): float(d) for (a, b), d in zip(found[: 2 * PAIRS], distance[: 2 * PAIRS], strict=True)}
            nearest = [(a, b, d) for (a, b), d in each.items()][:PAIRS]
            twins = int((distance < TWINS * distance.median()).sum()) if len(distance) else 0
        pairs.append(nearest)
        facts.append(
            LevelFacts(
                name=level.name,
                vocab=level.vocab,
                in_use=quantizer.codes_in_use(level.vocab),
                positions=level.positions,
                seen=statistics.codes,
                used=statistics.used,
                table_used=None if table is None else int((table > 0).sum()),
                perplexity=statistics.perplexity,
                entropy_bits=statistics.entropy_bits,
                position_bits=(float(by_position.min()), float(by_position.mean()), float(by_position.max())),
                variance=total.variance,
                error=total.quantization_error,
                twins=twins,
                swap_cost=swaps[i] if swaps else None,
                dim=quantizer.dim,
                advice={**quantizer.advice, "swap": tokenizer.against_idle_level},
            )
        )
    curve = rate_distortion(tokenizer, x, [count.sum(1) for count in counts])
    found_gradients = gradients(tokenizer, objective, x[:GRADIENT_BATCH])
    tokenizer.train(was_training)
    return Checkup(facts, [entropy_bits(count) for count in counts], pairs, curve, found_gradients)


def _swap_costs(tokenizer: Tokenizer, x: Tensor) -> list[float]:
    """dB that another sample's codes of each level cost; empty for one level."""
    metrics = LevelMetrics(tokenizer, len(x))
    if not metrics.swaps:
        return []
    codes = tokenizer.encode(x)
    other = partners(torch.arange(len(x), device=x.device), len(x))
    metrics.update(x, codes, [c[other] for c in codes])
    quality = ReconstructionMetrics(x.device)
    quality.update(unit(x), unit(tokenizer.decode(codes).to(x.dtype)))
    return [quality.compute()["psnr"] - swap.compute()["psnr"] for swap in metrics.swaps]
