"""Sampling options through a pipeline: the same words for every prior, each value led to the priors and levels that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from numbers import Integral, Real
from typing import Any

import torch

from intarsia.config import nearest
from intarsia.specs import Cond
from stage2_prior.priors.base import Prior
from stage2_prior.sampling import Guidance

Routed = tuple[dict[str, dict[str, Any]], ...]  # of each prior: option -> name of a level -> value
SCHEDULE = tuple(f.name for f in fields(Guidance))


def describe(prior: Prior) -> str:
    """ "the gpt prior of top", for messages."""
    return f"the {prior.type_name} prior of {', '.join(level.name for level in prior.own)}"


def option_names(prior: Prior) -> list[str]:
    """The sampling options that a prior has."""
    return [f.name for f in fields(prior.Options)]


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON holds them: schedules and mappings as dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, Guidance):
            return plain(asdict(value))
        if isinstance(value, Real) and not isinstance(value, bool):  # numpy's too
            return int(value) if isinstance(value, Integral) else float(value)
        return {key: plain(v) for key, v in value.items()} if isinstance(value, Mapping) else value

    return {name: plain(value) for name, value in options.items()}


def route_options(priors: Sequence[Prior], *layers: Mapping[str, Any]) -> Routed:
    """The options of each prior, level by level; later layers lie over earlier ones.

    A plain value goes to every prior that has the option (``guidance``, as the label, to those that take labels), a mapping
    {name of a level: value} to the prior that models the level. ``guidance`` with ``start`` and ``stop`` is a plain value.

    An ``order`` or a temperature of 0, which have no use for ``noise``, take the noise of earlier layers away: a default must not stand in
    their way.

    Raises:
        ValueError: for an option that no prior has, or not the one that models a named level, with the list of what they have;
            for an unknown level, and for a mapping that names none.
    """
    routed: Routed = tuple({} for _ in priors)
    for layer in layers:
        for own, over in zip(routed, _route(priors, layer), strict=True):
            idle = [level for level, order in over.get("order", {}).items() if order != "confidence"]
            idle += [level for level, temperature in over.get("temperature", {}).items() if temperature == 0]
            for level in idle:
                own.get("noise", {}).pop(level, None)
            for name, values in over.items():
                own[name] = own.get(name, {}) | values
            if own.get("noise") == {}:
                del own["noise"]
    return routed


def _route(priors: Sequence[Prior], layer: Mapping[str, Any]) -> Routed:
    """``route_options`` of one layer."""
    routed: Routed = tuple({} for _ in priors)
    owner = {level.name: i for i, prior in enumerate(priors) for level in prior.own}
    for name, value in layer.items():
        if not any(name in option_names(prior) for prior in priors):
            raise ValueError(f"{name}: no prior of this pipeline has such a sampling option; {_possessions(priors)}")
        if isinstance(value, Mapping) and not value:
            raise ValueError(f"{name}: an empty mapping; expected a value, or one for at least one of {', '.join(owner)}")
        if isinstance(value, Mapping) and not _is_schedule(name, value, owner):
            for level, one in value.items():
                if level not in owner:
                    raise ValueError(f"{name}.{level}: unknown level{nearest(level, owner)} the levels are {', '.join(owner)}")
                prior = priors[owner[level]]
                if name not in option_names(prior):
                    raise ValueError(f"{name}.{level}: no sampling option of its prior; {_possessions([prior])}")
                routed[owner[level]].setdefault(name, {})[level] = one
            continue
        for i, prior in enumerate(priors):
            if name in option_names(prior) and _takes(name, prior, priors):
                routed[i][name] = {level.name: value for level in prior.own}
    return routed


def merged_options(priors: Sequence[Prior], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """What ``layers`` come to, as JSON holds it: one value where all levels that have the option agree, else {name of a level: value}.

    Raises ValueError as ``route_options`` does.
    """
    merged: dict[str, dict[str, Any]] = {}
    for own in route_options(priors, *layers):
        for name, values in plain_options(own).items():
            merged.setdefault(name, {}).update(values)

    def shortest(name: str, values: dict[str, Any]) -> Any:
        having = {level.name for prior in priors if name in option_names(prior) and _takes(name, prior, priors) for level in prior.own}
        first = next(iter(values.values()))
        return first if set(values) == having and all(value == first for value in values.values()) else values

    return {name: shortest(name, values) for name, values in merged.items()}


def _is_schedule(name: str, value: Mapping[str, Any], levels: Mapping[str, int]) -> bool:
    return name == "guidance" and any(key in SCHEDULE and key not in levels for key in value)


def _takes(name: str, prior: Prior, priors: Sequence[Prior]) -> bool:
    """Guidance goes where the label goes; where no prior takes labels, each of them says so."""
    return name != "guidance" or prior.conditional or not any(other.conditional for other in priors)


def _possessions(priors: Sequence[Prior]) -> str:
    return "; ".join(f"{describe(prior)} has {', '.join(option_names(prior))}" for prior in priors)


def check_options(priors: Sequence[Prior], routed: Routed, labelled: bool = True) -> None:
    """Asks every prior whether it takes its options; ValueError naming the option, and the prior where there are several.

    Args:
        labelled: whether the priors that take labels will be given some.
    """
    for prior, own in zip(priors, routed, strict=True):
        cond = Cond(label=torch.zeros(1, dtype=torch.int64)) if prior.conditional and labelled else None
        try:
            prior.check_options(own, cond)
        except ValueError as error:
            raise ValueError(f"{error} ({describe(prior)})" if len(priors) > 1 else str(error)) from None
