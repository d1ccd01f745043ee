"""Pipelines in folders and on the Hub (``pipeline/1``): ``pipeline.json``, and each part as a release of its own.

``tokenizer/``, ``priors/0/``, ``priors/1/``, ... each load alone, with ``from_pretrained(..., subfolder="priors/0")``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from intarsia.config import Config, ConfigError
from intarsia.files import atomic, foreign, json_bytes, read_json, write_atomic
from intarsia.hub import default_max_bytes
from intarsia.hub_files import CARD, CONFIG, HubError, fetch, push_folder
from intarsia.tensor_files import module_tensors
from pipelines.card import PICTURE, card, picture
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage2_prior.priors.base import Prior

if TYPE_CHECKING:
    from pipelines.two_stage import TwoStagePipeline

FORMAT = "pipeline/1"
INDEX = "pipeline.json"
TOKENIZER, PRIORS = "tokenizer", "priors"
NAMES = (TOKENIZER, PRIORS, CARD, PICTURE, INDEX)  # in the order in which they are put in place


class PartEntry(Config):
    """What ``pipeline.json`` says of a part."""

    type: str
    """Its registered name."""
    sha256: str
    """Of the whole model: parts of another saving are refused."""


class PipelineFile(Config):
    """``pipeline.json``. The levels, classes and sizes are the parts' own."""

    format: str
    """``pipeline/1``."""
    micro_batch: int = Field(ge=1)
    """Rows of the priors' micro-batches, which decide the bits of samples."""
    sampling: dict[str, Any]
    """Sampling options where a call gives none."""
    tokenizer: PartEntry
    """In the folder ``tokenizer``."""
    priors: tuple[PartEntry, ...] = Field(min_length=1)
    """In the folders ``priors/0``, ``priors/1``, ..., coarse to fine."""


# Parts -------------------------------------------------------------------------------------------------------------
def load_tokenizer(path_or_repo: str | Path, **source: Any) -> Tokenizer:
    """A tokenizer from a run folder (its ``model/``), the folder of a release, or the Hub; see ``Pretrained.from_pretrained``."""
    return Tokenizer.from_pretrained(path_or_repo, **source)


def load_prior(path_or_repo: str | Path, **source: Any) -> Prior:
    """A prior from a run folder (its ``model/``), the folder of a release, or the Hub; see ``Pretrained.from_pretrained``."""
    return Prior.from_pretrained(path_or_repo, **source)


# Reading -----------------------------------------------------------------------------------------------------------
def read_pipeline(path_or_repo: str | Path, *, revision: str | None, max_bytes: int | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``TwoStagePipeline`` that a folder or repository holds. Raises HubError naming the file.

    Args:
        source: what ``fetch`` takes beside the revision.
    """
    if Path(path_or_repo).is_dir() and not (Path(path_or_repo) / INDEX).exists():
        raise HubError(f"{Path(path_or_repo) / INDEX}: there is no such file; expected the folder of a saved pipeline")
    got = fetch(path_or_repo, [INDEX], revision=revision, **source)
    index = _read_index(got.folder / INDEX)
    left = default_max_bytes() if max_bytes is None else max_bytes
    pinned = {**source, "revision": got.revision}

    def part(cls: type[Any], folder: str, entry: PartEntry) -> Any:
        nonlocal left
        module = cls.from_pretrained(path_or_repo, subfolder=folder, max_bytes=left, **pinned)
        left -= sum(t.nbytes for t in module_tensors(module).values())
        path = fetch(path_or_repo, [f"{folder}/{CONFIG}"], **pinned).folder / folder / CONFIG
        found = read_json(path, HubError)["sha256"]  # which from_pretrained has compared with the weights
        if (module.type_name, found) != (entry.type, entry.sha256):
            raise HubError(f"{path}: holds {module.type_name} {found}; {INDEX} says {entry.type} {entry.sha256}")
        return module

    tokenizer = part(Tokenizer, TOKENIZER, index.tokenizer)
    priors = [part(Prior, f"{PRIORS}/{i}", entry) for i, entry in enumerate(index.priors)]
    return {"tokenizer": tokenizer, "priors": priors, "micro_batch": index.micro_batch, "defaults": index.sampling}


def _read_index(path: Path) -> PipelineFile:
    tree = read_json(path, HubError)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise HubError(f"{path}: format {found!r}; this version of intarsia reads {FORMAT!r}")
    try:
        return PipelineFile.from_dict(tree)
    except ConfigError as error:
        raise HubError("; ".join(f"{path}: {line}" for line in error.errors)) from None


# Writing -----------------------------------------------------------------------------------------------------------
def _write(
    pipeline: TwoStagePipeline, folder: Path, source: str, samples: int, metrics: Mapping[str, float] | None, license: str | None
) -> None:
    """The files of a pipeline into an empty folder; the model card says to load it from ``source``."""
    now = pipeline.tokenizer.fingerprint
    if now != pipeline.priors[0].spec.fingerprint:
        raise HubError(
            f"tokenizer: its fingerprint is {now} now, that of the priors' codes {pipeline.priors[0].spec.fingerprint}; it was cast or"
            f" changed (it is {pipeline.dtype}) since the pipeline was built, and would not load: save before that"
        )
    entries = []
    for part, name in [(pipeline.tokenizer, TOKENIZER), *((prior, f"{PRIORS}/{i}") for i, prior in enumerate(pipeline.priors))]:
        part.save_pretrained(folder / name, license=license)
        entries.append({"type": part.type_name, "sha256": read_json(folder / name / CONFIG, HubError)["sha256"]})
    tree = {"format": FORMAT, "micro_batch": pipeline.micro_batch, "sampling": pipeline.defaults}
    sheet = picture(pipeline, samples)
    if sheet is not None:
        with atomic(folder / PICTURE) as path:
            sheet.save(path, format="png")
    write_atomic(folder / CARD, card(pipeline, source, metrics, license, sheet is not None).encode())
    write_atomic(folder / INDEX, json_bytes(PipelineFile.from_dict(tree | {"tokenizer": entries[0], "priors": entries[1:]}).to_dict()))


def check_place(folder: Path) -> None:
    """Raises FileExistsError where ``folder`` is a file, or holds no pipeline, but one of the names that are written, or a data set."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; expected a folder")
    taken = [name for name in NAMES if (folder / name).exists()]
    if taken and INDEX not in taken:
        raise FileExistsError(f"{folder}: holds {taken[0]!r}, but no {INDEX}; expected a new folder, or one of a pipeline")
    if found := foreign(folder, (INDEX,)):
        raise FileExistsError(f"{folder}: {found}")


def other_parts(folder: Path, pipeline: TwoStagePipeline) -> str:
    """What differs where ``folder`` holds a pipeline of other parts, with both values; "" where it holds this one or none.

    Raises HubError for a ``pipeline.json`` that cannot be read.
    """
    if not (folder / INDEX).is_file():
        return ""
    index = _read_index(folder / INDEX)
    there = {TOKENIZER: index.tokenizer, **{f"{PRIORS}/{i}": entry for i, entry in enumerate(index.priors)}}
    parts = {TOKENIZER: pipeline.tokenizer, **{f"{PRIORS}/{i}": prior for i, prior in enumerate(pipeline.priors)}}

    def said(part: Any) -> str:
        return "none" if part is None else f"{part.type} {part.sha256[:12]}"

    here = {name: PartEntry(type=str(part.type_name), sha256=part.weights_sha256) for name, part in parts.items()}
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} is {said(there.get(name))} there, {said(here.get(name))} here" for name in names)


def write_pipeline(
    pipeline: TwoStagePipeline, folder: Path, *, samples: int, metrics: Mapping[str, float] | None = None, license: str | None = None
) -> None:
    """Writes the pipeline beside ``folder`` and renames it at once, where that is not there yet; else inside of it, which may be a disk of
    its own, and moves it part by part, ``pipeline.json`` last, so that an interrupted move is noticed by the hashes. Other files stay.

    Raises:
        FileExistsError: as ``check_place`` does. HubError: the pipeline would not load.
    """
    check_place(folder)
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{target.name}-", dir=target if target.exists() else target.parent) as temporary:
        built = Path(temporary) / "pipeline"
        built.mkdir()
        _write(pipeline, built, target.name, samples, metrics, license)
        if not target.exists():
            os.replace(built, target)
            return
        for name in NAMES:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            if (built / name).exists():
                os.replace(built / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)


def publish_pipeline(
    pipeline: TwoStagePipeline,
    repo_id: str,
    *,
    samples: int,
    metrics: Mapping[str, float] | None,
    license: str | None,
    **place: Any,
) -> str:
    """One commit with all files; returns its id."""
    with tempfile.TemporaryDirectory() as name:
        _write(pipeline, Path(name), repo_id, samples, metrics, license)
        return push_folder(repo_id, Path(name), **place)
