"""Reconstruction error plus the quantiser's own terms (van den Oord et al. 2017, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from intarsia.config import Added
from intarsia.rng import StepRng
from stage1_tokenizer.objectives.base import OBJECTIVES, Objective, ObjectiveConfig
from stage1_tokenizer.tokenizers.base import TokenizerOutput

EXACT = 1e-6  # a mean squared error, on the scale of [-1, 1], below which `log_mse` gains nothing more: 66 dB


class ReconstructionConfig(ObjectiveConfig):
    """weight * error(x, reconstruction) + prefix_weight * the same for each trained prefix of levels + quantiser terms."""

    error: Literal["mse", "l1", "log_mse"] = "mse"
    """Mean squared or mean absolute error, on the scale of [-1, 1], or the mean over samples of ln(mean squared error), which is PSNR: a
    Gaussian likelihood with the best variance for each sample (Rybkin et al. 2021, section 3.2), so that an easy sample weighs as much
    as a hard one. Its `weight` is about the squared error's times the error that is reached."""
    censored: Added[bool] = False
    """Where the signal stands at -1 or 1, a reconstruction beyond it is no error: clamping mends it (a censored likelihood, Tobin
    1958)."""
    absolute: Added[float] = 0.0
    """Adds so many times the mean absolute error to the squared one: small errors weigh more, such as those of an even background."""
    weight: float = 10.0
    """Weight of the error against the quantiser's terms."""
    prefix_weight: float = 0.25
    """Weight of the error of each reconstruction from leading levels alone, relative to `weight`."""

    def model_post_init(self, context: Any) -> None:
        if self.weight <= 0 or self.prefix_weight < 0:
            raise ValueError(f"weight {self.weight} must be positive and prefix_weight {self.prefix_weight} not negative")
        if self.absolute < 0:
            raise ValueError(f"absolute: {self.absolute} must not be negative")
        if self.absolute and self.error != "mse":
            raise ValueError(f"absolute: {self.absolute} is added to error 'mse'; error is {self.error!r}")


@OBJECTIVES.register("reconstruction", ReconstructionConfig)
class Reconstruction(Objective):
    """Has no state and no critic."""

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.config = config

    def tokenizer_loss(self, out: TokenizerOutput, x: Tensor, step: int, rng: StepRng) -> tuple[Tensor, Mapping[str, Tensor]]:
        error = self._error(out.x, x)
        total = error
        for _, reconstruction in out.prefixes:
            total = total + self.config.prefix_weight * self._error(reconstruction, x)
        loss = self.config.weight * total + out.loss
        return loss, {"loss": loss.detach(), "reconstruction": error.detach(), "quantiser_loss": out.loss.detach(), **out.stats}

    def _error(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.to(x.dtype)  # half precision is compared in the precision of the signal
        if self.config.censored:
            y = y.where((x > -1) | (y > -1), x).where((x < 1) | (y < 1), x)
        if self.config.error == "log_mse":
            return (y - x).square().flatten(1).mean(1).add(EXACT).log().mean()
        error = F.mse_loss(y, x) if self.config.error == "mse" else F.l1_loss(y, x)
        if self.config.absolute:
            error = error + self.config.absolute * F.l1_loss(y, x)
        return error
