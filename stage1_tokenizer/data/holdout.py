"""Which train samples are held out as validation, where a source has no validation split of its own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.rng import uniform

Holdout = int | float | str | None
SHARE = 0.05


def check_holdout(value: Any) -> Any:
    """Raises ValueError for anything but None, a count >= 0, a share in (0, 1) or a name."""
    if value is None or (isinstance(value, str) and value):
        return value
    if (type(value) is int and value >= 0) or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError("expected a count >= 0, a share in (0, 1), the name of a list of indices, or null")


def held_out(holdout: Holdout, n: int, has_validation: bool) -> Tensor | None:
    """(n,) bool, True = held out; None where nothing is.

    A share takes each sample the hash of whose number falls below it (at least one), so that data added at the end move no others; a
    count takes the samples of the smallest hashes; a name reads a list of indices. Raises ConfigError where nothing would be left, or
    where the source has a validation split already.
    """
    if has_validation:
        if holdout in (None, 0):
            return None
        own = "the source has a validation split of its own; --data.holdout null holds out nothing more"
        raise ConfigError([f"data.holdout: {holdout!r}, but {own}"])
    if holdout == 0:
        return None
    if isinstance(holdout, str):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[read_indices(holdout, n)] = True
    else:
        rank = uniform(0, "data.holdout", torch.arange(n), dtype=torch.float64)
        if isinstance(holdout, int):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[torch.argsort(rank, stable=True)[:holdout]] = True
        else:
            mask = rank < (SHARE if holdout is None else holdout)
            mask[rank.argmin()] = True
    if mask.all():
        share = f"{SHARE:.0%}, the default," if holdout is None else repr(holdout)
        raise ConfigError([f"data.holdout: {share} holds out all {n} train sample(s); leave some to train on, or set 0"])
    return mask


def shipped_lists() -> list[str]:
    """The names of the lists of indices that come with the package."""
    folder = resources.files("stage1_tokenizer.data") / "bundled"
    return sorted(f.name.removeprefix("holdout-").removesuffix(".npy") for f in folder.iterdir() if f.name.startswith("holdout-"))


def read_indices(name: str, n: int) -> Tensor:
    """A shipped list by name, or a file: ``.npy`` of integers, or text with one index per line. Distinct, each in [0, n)."""
    if name in shipped_lists():
        path = Path(str(resources.files("stage1_tokenizer.data") / "bundled" / f"holdout-{name}.npy"))
    else:
        path = Path(name)
    if not path.is_file():
        raise ConfigError([f"data.holdout: {name!r} is neither a file nor one of the shipped {', '.join(shipped_lists())}"])
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.array(path.read_text().split(), dtype=np.int64)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError([f"data.holdout: {name!r}: {str(error).splitlines()[0]}"]) from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise ConfigError([f"data.holdout: {name!r} holds {array.dtype} of shape {array.shape}; expected a list of whole numbers"])
    if array.min() < 0 or array.max() >= n:
        raise ConfigError([f"data.holdout: {name!r} holds indices in [{array.min()}, {array.max()}]; the train split has [0, {n - 1}]"])
    if len(np.unique(array)) != len(array):
        raise ConfigError([f"data.holdout: {name!r} holds an index twice"])
    return torch.from_numpy(array.astype(np.int64))
