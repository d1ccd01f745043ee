"""Checks of what callers give. Each error names the argument, what came and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.specs import LevelSpec


def whole(name: str, value: Any, low: int) -> int:
    """``value`` as an int; ValueError for anything but a whole number >= ``low``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise ValueError(f"{name}: {value!r}; expected a whole number >= {low}")
    return number


def _what(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_ids(ids: Any) -> int:
    """The number of samples; ValueError unless ``ids`` is an int64 tensor (n,) with n >= 1."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"ids: {_what(ids)}; expected an int64 tensor of shape (n,) with n >= 1")
    return len(ids)


def check_codes(codes: Sequence[Tensor], levels: Sequence[LevelSpec], n: int, name: str, *, values: bool = True) -> None:
    """Raises ValueError where ``codes`` are not one int64 tensor (n, *shape) in [0, vocab) per level.

    Args:
        values: look at the values too (one host sync per level).
    """
    if len(codes) != len(levels):
        names = ", ".join(level.name for level in levels) or "none"
        raise ValueError(f"{name}: {len(codes)} levels of codes; expected {len(levels)} ({names})")
    for level, c in zip(levels, codes, strict=True):
        if not isinstance(c, Tensor) or c.dtype != torch.int64 or c.shape != (n, *level.shape):
            raise ValueError(f"{name}: level {level.name!r} is {_what(c)}; expected torch.int64 {(n, *level.shape)}")
        if values and c.numel() and not c.is_meta:
            low, high = (int(v) for v in torch.aminmax(c))
            if low < 0 or high >= level.vocab:
                raise ValueError(f"{name}: level {level.name!r} holds values in [{low}, {high}]; expected [0, {level.vocab - 1}]")


def check_known(known: tuple[Sequence[Tensor], Sequence[Tensor]], levels: Sequence[LevelSpec], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """(codes, keep) of each level, the codes 0 wherever they are not kept; ValueError where they do not fit ``levels``."""
    codes, keep = known
    if len(keep) != len(levels) or len(codes) != len(levels):
        raise ValueError(f"known: {len(codes)} levels of codes and {len(keep)} masks; expected {len(levels)} of each")
    for mask, level in zip(keep, levels, strict=True):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (n, *level.shape):
            raise ValueError(f"known: the mask of level {level.name!r} is {_what(mask)}; expected torch.bool {(n, *level.shape)}")
    check_codes(codes, levels, n, "known", values=False)
    kept = [torch.where(m.to(c.device), c, 0) for c, m in zip(codes, keep, strict=True)]
    check_codes(kept, levels, n, "known")
    return kept, list(keep)


def check_kept(found: Sequence[Tensor], codes: Sequence[Tensor], keep: Sequence[Tensor], levels: Sequence[LevelSpec], who: str) -> None:
    """Raises ValueError, naming ``who``, where the codes that it drew are not those of ``codes`` wherever ``keep`` is True.

    Args:
        found, codes, keep: one tensor (n, *shape) of each per level: int64, int64 and bool (one host sync per level).
    """
    for drawn, code, mask, level in zip(found, codes, keep, levels, strict=True):
        changed = (drawn != code.to(drawn.device)) & mask.to(drawn.device)
        if changed.any():
            count, row = int(changed.sum()), int(changed.flatten(1).any(1).nonzero()[0])
            where = f"{count} kept codes of level {level.name!r}, the first of them of sample {row}"
            raise ValueError(f"known: {who} changed {where}; its _sample has to keep all")


def check_guidance(guidance: Any, conditional: bool, has_null: bool, labelled: bool) -> None:
    """Raises ValueError where a prior cannot be guided by ``guidance``, which is on: it needs conditions, a null and a label."""
    if not conditional:
        raise ValueError(f"guidance: {guidance}; a prior without conditions has only 1 (off)")
    if not has_null:
        raise ValueError(f"guidance: {guidance}; this prior was trained with cond_dropout 0 and has only 1 (off)")
    if not labelled:
        raise ValueError(f"guidance: {guidance} needs a label to guide to; expected 1 (off) without one")


def check_label(label: Any, n: int, classes: int, *, values: bool = True) -> None:
    """Raises ValueError where ``label`` is no int64 tensor (n,) in [0, classes)."""
    if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.shape != (n,):
        raise ValueError(f"cond.label: {_what(label)}; expected torch.int64 {(n,)}")
    if values and n and not label.is_meta:
        low, high = (int(v) for v in torch.aminmax(label))
        if low < 0 or high >= classes:
            raise ValueError(f"cond.label: values in [{low}, {high}]; expected [0, {classes - 1}]")
