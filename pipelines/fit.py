"""Whether the parts of a pipeline fit together, and whether the numbers of a call are ones."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from intarsia.specs import LevelSpec, TokenizerSpec
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage2_prior.priors.base import Prior


def whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """``value`` as an int. Raises ValueError naming the argument for anything but a whole number in [least, most]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        end = f" and at most {most}" if number is not None and number > most else ""
        raise ValueError(f"{name}: {value!r}; expected a whole number of at least {least}{end}")
    return number


def _differences(mine: Sequence[LevelSpec], theirs: Sequence[LevelSpec]) -> str:
    if len(mine) != len(theirs):
        return f"{len(theirs)} levels where the tokenizer has {len(mine)}"
    told = [f"{b.name!r} ({b.vocab} codes on {b.shape})" for a, b in zip(mine, theirs, strict=True) if a != b]
    have = [f"{a.name!r} ({a.vocab} codes on {a.shape})" for a, b in zip(mine, theirs, strict=True) if a != b]
    return f"{', '.join(told)} where the tokenizer has {', '.join(have)}"


def check_fit(tokenizer: Tokenizer, spec: TokenizerSpec, priors: Sequence[Prior]) -> None:
    """Raises ValueError, naming the part and both values, where priors and tokenizer do not belong together.

    Every prior was trained on the codes of this tokenizer; the ranges of levels follow each other from 0 to all levels, or to
    a count of leading levels that the tokenizer decodes alone; conditional priors know the same classes; all lie on one device.
    """
    if not priors:
        raise ValueError("priors: none; expected at least one")
    for i, prior in enumerate(priors):
        if not isinstance(prior, Prior):
            raise ValueError(f"priors[{i}]: a {type(prior).__name__}; expected a Prior")
        if prior.spec.levels != spec.levels:
            raise ValueError(f"priors[{i}]: trained on {_differences(spec.levels, prior.spec.levels)}")
        if prior.spec.fingerprint != spec.fingerprint:
            both = f"of fingerprint {prior.spec.fingerprint}; this one has {spec.fingerprint}"
            raise ValueError(f"priors[{i}]: trained on the codes of a tokenizer {both}")
        if prior.device != tokenizer.device:
            raise ValueError(f"priors[{i}]: lies on {prior.device}, the tokenizer on {tokenizer.device}; expected one device")
    ranges = [prior.levels for prior in priors]
    starts = [0, *(levels.stop for levels in ranges[:-1])]
    if [levels.start for levels in ranges] != starts or ranges[-1].stop not in spec.prefixes:
        shown = ", ".join(f"{levels.start}:{levels.stop}" for levels in ranges)
        allowed = " or ".join(map(str, spec.prefixes))
        raise ValueError(f"priors: the levels are {shown}; expected ranges that follow each other from 0 to {allowed}")
    conditional = [(i, prior) for i, prior in enumerate(priors) if prior.conditional]
    for i, prior in conditional[1:]:
        first, known = conditional[0]
        if prior.spec.classes != known.spec.classes:
            raise ValueError(f"priors[{i}]: the classes {prior.spec.classes} differ from those of priors[{first}], {known.spec.classes}")
