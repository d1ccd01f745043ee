"""Are samples copies of training data? Distances to the nearest training image, beside those of honest reconstructions.

Decoded images are smoother than real ones and lie nearer to everything; so samples are compared with reconstructions of
held-out images, which went through the same decoder and cannot be copies. Samples that lie clearly nearer to the training
set than these do were remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.evaluation.bootstrap import Estimate, interval, resampled

QUANTILES = (0.01, 0.05, 0.5)
SIDE = 32


def pixel_vectors(images: Tensor) -> Tensor:
    """(n, C, H, W) in [0, 1] to (n, D) float32; images larger than 32 pixels a side are averaged down to that."""
    height, width = images.shape[2:]
    small = images.float() if max(height, width) <= SIDE else F.adaptive_avg_pool2d(images.float(), (min(height, SIDE), min(width, SIDE)))
    return small.flatten(1)


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training image in one space, of samples and of reconstructions of held-out images.

    Attributes:
        samples, reconstructions: quantile -> distance.
        ratio: quantile -> distance of the samples as a share of that of the reconstructions; 1 is as far as honest images; inf or
            nan where held-out reconstructions coincide with training images.
        nearer: the share of samples nearer than the nearest 1 % of the reconstructions; about 0.01 where nothing was remembered.
    """

    samples: Mapping[float, float]
    reconstructions: Mapping[float, float]
    ratio: Mapping[float, Estimate]
    nearer: Estimate

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantiles": {
                f"{q:g}": {"samples": own, "reconstructions": self.reconstructions[q], "ratio": self.ratio[q].to_dict()}
                for q, own in self.samples.items()
            },
            "nearer_than_1_percent_of_reconstructions": self.nearer.to_dict(),
        }


def _figures(samples: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.tensor(QUANTILES, dtype=torch.float64)
    own, honest = torch.quantile(samples, q), torch.quantile(reconstructions, q)
    return own, honest, own / honest, (samples < honest[0]).double().mean()


def memorisation(samples: Tensor, reconstructions: Tensor, replicates: int, seed: int) -> Memorisation:
    """From the nearest distances (n_s,) and (n_r,) of samples and reconstructions (``neighbours.Nearest``)."""
    samples, reconstructions = samples.double().cpu(), reconstructions.double().cpu()
    own, honest, ratio, nearer = _figures(samples, reconstructions)
    draws = [
        _figures(resampled(samples, b, seed, "nearest/samples"), resampled(reconstructions, b, seed, "nearest/reconstructions"))
        for b in range(replicates)
    ]
    ratios, shares = torch.stack([d[2] for d in draws]), torch.stack([d[3] for d in draws])
    return Memorisation(
        dict(zip(QUANTILES, own.tolist(), strict=True)),
        dict(zip(QUANTILES, honest.tolist(), strict=True)),
        {q: interval(ratio[i].item(), ratios[:, i]) for i, q in enumerate(QUANTILES)},
        interval(nearer.item(), shares, share=True),
    )
