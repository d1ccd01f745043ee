"""What a dump of codes will be, as a plain tree: two dumps with equal plans are the same dump."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.codes_manifest import FORMAT, CodesError, Manifest
from intarsia.files import json_bytes
from intarsia.specs import LevelSpec, SignalSpec, to_plain


@dataclass(frozen=True)
class SplitPlan:
    """What a split will hold: ``samples * views`` rows."""

    samples: int
    views: int = 1
    labelled: bool = False
    captioned: bool = False


def plan_tree(
    levels: Sequence[LevelSpec],
    signal: SignalSpec,
    tokenizer: Mapping[str, str],
    splits: Mapping[str, SplitPlan],
    classes: Sequence[str],
    data: Mapping[str, Any],
    shard_rows: int,
) -> dict[str, Any]:
    """The plan as JSON gives it back. Raises CodesError for an argument that no dump can have."""
    if shard_rows < 1:
        raise CodesError(f"shard_rows: {shard_rows} must be positive")
    if not splits:
        raise CodesError("splits: there must be at least one")
    for name, plan in splits.items():
        if not name.isidentifier():
            raise CodesError(f"splits: {name!r} is no name such as 'train'")
        if plan.samples < 1 or plan.views < 1:
            raise CodesError(f"split {name!r}: {plan.samples} samples in {plan.views} views; both must be positive")
        if plan.labelled and not classes:
            raise CodesError(f"split {name!r}: is labelled, but there are no classes")
    tree = {
        "format": FORMAT,
        "levels": [to_plain(level) for level in levels],
        "signal": to_plain(signal),
        "tokenizer": dict(tokenizer),
        "classes": list(classes),
        "data": dict(data),
        "shard_rows": shard_rows,
        "splits": {name: to_plain(plan) for name, plan in splits.items()},
    }
    return dict(json.loads(json_bytes(tree)))


def plan_of(manifest: Manifest) -> dict[str, Any]:
    """The plan that a manifest fulfils."""
    tree = manifest.to_dict()
    del tree["text"]
    splits = {s.name: to_plain(SplitPlan(s.samples, s.views, s.labelled, s.captioned)) for s in manifest.splits}
    return tree | {"classes": [c.name for c in manifest.classes], "splits": splits}


def first_difference(there: Any, here: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(path, value, value) of the first difference between two plain trees: the tokenizer's fingerprint first, then sizes."""
    first = ["tokenizer", "fingerprint", "splits", "shard_rows"]
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys(), key=lambda k: (first.index(k) if k in first else len(first), k)):
            if found := first_difference(there.get(key), here.get(key), f"{path}.{key}" if path else key):
                return found
        return None
    return None if there == here else (path, there, here)
