"""Small codes on disk for tests of trained priors: a coarse level, and two depths of a finer one whose codes have factors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from intarsia.codes import write_codes
from intarsia.specs import LevelSpec, SignalSpec

LEVELS = (LevelSpec("top", 4, (2, 2)), LevelSpec("bottom/0", 6, (4, 4), (2, 3)), LevelSpec("bottom/1", 12, (4, 4), (3, 2, 2)))


def write_tiny_codes(folder: Path, train: int = 50, validation: int = 11) -> Path:
    """Labelled codes: the top follows the label, each level below the one above it, all with some noise."""
    write_codes(
        folder,
        {"train": _structured(train, 0), "validation": _structured(validation, 1)},
        LEVELS,
        signal=SignalSpec("image", 1, (8, 8)),
        tokenizer={"type": "vqvae2", "fingerprint": "a" * 64},
        classes=("even", "odd"),
    )
    return folder


def _structured(n: int, seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    codes = [(label[:, None, None] * 2 + torch.randint(2, (n, 2, 2), generator=generator)) % 4]
    for level in LEVELS[1:]:
        above = codes[-1] if codes[-1].shape[1:] == level.shape else codes[-1].repeat_interleave(2, 1).repeat_interleave(2, 2)
        codes.append((above + torch.randint(2, (n, *level.shape), generator=generator)) % level.vocab)
    return codes, label
