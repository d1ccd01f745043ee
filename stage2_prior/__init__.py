"""Stage 2: priors over grids of integers. Scripts: ``train``, ``evaluate``."""

from stage2_prior.priors.base import PRIORS, Prior, PriorConfig
from stage2_prior.priors.gpt import GPTConfig, GPTPrior
from stage2_prior.priors.pixelcnn import PixelCNNConfig, PixelCNNPrior

__all__ = ["PRIORS", "GPTConfig", "GPTPrior", "PixelCNNConfig", "PixelCNNPrior", "Prior", "PriorConfig"]
