"""The prior interface: a distribution over a contiguous range of levels of codes, given the levels above it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from intarsia.config import Config, ConfigError
from intarsia.hub import Pretrained
from intarsia.inference import inference, module_device, module_dtype
from intarsia.padded import run_padded
from intarsia.registry import Registry
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec, Cond, LevelSpec
from stage2_prior.arguments import check_codes, check_guidance, check_ids, check_kept, check_known, check_label, whole
from stage2_prior.corruption import corrupted
from stage2_prior.sampling import SCHEDULE_WORDS, DrawOptions, check_options_class, choose_options

PRIORS: Registry[Prior] = Registry("prior", "stage2_prior.priors")
NLL_FLOATS = 1 << 28
Stats = dict[str, Tensor]
Known = tuple[Sequence[Tensor], Sequence[Tensor]]


class PriorConfig(Config, registry=PRIORS):
    """Base of the priors' configurations."""

    levels: str = ""
    """The levels that are modelled, "start:stop", coarse to fine; all of them where empty."""
    cond_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often training replaces the label by the learned null, which guidance needs; 1 trains without labels."""
    corruption: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How often training replaces a code that is conditioned on, its own or one of a level above, by a random one; helps where data is
    scarce, and where codes above will be drawn and not perfect."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How often training drops a feature of a residual branch, at all positions of a sample (Gal and Ghahramani 2016)."""

    @field_validator("levels")
    @classmethod
    def _levels(cls, value: str) -> str:
        if value and not re.fullmatch(r"\d+:\d+", value):
            raise ValueError('expected "start:stop", such as "0:1"')
        return value


class Prior(Pretrained, nn.Module):
    """Base class: ``__init__(config, spec)``. ``codes`` are the levels [0, stop), each (B, *shape) int64 in [0, vocab).

    Attributes:
        config, spec: what it was built from.
        levels: the range of levels that it models, counted in ``spec.levels``.
        conditional: whether it takes labels.
        nll_is_bound: whether ``nll`` is an upper bound; it is exact otherwise.
        Options: the dataclass of the sampling options that it has: ``DrawOptions``, or one derived from it; another is a ValueError.
    """

    registry: ClassVar[Registry[Any]] = PRIORS
    kind: ClassVar[str] = "prior"
    nll_is_bound: ClassVar[bool] = False
    Options: ClassVar[type[DrawOptions]] = DrawOptions
    config: PriorConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_options_class(cls.Options, cls.__qualname__)

    def __init__(self, config: PriorConfig, spec: CodesSpec) -> None:
        super().__init__()
        count = len(spec.levels)
        start, stop = map(int, (config.levels or f"0:{count}").split(":"))
        if not 0 <= start < stop <= count:
            raise ConfigError([f"prior.levels: {config.levels!r} is no range within the {count} levels of the codes, 0:{count}"])
        if names := [level.name for level in spec.levels[start:stop] if level.name in SCHEDULE_WORDS]:
            words = ", ".join(SCHEDULE_WORDS)
            raise ConfigError([f"prior.levels: level {names[0]!r} has a word of a guidance schedule for a name; expected none of {words}"])
        self.config = config
        self.spec = spec
        self.levels = range(start, stop)
        self.conditional = bool(spec.classes) and config.cond_dropout < 1

    def _spec_dict(self) -> dict[str, Any]:
        return self.spec.to_dict()

    @classmethod
    def _spec_from_dict(cls, tree: Mapping[str, Any]) -> CodesSpec:
        return CodesSpec.from_dict(tree)

    @property
    def own(self) -> tuple[LevelSpec, ...]:
        """The levels that it models."""
        return self.spec.levels[self.levels.start : self.levels.stop]

    @property
    def upper(self) -> tuple[LevelSpec, ...]:
        """The levels above, which it is given."""
        return self.spec.levels[: self.levels.start]

    @property
    def dtype(self) -> torch.dtype:
        return module_dtype(self)

    @property
    def device(self) -> torch.device:
        return module_device(self)

    # Training and likelihood -----------------------------------------------------------------------------------
    def loss(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> tuple[Tensor, Stats]:
        """The training objective in nats per code, the mean over samples of a per-sample value, and scalars to log.

        Args:
            cond: the labels; None for the learned null.
            rng: the draws of dropped conditions and the like; None for none of them.
        """
        raise NotImplementedError

    def forward(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> tuple[Tensor, Stats]:
        """``loss``: gradients are synchronised between processes only through ``forward``."""
        return self.loss(codes, cond, rng)

    def nll(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> Tensor:
        """(B, positions of its levels) nats for each code at temperature 1 without guidance, in eval mode.

        Raises ValueError for codes or labels of the wrong number, shape, dtype or range.
        """
        raise NotImplementedError

    @property
    def nll_rows(self) -> int:
        """How many samples ``nll`` may take at once: at most 250, and about a gigabyte for the logits or a feed-forward."""
        own = sum(level.positions for level in self.own)
        return max(1, min(250, NLL_FLOATS // (own * max(*self.logit_widths, 8 * getattr(self.config, "width", 1)))))

    @property
    def logit_widths(self) -> tuple[int, ...]:
        """How many logits a code of each of its levels has."""
        return tuple(level.vocab for level in self.own)

    def by_level(self, each: Tensor) -> list[Tensor]:
        """(..., positions), in the order of ``nll``, apart by level: (..., positions of the level) in raster order."""
        raise NotImplementedError

    # Sampling --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        ids: Tensor,
        *,
        upper: Sequence[Tensor] = (),
        cond: Cond | None = None,
        seed: int = 0,
        known: Known | None = None,
        micro_batch: int = 32,
        **options: Any,
    ) -> list[Tensor]:
        """Codes of its levels, each (n, *shape) int64. Sample i of a seed has the same bits in any batch and order.

        Args:
            ids: (n,) int64, n >= 1, the samples' indices: with ``seed`` they decide the draws.
            upper: the codes of the levels above, each (n, *shape).
            cond: the labels; None for the learned null.
            seed: >= 0.
            known: (codes, keep), one tensor of each per level of its range: codes (n, *shape) are kept wherever the boolean
                keep (n, *shape) is True.
            micro_batch: rows of the fixed, padded micro-batches; part of what makes the bits.
            options: the fields of ``Options``, each a value for all of its levels or a mapping from names of levels to values.

        Raises:
            ValueError: naming the argument, for anything out of range, for an option that this prior does not have, and where a type's
                ``_sample`` changes what ``known`` keeps.
        """
        n = check_ids(ids)
        seed, micro_batch = whole("seed", seed, 0), whole("micro_batch", micro_batch, 1)
        check_codes(upper, self.upper, n, "upper")
        label = self._label(cond, n)
        chosen = self.check_options(options, cond)
        kept, keep = ([], []) if known is None else self._check_known(known, n)
        rows = [ids, torch.zeros_like(ids) if label is None else label, *upper, *kept, *(~k for k in keep)]
        split = (2, 2 + len(upper), 2 + len(upper) + len(kept))

        def run(*rows: Tensor) -> list[Tensor]:
            keep = [~open_ for open_ in rows[split[2] :]]  # of rows that pad the batch everything: their zeros say that nothing is open
            given = (rows[split[1] : split[2]], keep) if known is not None else None
            return self._sample(rows[0], rows[2 : split[1]], rows[1] if self.conditional else None, seed, given, chosen)

        with inference(self):
            drawn = run_padded(run, [r.to(self.device) for r in rows], micro_batch)
        if known is not None:
            check_kept(drawn, kept, keep, self.own, f"this {self.type_name} prior")
        return drawn

    def check_options(self, options: Mapping[str, Any], cond: Cond | None = None) -> tuple[Any, ...]:
        """The ``Options`` that these make, one for each of its levels, checked as ``sample`` checks them.

        A caller of several priors asks all of them before any draws. ValueError naming the one that does not fit.
        """
        names = [level.name for level in self.own]
        chosen = choose_options(self.Options, options, f"a {self.type_name} prior", names)
        for level, each in zip(self.own, chosen, strict=True):
            each.check_vocab(level.vocab, level.name)
            if each.guided:
                check_guidance(each.guidance, self.conditional, self.has_null, cond is not None and cond.label is not None)
        return chosen

    def _sample(
        self, ids: Tensor, upper: Sequence[Tensor], label: Tensor | None, seed: int, known: Known | None, options: Sequence[Any]
    ) -> list[Tensor]:
        """One micro-batch of ``sample``, on the prior's device, checked.

        Args:
            label: (B,) with ``classes`` for the null.
            known: (codes, keep), (B, *shape) int64 and bool for each of its levels: wherever keep is True the code comes back as it is,
                which ``sample`` compares, and others are drawn given it. Codes are 0 elsewhere; rows that pad the batch keep everything.
            options: one of ``Options`` for each of its levels.
        """
        raise NotImplementedError

    def check_known(self, known: Known) -> None:
        """ValueError where ``sample`` would refuse ``known``: a caller of several priors asks all of them before any draws."""
        self._check_known(known, len(known[0][0]))

    def _check_known(self, known: Known, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """(codes, keep) of its levels, checked."""
        return check_known(known, self.own, n)

    def _arguments(
        self, codes: Sequence[Tensor], cond: Cond | None, check: bool, stop: int | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Upper codes (B, *shape), own codes (B, positions) and labels, all on the prior's device.

        Args:
            check: look at the values too.
            stop: how many levels of codes there are; up to its last where it is not said.
        """
        n = len(codes[0]) if codes else 0
        check_codes(codes, self.spec.levels[: self.levels.stop if stop is None else stop], n, "codes", values=check)
        here = [c.to(self.device) for c in codes]
        return here[: self.levels.start], [c.flatten(1) for c in here[self.levels.start :]], self._label(cond, n, check=check)

    # Conditions ------------------------------------------------------------------------------------------------
    @property
    def has_null(self) -> bool:
        """Whether there is a learned null, which ``cond=None`` and guidance need of a conditional prior."""
        return self.conditional and self.config.cond_dropout > 0

    def _label(self, cond: Cond | None, n: int, *, check: bool = True) -> Tensor | None:
        """(n,) int64 labels on the prior's device, ``classes`` for the null; None for a prior without conditions.

        Args:
            check: look at the values too (one host sync).
        """
        if cond is not None and (cond.text is not None or cond.text_mask is not None):
            raise ValueError(f"cond.text: a {self.type_name} prior has no use for text")
        label = None if cond is None else cond.label
        if not self.conditional:
            if label is not None:
                why = "cond_dropout is 1" if self.spec.classes else "its codes are unlabelled"
                raise ValueError(f"cond.label: this prior was trained without labels ({why}) and has no use for one")
            return None
        classes = len(self.spec.classes)
        if label is None:
            if not self.has_null:
                raise ValueError("cond: None, but this prior was trained with cond_dropout 0 and knows no null condition; give labels")
            return torch.full((n,), classes, dtype=torch.int64, device=self.device)
        check_label(label, n, classes, values=check)
        return label.to(self.device)

    def _drop_label(self, label: Tensor | None, rng: StepRng | None) -> Tensor | None:
        """Labels with the null in place of those that training drops at this step."""
        if label is None or rng is None or not self.has_null:
            return label
        dropped = rng.uniform("cond_dropout") < self.config.cond_dropout
        return torch.where(dropped, len(self.spec.classes), label)

    def _corrupt(self, own: Sequence[Tensor], rng: StepRng | None) -> list[Tensor]:
        """(B, positions) codes of each of its levels with random ones in place of those that training replaces at this step."""
        return corrupted(own, self.own, self.config.corruption, rng, "corruption")

    def _corrupt_upper(self, upper: Sequence[Tensor], rng: StepRng | None) -> list[Tensor]:
        """The same of the levels above, (B, *shape)."""
        flat = corrupted([codes.flatten(1) for codes in upper], self.upper, self.config.corruption, rng, "corruption/upper")
        return [codes.view_as(given) for codes, given in zip(flat, upper, strict=True)]

    def _keep(self, rng: StepRng | None, *shape: int) -> Tensor | None:
        """(B, *shape) dropout factors, 0 or 1 / (1 - rate), by ``rng``: whatever the batch and the rank; None for no dropout."""
        rate = self.config.dropout
        if rng is None or rate == 0:
            return None
        return (rng.uniform("dropout", *shape) >= rate).to(self.dtype) / (1 - rate)


def bits(nats: Tensor) -> Tensor:
    """Nats in bits."""
    return nats / math.log(2)
