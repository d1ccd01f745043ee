"""Binary spherical quantisation (Zhao et al. 2024, arXiv:2406.07548): signs on the unit sphere, so that the error is bounded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from stage1_tokenizer.quantizers.base import QUANTIZERS, direction
from stage1_tokenizer.quantizers.lfq import SignConfig, SignQuantizer


class BSQConfig(SignConfig):
    """Signs of latents on the unit sphere, values -1 / sqrt(d) and 1 / sqrt(d)."""

    entropy: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the entropy term, in nats per bit; 0 = none."""
    tau: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the assignment p(c | u) ~ exp(-|u - c|^2 / tau). The paper's exp(c u / tau') has tau = 2 tau'."""


@QUANTIZERS.register("bsq", BSQConfig)
class BSQ(SignQuantizer):
    """u = z / |z|, q_i = sign(u_i) / sqrt(d). The gradient reaches u unchanged and z through the normalisation."""

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config)
        self.value = config.bits**-0.5

    def project(self, rows: Tensor) -> Tensor:
        return direction(rows, -1)
