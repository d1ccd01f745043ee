"""The words that the rooms share: what a signal is, what a level of codes is, what a tokenizer and a code set hold.

Axes are ``(t,)``, ``(h, w)`` or ``(t, h, w)``. Levels are listed coarse to fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

KINDS = {"audio": 1, "image": 2, "video": 3}
S = TypeVar("S")


def _whole(what: str, *values: Any, least: int = 1) -> None:
    """Raises ValueError where a value is no integer of at least ``least``: specs are read from files of others."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what}: {value!r}; expected an integer of at least {least}")


def _tuple(what: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what}: {value!r}; expected a list")
    return tuple(value)


def _text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what}: {value!r}; expected text")


def _build(cls: type[S], what: str, tree: Any, **changes: Any) -> S:
    """``cls`` from a mapping with exactly its fields (those with defaults may be missing)."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{what}: {tree!r}; expected a mapping")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if unknown := [key for key in tree if key not in known]:
        raise ValueError(f"{what}: unknown key {unknown[0]!r}; expected {', '.join(known)}")
    try:
        return cls(**{**tree, **{key: change(tree[key]) for key, change in changes.items() if key in tree}})
    except TypeError:
        missing = [f.name for f in fields(cls) if f.name not in tree and f.default is MISSING]  # type: ignore[arg-type]
        raise ValueError(f"{what}: misses {', '.join(missing)}; expected {', '.join(known)}") from None


@dataclass(frozen=True)
class SignalSpec:
    """The geometry of one signal: a float tensor ``(channels, *shape)`` in [-1, 1]; ``rate`` in Hz along t, where there is one."""

    kind: str
    channels: int
    shape: tuple[int, ...]
    rate: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"signal.kind: {self.kind!r} is none of {sorted(KINDS)}")
        object.__setattr__(self, "shape", _tuple("signal.shape", self.shape))
        _whole("signal.channels", self.channels)
        _whole("signal.shape", *self.shape)
        if len(self.shape) != KINDS[self.kind]:
            raise ValueError(f"signal.shape: {self.shape} has {len(self.shape)} axes, {self.kind} has {KINDS[self.kind]}")
        if self.rate is not None and (type(self.rate) not in (int, float) or not 0 < self.rate < math.inf):
            raise ValueError(f"signal.rate: {self.rate!r}; expected a positive number or nothing")

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> SignalSpec:
        return _build(cls, "signal", tree)

    @property
    def drawable(self) -> bool:
        """An image that a picture file holds: grey or colour."""
        return self.kind == "image" and self.channels in (1, 3)


@dataclass(frozen=True)
class LevelSpec:
    """One map of codes: integers in [0, vocab) on a grid of ``shape``.

    ``factors`` are the sizes of the digits that make up a code (FSQ levels, LFQ bits); ``(vocab,)`` where there are none.
    """

    name: str
    vocab: int
    shape: tuple[int, ...]
    factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _text("level.name", self.name)
        what = f"level {self.name!r}"
        _whole(f"{what}: vocab", self.vocab)
        object.__setattr__(self, "shape", _tuple(f"{what}: shape", self.shape))
        object.__setattr__(self, "factors", _tuple(f"{what}: factors", self.factors) or (self.vocab,))
        _whole(f"{what}: shape", *self.shape)
        _whole(f"{what}: factors", *self.factors)
        if not self.shape:
            raise ValueError(f"{what}: shape {self.shape}; expected at least one axis")
        if math.prod(self.factors) != self.vocab:
            raise ValueError(f"{what}: factors {self.factors} make {math.prod(self.factors)} codes, vocab is {self.vocab}")

    @property
    def positions(self) -> int:
        """The number of codes of one sample."""
        return math.prod(self.shape)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> LevelSpec:
        return _build(cls, "level", tree)


def _levels(value: Any) -> tuple[LevelSpec, ...]:
    return tuple(LevelSpec.from_dict(level) for level in _tuple("levels", value))


def _check_levels(what: str, levels: tuple[LevelSpec, ...], fingerprint: Any) -> None:
    names = [level.name for level in levels]
    if not levels or len(set(names)) != len(names):
        raise ValueError(f"{what}: levels {names}; expected at least one, each with a name of its own")
    _text(f"{what}: fingerprint", fingerprint)


@dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer takes and gives. ``prefixes``: the counts of leading levels that ``decode`` accepts, rising to all."""

    signal: SignalSpec
    levels: tuple[LevelSpec, ...]
    fingerprint: str
    prefixes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _tuple("tokenizer: levels", self.levels))
        object.__setattr__(self, "prefixes", _tuple("tokenizer: prefixes", self.prefixes))
        _check_levels("tokenizer", self.levels, self.fingerprint)
        _whole("tokenizer: prefixes", *self.prefixes)
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1:] != (len(self.levels),):
            raise ValueError(f"tokenizer: prefixes {self.prefixes}; expected rising counts that end with {len(self.levels)}")

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TokenizerSpec:
        return _build(cls, "tokenizer", tree, signal=SignalSpec.from_dict, levels=_levels)


@dataclass(frozen=True)
class TextSpec:
    """Text conditioning: states of ``dim`` features, at most ``length`` of them, from ``encoder``."""

    encoder: str
    dim: int
    length: int

    def __post_init__(self) -> None:
        _text("text.encoder", self.encoder)
        _whole("text.dim", self.dim)
        _whole("text.length", self.length)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TextSpec:
        return _build(cls, "text", tree)


@dataclass(frozen=True)
class CodesSpec:
    """What ``codes.json`` tells a prior. ``class_counts`` are the training frequencies; both are empty where unlabelled."""

    levels: tuple[LevelSpec, ...]
    fingerprint: str
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    text: TextSpec | None = None

    def __post_init__(self) -> None:
        for name in ("levels", "classes", "class_counts"):
            object.__setattr__(self, name, _tuple(f"codes: {name}", getattr(self, name)))
        _check_levels("codes", self.levels, self.fingerprint)
        _whole("codes: class_counts", *self.class_counts, least=0)
        for name in self.classes:
            _text("codes: classes", name)
        if len(self.classes) != len(self.class_counts):
            raise ValueError(f"codes: {len(self.classes)} classes but {len(self.class_counts)} class counts")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; ``from_dict`` reads it back."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> CodesSpec:
        return _build(cls, "codes", tree, levels=_levels, text=lambda text: None if text is None else TextSpec.from_dict(text))


@dataclass(frozen=True)
class Cond:
    """What a caller conditions on: ``label`` (B,) int64; ``text`` (B, T, D) float with ``text_mask`` (B, T) bool, True = a real state."""

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def __getitem__(self, rows: Any) -> Cond:
        """The condition of some rows of the batch."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        return Cond(pick(self.label), pick(self.text), pick(self.text_mask))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """On another device; ``dtype`` is for the text states alone."""

        def move(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            return None if t is None else t.to(device=device, dtype=dtype)

        return Cond(move(self.label), move(self.text, dtype), move(self.text_mask))


def to_plain(spec: Any) -> dict[str, Any]:
    """A spec as dictionaries, lists and scalars, as JSON holds it."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return plain(asdict(spec))
