"""Folders of models on disk and on the Hub: a fixed list of file names goes in and out, nothing else."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from intarsia import yaml_io

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PUBLISHED = (CONFIG, WEIGHTS, CARD, "pipeline.json", "samples.png")
_REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+?))?(?://(?P<subfolder>.+))?"
)  # user/name@revision//subfolder


class HubError(ValueError):
    """A model cannot be loaded or published; one line that names the file or argument."""


@dataclass(frozen=True)
class Snapshot:
    """Files at one commit of a repository, or below a folder in it. ``revision`` is None for a local folder."""

    folder: Path
    revision: str | None


def check_subfolder(subfolder: str) -> str:
    """Raises HubError for anything but a plain relative path such as ``priors/0`` (or "")."""
    parts = PurePosixPath(subfolder).parts
    if subfolder and (subfolder != "/".join(parts) or not all(re.fullmatch(r"[\w-][\w.-]*", p) for p in parts)):
        raise HubError(f"subfolder: {subfolder!r}; expected names joined by '/', such as 'priors/0'")
    return subfolder


def check_file(path: Path) -> Path:
    """``path`` where it is a regular file; links are refused, but for the Hub cache's own.

    There ``<cache>/models--x/snapshots/<commit>/<file>`` points into ``models--x/blobs``, and that, at times, into ``<cache>/blobs``.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise HubError(f"{path}: there is no such file; a model is read from {CONFIG} and {WEIGHTS} only") from None
    if stat.S_ISLNK(mode):
        target = path.resolve()
        repo = next((p.parent.resolve() for p in path.absolute().parents if p.name == "snapshots"), None)
        if repo is None or not any(target.is_relative_to(home / "blobs") for home in (repo, repo.parent)):
            raise HubError(f"{path}: a symbolic link to {os.readlink(path)!r}; expected a regular file")
        mode = target.lstat().st_mode if target.exists() else 0
    if not stat.S_ISREG(mode):
        raise HubError(f"{path}: expected a regular file")
    return path


@dataclass(frozen=True)
class HubReference:
    """What ``user/name@revision//subfolder`` names; revision and subfolder may be left out."""

    repo: str
    revision: str | None
    subfolder: str

    def pinned(self, revision: str | None) -> str | None:
        """The revision to ask for where ``revision`` is given beside the name. A commit (40 hex digits) takes the place of the branch or
        tag in the name, which it was once found under; anything else that differs is refused with a HubError."""
        if None in (revision, self.revision) or revision == self.revision or re.fullmatch(r"[0-9a-f]{40}", str(revision)):
            return revision or self.revision
        raise HubError(f"revision: {revision!r} was given, but the name {self.repo}@{self.revision} says {self.revision!r}")


def hub_reference(path_or_repo: str | Path) -> HubReference | None:
    """None for what cannot be a Hub id. A folder of that name, which comes first, is the caller's to look for."""
    found = _REFERENCE.fullmatch(path_or_repo) if isinstance(path_or_repo, str) else None
    return None if found is None else HubReference(found["repo"], found["revision"], check_subfolder(found["subfolder"] or ""))


def check_source(name: str, path_or_repo: str | Path) -> None:
    """Raises HubError, naming the argument where it has a ``name``, for what is neither a folder nor could be a Hub id.

    What begins with a folder that is here is a path and no Hub id, unless it names a revision.
    """
    if str(path_or_repo) and Path(path_or_repo).is_dir():
        return
    label, found = f"{name}: " if name else "", hub_reference(path_or_repo)
    if found is None:
        raise HubError(f"{label}{str(path_or_repo)!r} is neither a folder nor a Hub id such as 'user/name'")
    above, last = found.repo.split("/")
    if found.revision is None and Path(above).is_dir():
        near = difflib.get_close_matches(last, sorted(path.name for path in Path(above).iterdir()), n=1)
        hint = f"did you mean '{above}/{near[0]}'? " if near else ""
        raise HubError(f"{label}there is no folder {found.repo!r}; {hint}a repository of that name on the Hub is '{found.repo}@main'")


def release_folder(path: str | Path) -> str:
    """A run folder's ``model/``; any other path or Hub id (see ``fetch``) as it is. Raises HubError for a run without a release."""
    inner = Path(path) / "model"
    if (inner / CONFIG).is_file():
        return str(inner)
    if (Path(path) / "config.yaml").is_file() and not (Path(path) / CONFIG).exists():
        raise HubError(f"{inner}: there is no such folder; the run has not released a model yet")
    return str(path)


def fetch(
    path_or_repo: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Snapshot:
    """The folder that holds ``files`` (relative names, all needed), from a local folder or from the Hub.

    All files come from one commit: pass the returned ``revision`` on to fetch more of the same. Offline (``HF_HUB_OFFLINE=1``
    or ``local_files_only``) they come from the Hub's cache.

    Args:
        path_or_repo: a folder, or on the Hub ``user/name``, ``user/name@revision``, ``user/name//subfolder`` or
            ``user/name@revision//subfolder``; a folder of exactly that name comes first.

    Raises HubError where a file, the repository or the revision is missing.
    """
    for name in files:
        check_subfolder(str(PurePosixPath(name).parent) if "/" in name else "")
        if PurePosixPath(name).name not in PUBLISHED:
            raise HubError(f"files: {name!r} is none of {', '.join(PUBLISHED)}")
    local = Path(path_or_repo)
    if str(path_or_repo) and local.is_dir():
        if revision is not None:
            raise HubError(f"revision: {revision!r} was given, but {str(path_or_repo)!r} is a local folder")
        for name in files:
            check_file(local / name)
        return Snapshot(local, None)
    check_source("", path_or_repo)
    where = hub_reference(path_or_repo)
    assert where is not None
    revision = where.pinned(revision)
    from huggingface_hub import errors as hf
    from huggingface_hub import hf_hub_download

    folder: Path | None = None
    for name in (str(PurePosixPath(where.subfolder, name)) for name in files):
        try:
            found = Path(hf_hub_download(where.repo, name, revision=revision, local_files_only=local_files_only, token=token))
        except hf.LocalEntryNotFoundError as error:
            reason = _line(error.__cause__ or error)
            raise HubError(f"{path_or_repo}: {name} is not in the cache and could not be fetched: {reason}") from error
        except hf.EntryNotFoundError as error:
            raise HubError(f"{path_or_repo}: there is no {name}; a model is read from {CONFIG} and {WEIGHTS} only") from error
        except hf.RevisionNotFoundError as error:
            raise HubError(f"{path_or_repo}: there is no revision {revision!r}") from error
        except hf.RepositoryNotFoundError as error:
            raise HubError(f"{path_or_repo}: there is no such folder, and no such repository on the Hub (or it is private)") from error
        except hf.HfHubHTTPError as error:
            raise HubError(f"{path_or_repo}: {name} could not be fetched: {_line(error)}") from error
        folder = found.parents[len(PurePosixPath(name).parts) - 1]
        revision = folder.name  # the commit: what follows comes from the same one
        check_file(found)
    if folder is None:
        raise HubError("files: none were asked for")
    return Snapshot(folder / where.subfolder, revision)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def published_files(folder: Path) -> list[str]:
    """The files below ``folder`` that may be published, relative and sorted. Raises HubError for any other file."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    for name in found:
        if PurePosixPath(name).name not in PUBLISHED:
            raise HubError(f"{folder / name}: is none of {', '.join(PUBLISHED)} and would be published")
        check_file(folder / name)
    if not found:
        raise HubError(f"{folder}: holds nothing to publish")
    return found


def push_folder(
    repo_id: str,
    folder: Path,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publishes a folder as one commit (the repository and the branch ``revision`` are made where missing); returns the commit's id.

    The token is that of the environment or of ``hf auth login``, where none is given. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hf

    network = getattr(hf, "HTTPError", OSError)  # what a broken connection raises, in any version of huggingface_hub
    names = published_files(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(folder / name)) for name in names],
            commit_message=commit_message or "Upload with intarsia",
            revision=revision,
        )
    except (hf.HfHubHTTPError, network, OSError, ValueError) as error:  # OSError: no token, offline, a file that cannot be read
        raise HubError(f"{repo_id}: could not be published: {_line(error)}") from error
    return str(commit.oid)


def model_card(
    title: str, body: str, *, tags: Sequence[str], license: str | None = None, metrics: Mapping[str, float] | None = None
) -> str:
    """A model card: YAML header (``library_name``, ``tags``, ``license`` and ``model-index`` where given), title and text."""
    header: dict[str, Any] = {"library_name": "intarsia", "tags": list(tags)}
    if license is not None:
        header["license"] = license
    if metrics:
        entry = {"task": {"type": "unconditional-image-generation"}, "dataset": {"type": "validation", "name": "validation"}}
        found = [{"type": name, "name": name, "value": float(value)} for name, value in metrics.items()]
        header["model-index"] = [{"name": title, "results": [entry | {"metrics": found}]}]
    table = "\n".join(["| metric | value |", "|---|---|", *(f"| {k} | {v:g} |" for k, v in metrics.items())]) + "\n\n" if metrics else ""
    return f"---\n{yaml_io.dump(header)}---\n\n# {title}\n\n{table}{body.strip()}\n"
