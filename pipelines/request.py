"""A call of ``sample`` or ``stream``, checked whole before any work: which samples, of which classes, drawn how."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.distributed import comm
from intarsia.specs import CodesSpec
from pipelines.fit import check_options, whole
from pipelines.labels import LabelOf, label_source
from stage2_prior.priors.base import Prior

QUIET_SECONDS = 2.0  # a call that takes longer shows a progress bar


@dataclass(frozen=True)
class Request:
    """Samples ``first`` to ``first + n - 1`` of ``seed``.

    Attributes:
        batch_size: how many are in the making at once.
        label_of: the labels of sample indices; None where no prior takes labels.
        options: the sampling options of each prior.
        progress: True shows a bar at once, None after a while (on one process), False never.
    """

    n: int
    first: int
    seed: int
    batch_size: int
    label_of: LabelOf | None
    options: tuple[Mapping[str, Any], ...]
    progress: bool | None = None

    def batches(self) -> Iterator[Tensor]:
        """The sample indices, (b,) int64, ``batch_size`` at a time; the bar counts those that were worked on."""
        from tqdm import tqdm

        quiet = self.progress is False or (self.progress is None and comm.rank != 0)
        with tqdm(total=self.n, unit="sample", disable=quiet, delay=0 if self.progress else QUIET_SECONDS, leave=False) as bar:
            for start in range(0, self.n, self.batch_size):
                stop = min(start + self.batch_size, self.n)
                yield torch.arange(start, stop) + self.first
                bar.update(stop - start)


def checked_request(
    priors: Sequence[Prior],
    labelled: CodesSpec | None,
    n: Any,
    *,
    first: Any,
    label: Any,
    seed: Any,
    batch_size: Any,
    progress: bool | None,
    options: Mapping[str, Any],
) -> Request:
    """The request that these arguments make; a fresh seed where none is given.

    Args:
        labelled: classes and training frequencies; None where no prior takes labels.

    Raises:
        ValueError: naming the argument, with what came and what is allowed.
    """
    n, size = whole("n", n, 1), whole("batch_size", batch_size, 1)
    first = whole("first", first, 0, 2**63 - 1 - n)  # indices are int64
    seed = secrets.randbits(32) if seed is None else whole("seed", seed, 0)
    check_options(priors, options)
    label_of: LabelOf | None = None
    if labelled is not None:
        label_of = label_source(label, n, first, seed, labelled)
    elif label is not None:
        raise ValueError("label: no prior of this pipeline takes labels")
    return Request(n, first, seed, size, label_of, tuple(options for _ in priors), progress)
