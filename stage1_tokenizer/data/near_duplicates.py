"""Held-out samples that have a near neighbour among the train samples: figures on them measure recall, not generalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_tokenizer.data.base import Source, Split

BLOCK = 512  # samples compared at once


def nearest(split: Split, train: Split) -> tuple[Tensor, Tensor]:
    """The distance of each sample of ``split`` to its nearest in ``train``, and which that is: (N,) float64 and (N,) int64.

    The distance of x to t is |x - t| / |x - m|, with m the mean of x in each channel: its square is the share of the variance of x
    that t leaves unexplained. It does not favour pale or small things, as the plain distance does: of a dot on white, white is no
    near neighbour. A sample without any variance has distance 0 to its equal and inf to all others.

    Samples are taken as evaluation takes them, without augmentation. float64 throughout: equal samples have distance 0 up to 1e-6.
    """
    distances, places = [], []
    for x in _blocks(split):
        best = torch.full((len(x),), torch.inf, dtype=torch.float64)
        place = torch.zeros(len(x), dtype=torch.int64)
        start = 0
        for t in _blocks(train):
            squares = _squares(x, t)
            least, which = squares.min(1)
            closer = least < best
            best, place = torch.where(closer, least, best), torch.where(closer, which + start, place)
            start += len(t)
        own = x - x.mean(2, keepdim=True)
        variance = own.square().sum((1, 2))
        ratio = torch.where(best == 0, best, best / variance)  # 0 / 0 is an equal of a sample without variance
        distances.append(ratio.sqrt())
        places.append(place)
    return torch.cat(distances), torch.cat(places)


def without_near_duplicates(source: Source, name: str) -> Split | None:
    """The samples of the split ``name`` that have no near neighbour in train: those farther than ``source.near_duplicates``.

    None where the source does not ask for it, for the train split itself, and where no sample is left.
    """
    if source.near_duplicates is None or name == "train":
        return None
    split = source.split(name)
    far = (nearest(split, source.split("train"))[0] > source.near_duplicates).nonzero()[:, 0]
    return split.select(far) if len(far) else None


def _blocks(split: Split) -> Iterator[Tensor]:
    """(B, C, positions) float64."""
    for rows in torch.arange(len(split)).split(BLOCK):
        yield split.batch(rows)["x"].flatten(2).double()


def _squares(x: Tensor, t: Tensor) -> Tensor:
    """(B, T) squared distances; what rounding leaves of equal samples is 0."""
    x, t = x.flatten(1), t.flatten(1)
    a, b = x.square().sum(1)[:, None], t.square().sum(1)
    squares = a + b - 2 * x @ t.T
    return torch.where(squares < 1e-12 * (a + b), 0.0, squares)
