"""The parts of a pipeline, fitted together: where they are, signals to codes and back, and likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.specs import SignalSpec
from pipelines.fit import check_fit, whole
from pipelines.labels import Label, label_tensor
from pipelines.likelihood import nats
from pipelines.options import check_options, describe, plain_options, route_options
from pipelines.outputs import from_public, to_public
from pipelines.request import Request, checked_request
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage2_prior.priors.base import Prior


class PipelineParts:
    """A tokenizer and the priors over its codes, checked.

    Attributes:
        tokenizer, priors: the parts; the priors in order of their levels, coarse to fine.
        micro_batch: rows of the priors' micro-batches; the tokenizer has its own.
        defaults: sampling options where a call gives none.
        classes: names of the classes that a label can be; empty where no prior takes labels.
        last_seed: the seed of the latest call that drew; None before.
    """

    def __init__(
        self, tokenizer: Tokenizer, priors: Sequence[Prior], *, micro_batch: int = 32, defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Raises ValueError where the parts do not fit: see ``pipelines.fit.check_fit``.

        Args:
            defaults: option -> a value for every prior that has it, or {name of a level: value}.
        """
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(f"tokenizer: a {type(tokenizer).__name__}; expected a Tokenizer")
        self.tokenizer = tokenizer
        self.priors = tuple(priors)
        self.spec = tokenizer.spec
        check_fit(tokenizer, self.spec, self.priors)
        self.micro_batch = whole("micro_batch", micro_batch, 1)
        self.defaults = plain_options(defaults or {})
        check_options(self.priors, route_options(self.priors, self.defaults))
        self._labelled = next((prior.spec for prior in self.priors if prior.conditional), None)
        self.classes = () if self._labelled is None else self._labelled.classes
        self.last_seed: int | None = None

    # Where it is -----------------------------------------------------------------------------------------------
    @property
    def signal(self) -> SignalSpec:
        return self.spec.signal

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves all parts, as ``nn.Module.to`` does: ``to("cuda")``, ``to("cuda", torch.bfloat16)``. Quantisers stay in float32 or wider.

        Another dtype changes the last bits of latents, and so a few codes of ``encode``: publish and save before the cast.
        """
        parts: tuple[torch.nn.Module, ...] = (self.tokenizer, *self.priors)
        for part in parts:
            part.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        priors = ", ".join(f"{type(p).__name__}({p.levels.start}:{p.levels.stop})" for p in self.priors)
        parts = f"{type(self.tokenizer).__name__}, [{priors}]"
        return f"{type(self).__name__}({parts}, {self.signal.channels} x {self.signal.shape}, {self.device})"

    # Signals and codes -----------------------------------------------------------------------------------------
    def encode(self, x: Tensor) -> list[Tensor]:
        """Signals (n, C, *axes) in [0, 1] to codes, one (n, *grid) int64 tensor per level, on the pipeline's device."""
        return self.tokenizer.encode(from_public(x, self.signal).to(self.device))

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes of all levels, or of leading ones that the tokenizer decodes alone, to signals (n, C, *axes) in [0, 1]."""
        return to_public(self.tokenizer.decode(self._here("codes", codes)), self.signal)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Signals in [0, 1] as their codes keep them, of the levels that the priors model: what a perfect prior could make."""
        return self.decode(self.encode(x)[: self.priors[-1].levels.stop])

    # Likelihood ------------------------------------------------------------------------------------------------
    @property
    def nll_is_bound(self) -> bool:
        """True where ``nll`` is an upper bound, because that of a prior is."""
        return any(prior.nll_is_bound for prior in self.priors)

    def nll(self, x: Tensor | Sequence[Tensor], label: Label | None = None) -> Tensor:
        """(n,) float64: -log p(codes | label) in nats, summed over all codes of the levels that the priors model.

        An upper bound of it where ``nll_is_bound``: one that depends on a row's place, whose number decides what is masked.

        Args:
            x: signals (n, C, *axes) in [0, 1], or their codes, one (n, *grid) int64 tensor per level.
            label: an index or name for all, or one for each row. None is p(codes) without a label, as the priors' learned null has
                it; unlike ``sample``, it draws no labels. Priors trained with labels always present know no null and refuse None.
        """
        codes = self._here("codes", self.encode(x) if isinstance(x, Tensor) else x)[: self.priors[-1].levels.stop]
        n = len(codes[0]) if codes else 0
        given = self._given_labels(label, n)
        for prior in self.priors:
            self._check_label(prior, given is not None)
        return nats(self.priors, codes, None if given is None else given.to(self.device), self.micro_batch)

    def bits_per_image(self, x: Tensor | Sequence[Tensor], label: Label | None = None) -> Tensor:
        """(n,) float64: ``nll`` in bits."""
        return self.nll(x, label) / math.log(2)

    # Arguments -------------------------------------------------------------------------------------------------
    def _here(self, name: str, maps: Sequence[Tensor]) -> list[Tensor]:
        """``maps`` on the pipeline's device. Raises ValueError for what is no list of tensors."""
        kinds = [type(each).__name__ for each in maps]
        if isinstance(maps, Tensor) or not all(isinstance(each, Tensor) for each in maps):
            found = "a Tensor" if isinstance(maps, Tensor) else f"a {type(maps).__name__} of {', '.join(sorted(set(kinds)))}"
            raise ValueError(f"{name}: {found}; expected one torch tensor for each level, in a list")
        return [each.to(self.device) for each in maps]

    def _check_label(self, prior: Prior, labelled: bool) -> None:
        if prior.conditional and not labelled and not prior.has_null:
            raise ValueError(f"label: none; {describe(prior)} was trained with labels always present (cond_dropout 0) and needs one")

    def _given_labels(self, label: Label | None, n: int) -> Tensor | None:
        """(n,) int64 on the CPU; None for None. Raises ValueError where no prior takes labels."""
        if label is None:
            return None
        if not self.classes:
            raise ValueError("label: no prior of this pipeline takes labels")
        return label_tensor(label, n, self.classes).expand(n)

    def _checked(self, n: Any, first: Any, seed: int | None, batch_size: int | None, **arguments: Any) -> Request:
        """The request, without labels; ``last_seed`` becomes its seed once all is checked: see ``checked_request``."""
        size = max(self.micro_batch, self.tokenizer.config.micro_batch) if batch_size is None else batch_size
        defaults = self.defaults
        if not arguments.get("labelled", True):  # no label to be guided to
            defaults = {name: value for name, value in defaults.items() if name != "guidance"}
        return checked_request(self.priors, n, first=first, seed=seed, batch_size=size, defaults=defaults, **arguments)
