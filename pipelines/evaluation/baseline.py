"""The baseline that needs no prior: codes drawn independently per position and class, by the training frequencies.

What such samples reach through the same decoder is what the tokenizer alone is worth; a prior has to beat it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.rng import uniform
from intarsia.specs import LevelSpec
from pipelines.evaluation.bootstrap import Strata


class IndependentCodes:
    """p(codes | class) = product over levels and positions of the training frequency of that code there, given the class.

    A draw from the frequencies is the code of a training row of that class, picked anew for each position: no tables, exact
    frequencies, for any vocabulary. A class that training did not see is drawn by the frequencies of all.
    """

    def __init__(self, levels: Sequence[LevelSpec], codes: Sequence[Tensor], labels: Tensor | None = None, classes: int = 1) -> None:
        """
        Args:
            codes: training codes, one (N, *shape) int64 tensor per level.
            labels: (N,) int64 in [0, classes), or None for unlabelled data.
        """
        self.levels = tuple(levels)
        self.n = codes[0].shape[0]
        self.codes = [self._flat(level, c, self.n) for level, c in zip(self.levels, codes, strict=True)]
        self.labels = None if labels is None else labels.cpu()
        self.classes = 1 if labels is None else classes
        self._strata = Strata.of(self.labels, self.n, self.classes)
        unseen = self._strata.size == 0
        self._strata.start[unseen], self._strata.size[unseen] = 0, self.n

    @staticmethod
    def _flat(level: LevelSpec, codes: Tensor, n: int) -> Tensor:
        if tuple(codes.shape) != (n, *level.shape):
            raise ValueError(f"codes of level {level.name!r}: shape {tuple(codes.shape)}; expected {(n, *level.shape)}")
        return codes.cpu().flatten(1)

    def _labels(self, label: Tensor | None, n: int) -> Tensor:
        if (label is None) != (self.labels is None):
            known = "unlabelled" if self.labels is None else "labelled"
            raise ValueError(f"label: {'none' if label is None else 'one'} is given, but the training codes are {known}")
        return torch.zeros(n, dtype=torch.int64) if label is None else label.cpu()

    def sample(self, ids: Tensor, label: Tensor | None = None, seed: int = 0) -> list[Tensor]:
        """Codes of samples ``ids`` (n,) int64 of classes ``label`` (n,), one (n, *shape) tensor per level.

        A draw is a function of (seed, sample, level, position) alone.
        """
        ids = ids.cpu()
        label = self._labels(label, ids.shape[0])
        out = []
        for number, (level, codes) in enumerate(zip(self.levels, self.codes, strict=True)):
            position = torch.arange(level.positions)
            u = uniform(seed, "baseline", ids[:, None], number, position[None], dtype=torch.float64)
            rows = self._strata.pick(label[:, None], u)
            out.append(codes[rows, position[None]].view(-1, *level.shape))
        return out

    def draw_labels(self, ids: Tensor, seed: int = 0) -> Tensor | None:
        """(n,) int64: a class for each sample, by the training frequencies; None for unlabelled data."""
        if self.labels is None:
            return None
        u = uniform(seed, "baseline/label", ids.cpu(), dtype=torch.float64)
        return self.labels[(u * self.n).long().clamp(max=self.n - 1)]

    def bits(self, codes: Sequence[Tensor], label: Tensor | None = None) -> list[Tensor]:
        """-log2 p of held-out codes, one (n, positions) float64 tensor per level.

        The frequencies given the class back off to those of all classes, and these to the uniform distribution
        (Witten and Bell 1991): p = (count + distinct * p_wider) / (total + distinct), with the number of distinct codes
        that were seen as the weight of the wider distribution. So p > 0 for every code, and the sum over codes is 1.

        Args:
            codes: one (n, *shape) int64 tensor per level.
        """
        n = codes[0].shape[0]
        label = self._labels(label, n)
        train_label = self._labels(self.labels, self.n)
        out = []
        for level, train, held in zip(self.levels, self.codes, codes, strict=True):
            held = self._flat(level, held, n)
            columns = []
            for j in range(level.positions):
                p = torch.full((n,), 1 / level.vocab, dtype=torch.float64)
                p = _back_off(torch.zeros_like(train_label), train[:, j], torch.zeros_like(label), held[:, j], 1, p)
                columns.append(_back_off(train_label, train[:, j], label, held[:, j], self.classes, p))
            out.append(-torch.stack(columns, 1).log() / math.log(2))
        return out


def _back_off(groups: Tensor, train: Tensor, group: Tensor, held: Tensor, size: int, wider: Tensor) -> Tensor:
    """(n,) float64: the smoothed probability of each held-out code given its group, at one position."""
    seen, train = train.unique(return_inverse=True)  # a vocabulary may be too large for a table
    pairs, counts = (groups * len(seen) + train).unique(return_counts=True)
    total, distinct = torch.bincount(groups, minlength=size)[group], torch.bincount(pairs // len(seen), minlength=size)[group]
    place = torch.searchsorted(seen, held.contiguous()).clamp(max=len(seen) - 1)
    pair = group * len(seen) + place
    at = torch.searchsorted(pairs, pair).clamp(max=len(pairs) - 1)
    count = torch.where((seen[place] == held) & (pairs[at] == pair), counts[at], 0)
    # a group without any training row leaves all its weight to the wider distribution
    smoothed = (count + distinct * wider) / (total + distinct).clamp(min=1)
    return torch.where(total > 0, smoothed, wider)
