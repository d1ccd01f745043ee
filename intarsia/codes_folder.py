"""What stands in the folder of a dump, looked at before anything in it changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from intarsia.codes_manifest import MANIFEST, CodesError, read_manifest
from intarsia.codes_plan import first_difference, plan_of
from intarsia.files import read_json, writable_folder

WORK, PLAN, FACTS = ".dump", "plan.json", ".facts.json"  # while a dump runs: its plan, and what each shard that is done holds


def is_complete(folder: Path, plan: Mapping[str, Any]) -> bool:
    """True where ``folder`` holds this very dump. Raises CodesError for a complete dump of another plan, a file, a folder of something
    else, and one that cannot be written to."""
    if (folder / MANIFEST).exists():
        difference = first_difference(plan_of(read_manifest(folder)), dict(plan))
        if difference:
            raise CodesError(f"out: {folder} holds a complete dump of {_other(*difference)}")
        return True
    writable_folder(folder, "out", CodesError, make=False, own=(MANIFEST, WORK), alone=True)
    return False


def goes_on(folder: Path, plan: Mapping[str, Any]) -> bool:
    """True where ``folder`` holds an unfinished dump of this plan; False where there is none, or none that any shard is finished of.

    Raises CodesError where shards of another plan are finished: nobody has said that they may go.
    """
    path = folder / WORK / PLAN
    try:
        there = read_json(path, CodesError)
    except FileNotFoundError:
        there = None  # a new dump, or one that was killed before its plan was whole
    except CodesError as error:
        if _has_shards(folder):
            raise CodesError(f"out: {folder} holds an unfinished dump, but {error}; delete {folder}, or choose another folder") from None
        return False
    difference = first_difference(there, dict(plan))
    if difference and _has_shards(folder):
        what = "no plan" if there is None else _other(*difference)
        raise CodesError(f"out: {folder} holds an unfinished dump of {what}; delete {folder}, or choose another folder")
    return difference is None


def clear(folder: Path, splits: Iterable[str]) -> None:
    """Removes what a dump of another plan left in the folders of splits, its own and ``splits``, before a shard was finished."""
    try:
        there = read_json(folder / WORK / PLAN, CodesError)
    except (CodesError, FileNotFoundError):
        there = None
    older = there.get("splits") if isinstance(there, dict) else None
    for name in {*splits, *(older if isinstance(older, dict) else ())}:
        if name.isidentifier() and (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _has_shards(folder: Path) -> bool:
    return any((folder / WORK).glob(f"*{FACTS}"))


def _other(path: str, there: Any, here: Any) -> str:
    what = "another tokenizer" if path == "tokenizer.fingerprint" else "something else"
    return f"{what}: {path} is {there!r} there and {here!r} here"
