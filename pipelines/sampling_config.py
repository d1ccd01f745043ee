"""The sampling options as fields of a script's configuration: ``--temperature 0.9``, or ``--temperature.top 0.8`` for one level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import PlainValidator

from intarsia.config import Config


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_guidance(value: Any) -> bool:
    schedule = {"start": _is_number, "stop": _is_number, "shape": _is_text}
    if not isinstance(value, Mapping) or not {"start", "stop"} <= set(value) <= set(schedule):
        return _is_number(value)
    return all(schedule[key](one) for key, one in value.items())


def _each_or_all(what: str, fits: Callable[[Any], bool]) -> PlainValidator:
    """Accepts nothing, one value for all levels, or a mapping from names of levels to values."""

    def check(value: Any) -> Any:
        by_level = isinstance(value, Mapping) and bool(value) and all(_is_text(name) and fits(one) for name, one in value.items())
        if value is None or fits(value) or by_level:
            return value
        raise ValueError(f"expected {what}, or a mapping from names of levels to such")

    return PlainValidator(check)


Number = Annotated[float | dict[str, float] | None, _each_or_all("a number", _is_number)]
Whole = Annotated[int | dict[str, int] | None, _each_or_all("a whole number", _is_whole)]
Text = Annotated[str | dict[str, str] | None, _each_or_all("text", _is_text)]
Schedule = Annotated[float | dict[str, Any] | None, _each_or_all("a number, or start, stop and shape", _is_guidance)]


class SamplingConfig(Config):
    """How samples are drawn; what is not given is the pipeline's default. ``--temperature.top 0.9`` is for the level ``top`` alone."""

    temperature: Number = None
    """Divides the logits; 0 takes the most probable code."""
    top_k: Whole = None
    """Keep the k most probable codes."""
    top_p: Number = None
    """Keep the most probable codes up to this mass."""
    min_p: Number = None
    """Keep the codes at least this share as probable as the most probable one."""
    guidance: Schedule = None
    """Strength of the label; 1 is off. ``--guidance.start 1 --guidance.stop 4`` changes it along the way."""
    steps: Whole = None
    """Steps of priors that decode in parallel."""
    order: Text = None
    """How priors that decode in parallel choose positions."""
    noise: Number = None
    """Noise on the confidence of priors that decode in parallel."""
    schedule: Text = None
    """How the share of open positions falls in priors that decode in parallel."""

    def given(self) -> dict[str, Any]:
        """The options that are set, as a pipeline's methods take them."""
        return {name: value for name, value in self.to_dict().items() if value is not None}


ALIASES = {name: f"sampling.{name}" for name in SamplingConfig.model_fields}
