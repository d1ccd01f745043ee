"""How long drawing samples took. It stands apart from the other figures, which equal runs write equal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

TIMING = "timing.json"


@dataclass(frozen=True)
class Timing:
    """Seconds of drawing and decoding ``samples`` images on ``device`` with so many ``threads``."""

    seconds: float
    samples: int
    device: str
    threads: int

    @property
    def per_thousand(self) -> float:
        """Seconds per 1,000 samples."""
        return 1000 * self.seconds / self.samples

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_per_1000_samples": self.per_thousand}

    def __str__(self) -> str:
        return f"timing: {self.per_thousand:.3g} s per 1,000 samples ({self.device}, {self.threads} thread(s))"


def timing(seconds: float, samples: int, device: torch.device) -> Timing:
    """What was measured on this machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Timing(seconds, samples, name, torch.get_num_threads())
