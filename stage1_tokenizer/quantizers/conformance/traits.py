"""What a quantiser promises beyond the interface: where codes are compared, the paper's loss, moving averages, restarts.

Those of the registered types are in ``known``; for a class of one's own, ``nearest_code`` or ``Traits`` says it, and what is not
said is skipped with that reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.quantizers.conformance.report import Skipped

Codes = tuple[Tensor, ...]
Rows = Callable[[Tensor], Tensor]
MOST_CODES = 1 << 20


@dataclass(frozen=True)
class Choice:
    """One choice of codes by distance: rows (N, D) and the table (K, D) in the space of the comparison, and codes (N,)."""

    rows: Tensor
    table: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Traits:
    """Promises that only some quantisers make; None where there is none to check.

    Attributes:
        choices: (quantizer, z, codes) -> the choices by distance that made ``codes``.
        loss: (quantizer, z, out) -> the loss as the paper writes it, differentiable in z and the parameters.
        surrogate: (quantizer, z) -> the differentiable function whose gradient ``Quantized.z`` passes on; identity: straight-through.
        ema: gamma of moving averages m / N with N smoothed for the division only (eps 1e-5).
        counts, sums: the names of the buffers N (K,) and m (K, D).
        project_code: (K, D) means to codebook vectors, where the averages are projected (cosine).
        restart: codes that nobody uses move to current latents.
        one_table: all maps of codes are of one codebook, so that its usage is that of all of them together.
        active: ``forward`` takes ``active``.
        wide: z and the loss are float32 or wider, whatever the latents are.
        ranks: the codebook is that of all processes.
        idle: a rank may have no samples in a step.
    """

    choices: Callable[[Quantizer, Tensor, Codes], list[Choice]] | None = None
    loss: Callable[[Quantizer, Tensor, Quantized], Tensor] | None = None
    surrogate: Callable[[Quantizer, Tensor], Tensor] | None = None
    ema: float | None = None
    counts: str = "counts"
    sums: str = "sums"
    project_code: Rows | None = None
    restart: bool = False
    one_table: bool = False
    active: bool = True
    wide: bool = True
    ranks: bool = True
    idle: bool = True


def rows_of(z: Tensor) -> Tensor:
    """(B, D, *grid) to (N, D)."""
    return z.movedim(1, -1).flatten(0, -2)


def table_of(quantizer: Quantizer) -> Tensor:
    """(K, D) what every code of a quantiser with one map decodes to."""
    (level,) = quantizer.level_specs("codes", (1,))
    if level.vocab > MOST_CODES:
        raise Skipped(f"a table of all {level.vocab} codes is too large to compare with")
    return quantizer.decode((torch.arange(level.vocab)[:, None],))[..., 0]


def nearest_code(
    *,
    beta: float,
    codebook: float,
    project: Rows | None = None,
    ema: float | None = None,
    counts: str = "counts",
    sums: str = "sums",
    restart: bool = False,
    active: bool = True,
) -> Traits:
    """The traits of a quantiser that takes the nearest vector of one table.

    Args:
        beta: weight of |z - sg[e]|^2, a mean over positions and dimensions.
        codebook: weight of |sg[z] - e|^2; 0 where moving averages take its place.
        project: (..., D) latents to where they are compared; None: as they are.
    """
    projected: Rows = (lambda z: z) if project is None else project

    def surrogate(quantizer: Quantizer, z: Tensor) -> Tensor:
        return projected(z.movedim(1, -1)).movedim(-1, 1)

    def choices(quantizer: Quantizer, z: Tensor, codes: Codes) -> list[Choice]:
        return [Choice(rows_of(surrogate(quantizer, z)), table_of(quantizer), codes[0].flatten())]

    def loss(quantizer: Quantizer, z: Tensor, out: Quantized) -> Tensor:
        vectors, latents = quantizer.decode(out.codes), surrogate(quantizer, z)
        return beta * F.mse_loss(latents, vectors.detach()) + codebook * F.mse_loss(vectors, latents.detach())

    return Traits(choices, loss, surrogate, ema, counts, sums, project, restart, active=active)
