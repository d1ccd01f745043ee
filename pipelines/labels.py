"""What a caller may give as ``label``, and the class of each sample where none is given."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.rng import uniform
from intarsia.specs import CodesSpec

Label = int | str | Sequence[int | str] | Tensor
LabelOf = Callable[[Tensor], Tensor]  # sample indices (B,) int64 -> labels (B,) int64, both on the CPU

SHOWN = 20


def known_classes(classes: Sequence[str]) -> str:
    """The names for a message; the first of many."""
    more = f", ... ({len(classes)} in all)" if len(classes) > SHOWN else ""
    return ", ".join(repr(name) if "," in name else name for name in classes[:SHOWN]) + more


def class_index(label: Any, classes: Sequence[str]) -> int:
    """The index of one label. A name counts without regard to case where that leaves no doubt.

    Raises ValueError for an unknown name (with the nearest one), a name of several classes, and an index out of range.
    """
    if isinstance(label, str):
        found = [i for i, name in enumerate(classes) if name == label]
        found = found or [i for i, name in enumerate(classes) if name.casefold() == label.casefold()]
        if len(found) > 1:
            raise ValueError(f"label: {label!r} is the name of classes {', '.join(map(str, found))}; give the index")
        if not found:
            near = difflib.get_close_matches(label.casefold(), [name.casefold() for name in classes], n=1)
            name = next((c for c in classes if near and c.casefold() == near[0]), None)
            hint = f"; did you mean {name!r}?" if name else ";"
            raise ValueError(f"label: unknown class {label!r}{hint} known: {known_classes(classes)}")
        return found[0]
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise ValueError(f"label: {label!r} is a {type(label).__name__}; expected a class index, a class name or one of them per sample")
    if not 0 <= int(label) < len(classes):
        raise ValueError(f"label: {label} is out of range; expected 0 to {len(classes) - 1}")
    return int(label)


def label_tensor(label: Any, n: int, classes: Sequence[str]) -> Tensor:
    """``label`` as class indices: () int64 for one label for all, (n,) int64 for one per sample.

    Args:
        label: an index, a class name, a sequence or array of ``n`` of those, or an integer tensor or array of shape () or (n,).

    Raises:
        ValueError: naming ``label``, with what came and what is allowed.
    """
    if isinstance(label, np.ndarray) and label.dtype.kind in "USO":  # names
        label = label.tolist()
    if isinstance(label, str | Integral):
        return torch.tensor(class_index(label, classes))
    if hasattr(label, "__array__"):  # tensors and numpy arrays
        rows = torch.as_tensor(label).detach().cpu()
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise ValueError(f"label: dtype {rows.dtype}; expected an integer type")
        rows = rows.to(torch.int64)
        outside = (rows < 0) | (rows >= len(classes))
        if outside.any():
            raise ValueError(f"label: {int(rows[outside].flatten()[0])} is out of range; expected 0 to {len(classes) - 1}")
    elif isinstance(label, Sequence):
        rows = torch.tensor([class_index(one, classes) for one in label], dtype=torch.int64)
    else:
        raise ValueError(f"label: a {type(label).__name__}; expected a class index, a class name or one of them per sample")
    if rows.shape not in ((), (n,)):
        raise ValueError(f"label: shape {tuple(rows.shape)}; expected one label, or {n} of them")
    return rows


def drawn_labels(ids: Tensor, seed: int, class_counts: Sequence[int]) -> Tensor:
    """(B,) int64: a class for each sample, drawn by the training frequencies from the sample's own randomness.

    Inverse transform in float64 on the CPU, so that every machine draws the same classes. Raises ValueError where no class was seen.
    """
    if sum(class_counts) < 1:
        raise ValueError("label: the training frequencies of the classes are all 0; give one label, or one per sample")
    ends = torch.tensor(class_counts, dtype=torch.int64).cumsum(0)
    draws = uniform(seed, "label", ids.cpu(), dtype=torch.float64) * int(ends[-1])
    return torch.searchsorted(ends.to(torch.float64), draws, right=True)


def label_source(label: Any, n: int, first: int, seed: int, spec: CodesSpec) -> LabelOf:
    """The labels of samples ``first`` to ``first + n - 1``, as a function of sample indices; all checks happen here.

    Args:
        label: see ``label_tensor``; None draws each sample's class by the training frequencies.
        spec: the codes that the priors were trained on: class names and counts.
    """
    if label is None:
        drawn_labels(torch.tensor([first]), seed, spec.class_counts)  # raises here what would be raised later
        return lambda ids: drawn_labels(ids, seed, spec.class_counts)
    given = label_tensor(label, n, spec.classes)
    if given.ndim == 0:
        return lambda ids: given.expand(ids.shape[0])
    return lambda ids: given[ids.cpu() - first]
