"""The words that the rooms share: what a signal is, what a level of codes is, what a tokenizer and a code set hold.

Axes are ``(t,)``, ``(h, w)`` or ``(t, h, w)``. Levels are listed coarse to fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

KINDS = {"audio": 1, "image": 2, "video": 3}


@dataclass(frozen=True)
class SignalSpec:
    """The geometry of one signal: a float tensor ``(channels, *shape)`` in [-1, 1]."""

    kind: str
    channels: int
    shape: tuple[int, ...]
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"signal.kind: {self.kind!r} is none of {sorted(KINDS)}")
        if len(self.shape) != KINDS[self.kind]:
            raise ValueError(f"signal.shape: {self.shape} has {len(self.shape)} axes, {self.kind} has {KINDS[self.kind]}")
        if self.channels < 1 or min(self.shape) < 1:
            raise ValueError(f"signal: channels {self.channels} and shape {self.shape} must be positive")

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> SignalSpec:
        return cls(tree["kind"], tree["channels"], tuple(tree["shape"]), tree.get("rate"))


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
        if not self.factors:
            object.__setattr__(self, "factors", (self.vocab,))
        if self.vocab < 1 or not self.shape or min(self.shape) < 1:
            raise ValueError(f"level {self.name!r}: vocab {self.vocab} and shape {self.shape} must be positive")
        if math.prod(self.factors) != self.vocab:
            raise ValueError(f"level {self.name!r}: factors {self.factors} make {math.prod(self.factors)} codes, vocab is {self.vocab}")

    @property
    def positions(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> LevelSpec:
        return cls(tree["name"], tree["vocab"], tuple(tree["shape"]), tuple(tree.get("factors", ())))


@dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer takes and gives. ``prefixes``: the counts of leading levels that ``decode`` accepts."""

    signal: SignalSpec
    levels: tuple[LevelSpec, ...]
    fingerprint: str
    prefixes: tuple[int, ...]


@dataclass(frozen=True)
class TextSpec:
    """Text conditioning: states of ``dim`` features, at most ``length`` of them, from ``encoder``."""

    encoder: str
    dim: int
    length: int


@dataclass(frozen=True)
class CodesSpec:
    """What ``codes.json`` tells a prior. ``class_counts`` are the training frequencies; both are empty where unlabelled."""

    levels: tuple[LevelSpec, ...]
    fingerprint: str
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    text: TextSpec | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("codes: there must be at least one level")
        if len(self.classes) != len(self.class_counts):
            raise ValueError(f"codes: {len(self.classes)} classes but {len(self.class_counts)} class counts")

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> CodesSpec:
        return cls(
            tuple(LevelSpec.from_dict(level) for level in tree["levels"]),
            tree["fingerprint"],
            tuple(tree.get("classes", ())),
            tuple(tree.get("class_counts", ())),
            TextSpec(**tree["text"]) if tree.get("text") else None,
        )


@dataclass(frozen=True)
class Cond:
    """What a caller conditions on: ``label`` (B,) int64; ``text`` (B, T, D) float with ``text_mask`` (B, T) bool, True = a real state."""

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def __getitem__(self, rows: Any) -> Cond:
        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        return Cond(pick(self.label), pick(self.text), pick(self.text_mask))

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(*args, **kwargs)

        label = None if self.label is None else self.label.to(*[a for a in args if not hasattr(a, "is_floating_point")])
        return Cond(label, move(self.text), self.text_mask if self.text_mask is None else self.text_mask.to(label.device if label is not None else self.text_mask.device))


def to_plain(spec: Any) -> dict[str, Any]:
    """A spec as dictionaries, lists and scalars, as JSON holds it."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return plain(asdict(spec))
