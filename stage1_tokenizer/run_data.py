"""The data of the run that made a tokenizer: what ``encode`` and ``evaluate`` read where they are not told otherwise."""

from __future__ import annotations

from pathlib import Path

from intarsia import yaml_io
from intarsia.cli import load_tree
from intarsia.config import ConfigError
from intarsia.files import read_json
from intarsia.hub_files import CONFIG, HubError, check_source
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig
from stage1_tokenizer.tokenizers.base import Tokenizer


def run_config(folder: Path) -> Path:
    """The config.yaml of a run whose folder, or whose ``model/``, ``folder`` is; it need not be there."""
    own = folder / "config.yaml"
    return own if own.is_file() or folder.name != "model" else folder.parent / "config.yaml"


def run_data(folder: Path) -> str:
    """The data of the run in ``folder``, as a flag takes it."""
    return yaml_io.dump(load_tree(str(folder / "config.yaml"))["data"])


def needed_data(data: SourceConfig | None, tokenizer: str) -> SourceConfig:
    """``data``. Raises HubError or ConfigError where there is none, as there is no such tokenizer or no run that made it, and for the
    folder of another kind of model."""
    check_source("tokenizer", tokenizer)
    folder = Path(tokenizer)
    release = next((path for path in (folder / "model" / CONFIG, folder / CONFIG) if path.is_file()), None)
    tree = {} if release is None else read_json(release, HubError)
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if kind not in (None, Tokenizer.kind):
        raise HubError(f"tokenizer: {tokenizer} holds a {kind!r}; expected a {Tokenizer.kind!r}")
    if data is None and (folder / "config.yaml").is_file():
        raise ConfigError([f"data: {tokenizer}/config.yaml is of no tokenizer's run: it names no data; say --data.type"])
    if data is None:
        raise ConfigError([f"data: {tokenizer} has no config.yaml of a run; say --data.type {'|'.join(SOURCES.names())}"])
    return data


def check_signal(tokenizer: Tokenizer, source: Source) -> None:
    """Raises ValueError where the tokenizer takes other signals than ``source`` gives."""
    if source.signal != tokenizer.signal:
        raise ValueError(f"data: the signals are {source.signal}; the tokenizer takes {tokenizer.signal}")


def with_run_data(argv: list[str]) -> list[str]:
    """``argv`` with a ``--data`` in front that holds the data of the run which ``--tokenizer`` names (a run folder or its ``model/``).

    Other ``--data.*`` flags apply on top of it. ``argv`` comes back as it was where ``--data``, another ``--data.type`` or the
    ``--config`` file say what the data are, or where there is no such run.

    Raises ConfigError for a configuration file that cannot be read.
    """
    given = _given(argv)
    tree = load_tree(given["config"]) if "config" in given else {}
    tokenizer = given.get("tokenizer", tree.get("tokenizer"))
    if "data" in tree or "data" in given or not isinstance(tokenizer, str):
        return argv
    folder = Path(tokenizer).expanduser()
    path = run_config(folder)
    data = load_tree(str(path)).get("data") if path.is_file() else None
    if not isinstance(data, dict) or given.get("data.type", data.get("type")) != data.get("type"):
        return argv
    return [f"--data={yaml_io.dump(data)}", *argv]


def _given(argv: list[str]) -> dict[str, str]:
    """The flags of a command line, unchecked, with what follows them."""
    found: dict[str, str] = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, joined, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            found[name] = value if joined else following
    return found
