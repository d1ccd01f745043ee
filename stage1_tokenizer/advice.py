"""What figures of a tokenizer's codes mean, and what to change: rules with their thresholds in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stage1_tokenizer.metrics import expected_codes

LOW_USAGE, FEW_CODES = 0.5, 0.1  # share of the codebook used; perplexity as a share of the used codes
TWINS = 0.05  # a pair nearer than this share of the median distance to the nearest code
POOR = 0.5  # quantisation error as a share of the latents' variance, unless white noise of D dimensions, of which K codes leave
WHITE = 1.2  # K^(-2/D) at least (rate-distortion), could not be quantised to so many times less
PULL = 3.0  # gradient of the quantiser's terms as a multiple of the task's
FAR = 10.0  # quantisation error as a multiple of the latents' variance: codes lie elsewhere
CHEAP_SWAP = 1.0  # dB that another sample's codes of a level should cost at least
FLAT = 0.05  # of the bits of the level: positions below this entropy say next to nothing


@dataclass(frozen=True)
class LevelFacts:
    """What was measured of one level.

    Attributes:
        name, vocab, positions: of the level; in_use: how many of the vocabulary there can be as yet, fewer where a codebook grows.
        seen: how many codes were looked at; used: how many different ones occurred; perplexity, entropy_bits: of their frequencies.
        table_used: how many codes of its codebook occurred, in all levels that share it; None where an earlier level has it.
        position_bits: (min, mean, max) entropy of a position.
        variance: of the latents as they are compared with the codes, mean over dimensions; error: mean squared difference to the
            codes' vectors.
        twins: how many used codes have another one next to them; None where vectors were not compared.
        swap_cost: dB; None for a single level.
        dim: of the latents.
        advice: what its kind of quantiser has against a symptom, as ``Quantizer.advice``, and its tokenizer against "swap".
    """

    name: str
    vocab: int
    in_use: int
    positions: int
    seen: int
    used: int
    table_used: int | None
    perplexity: float
    entropy_bits: float
    position_bits: tuple[float, float, float]
    variance: float
    error: float
    twins: int | None
    swap_cost: float | None
    dim: int
    advice: Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the figures, and what to try, in order."""

    what: str
    try_: str


def level_findings(facts: LevelFacts) -> list[Finding]:
    """What is wrong with one level, worst first."""
    found = []
    where, ratio = f"level {facts.name}", facts.error / max(facts.variance, 1e-12)
    if facts.table_used is not None and facts.table_used < LOW_USAGE * expected_codes(facts.in_use, facts.seen):
        found.append(Finding(f"{where}: collapse, {facts.table_used} of {facts.in_use} codes are used", facts.advice["collapse"]))
    elif facts.perplexity < FEW_CODES * facts.used:
        shown = f"{where}: perplexity {facts.perplexity:.0f} of {facts.used} used codes: a few codes do nearly all the work"
        found.append(Finding(shown, "fine where the data have much empty background or a rate is set; else beta: 0.1, or fewer codes"))
    if ratio > FAR:
        shown = f"{where}: the latents lie {ratio:.0f} times their own variance away from their codes"
        found.append(Finding(shown, facts.advice["far"]))
    elif ratio > max(POOR, WHITE * facts.in_use ** (-2 / facts.dim)):
        shown = f"{where}: the quantisation error is {ratio:.0%} of the latents' variance"
        found.append(Finding(shown, "more codes, several stages (residual) or groups (product), a smaller dim, a longer training"))
    if facts.twins:
        shown = f"{where}: {facts.twins} used codes have another one next to them (nearer than {TWINS:.0%} of the usual distance)"
        found.append(Finding(shown, f"{facts.advice['twins']}: twins cost bits and add nothing"))
    if facts.swap_cost is not None and facts.swap_cost < CHEAP_SWAP:
        shown = f"{where}: carries nothing; another sample's codes cost {facts.swap_cost:z.1f} dB"
        found.append(Finding(shown, facts.advice["swap"]))
    if facts.used > 1 and facts.position_bits[0] < FLAT * facts.entropy_bits:
        shown = f"{where}: a position says {facts.position_bits[0]:.2f} bits, the most telling one {facts.position_bits[2]:.2f}"
        found.append(Finding(shown, "normal for borders that are always alike; a crop would save these codes"))
    return found


def gradient_findings(gradients: dict[str, dict[str, float]]) -> list[Finding]:
    """What is wrong with the balance of gradients."""
    found = []
    for name, norms in gradients.items():
        if norms["quantiser"] > PULL * norms["task"]:
            shown = (
                f"{name}: the quantiser pulls at the latents {norms['quantiser'] / max(norms['task'], 1e-12):.1f} times as hard as the task"
            )
            found.append(Finding(shown, "a larger objective.weight, or less weight on the quantiser's own terms (beta: 0.1)"))
    return found


def findings(levels: Sequence[LevelFacts], gradients: dict[str, dict[str, float]]) -> list[Finding]:
    """All that is wrong, level by level, then the gradients."""
    return [finding for facts in levels for finding in level_findings(facts)] + gradient_findings(gradients)
