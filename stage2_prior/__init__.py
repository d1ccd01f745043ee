"""Stage 2: priors over grids of integers. Scripts: ``train``, ``evaluate``."""

from stage2_prior.priors.base import PRIORS, Prior, PriorConfig
from stage2_prior.priors.gpt import GPTConfig, GPTPrior
from stage2_prior.priors.maskgit import MaskGITConfig, MaskGITPrior
from stage2_prior.priors.pixelcnn import PixelCNNConfig, PixelCNNPrior
from stage2_prior.priors.rq import RQConfig, RQPrior
from stage2_prior.sampling import Guidance

__all__ = [
    "PRIORS",
    "GPTConfig",
    "GPTPrior",
    "Guidance",
    "MaskGITConfig",
    "MaskGITPrior",
    "PixelCNNConfig",
    "PixelCNNPrior",
    "Prior",
    "PriorConfig",
    "RQConfig",
    "RQPrior",
]
