"""A call of ``sample`` or ``stream``, checked whole before any work: which samples, of which classes, drawn how."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.distributed import comm
from pipelines.fit import whole
from pipelines.labels import LabelOf
from pipelines.options import check_options, route_options
from stage2_prior.priors.base import Prior

QUIET_SECONDS = 2.0  # a call that takes longer shows a progress bar


@dataclass(frozen=True)
class Request:
    """Samples ``first`` to ``first + n - 1`` of ``seed``.

    Attributes:
        batch_size: how many are in the making at once.
        options: the sampling options of each prior.
        label_of: the labels of sample indices; None for none, or for the learned null.
        progress: True shows a bar at once, None after a while (on one process), False never.
    """

    n: int
    first: int
    seed: int
    batch_size: int
    options: tuple[Mapping[str, Any], ...]
    progress: bool | None = None
    label_of: LabelOf | None = None

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
    n: Any,
    *,
    first: Any,
    seed: Any,
    batch_size: Any,
    progress: bool | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    labelled: bool = True,
) -> Request:
    """The request that these arguments make, still without labels; a fresh seed where none is given.

    Args:
        options, defaults: of the call, and what holds where it gives none.
        labelled: whether the priors that take labels will be given some.

    Raises:
        ValueError: naming the argument, with what came and what is allowed.
    """
    n, size = whole("n", n, 1), whole("batch_size", batch_size, 1)
    first = whole("first", first, 0, 2**63 - 1 - n)  # indices are int64
    seed = secrets.randbits(32) if seed is None else whole("seed", seed, 0)
    if "text" in options:
        raise ValueError("text: no prior of this pipeline takes text")
    routed = route_options(priors, defaults, options)
    check_options(priors, routed, labelled)
    return Request(n, first, seed, size, routed, progress)
