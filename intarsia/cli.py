"""Command lines: ``--config NAME|PATH`` and ``--a.b value`` over a Config, with the same one-line errors everywhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from intarsia import yaml_io
from intarsia.config import Config, ConfigError, config_class, field_class, walk

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Flags:
    """The flags that every script knows; they are no part of a configuration."""

    check: bool = False
    dry_run: bool = False
    max_steps: int | None = None
    resume: str | None = None
    allow_low_space: bool = False
    debug: bool = False


_FLAG_DOCS = {
    "check": "validate the configuration and look at the data, then stop",
    "dry_run": "build on the meta device, print parameters and memory, then stop",
    "max_steps": "stop early after this many steps; the schedule still reads steps",
    "resume": "resume from this checkpoint folder; an error if it is damaged",
    "allow_low_space": "start even where the disk has little space left",
    "debug": "print tracebacks",
}


def configs_folder() -> Path:
    """Where the shipped configurations lie: ``configs/`` of the checkout, or of the installed package."""
    return Path(str(resources.files("configs")))


def find_config(name: str) -> Path:
    """A file path first, then the name of a shipped configuration such as ``fashion_mnist/vqvae``."""
    path = Path(name)
    if path.is_file():
        return path
    root = configs_folder()
    shipped = root / (name if name.endswith(".yaml") else name + ".yaml")
    if shipped.is_file():
        return shipped
    known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    raise ConfigError([f"--config: {name!r} is neither a file nor one of the shipped {', '.join(known)}"])


def load_tree(name: str) -> dict[str, Any]:
    path = find_config(name)
    try:
        tree = yaml_io.load(path.read_text())
    except (yaml_io.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: holds a {type(tree).__name__}; expected a mapping"])
    return tree


def _scalar(text: str, path: str) -> Any:
    try:
        return yaml_io.load(text)
    except yaml_io.YAMLError:
        if text[:1] in "[{":
            raise ConfigError([f"--{path}: {text!r} is no YAML value"]) from None
        return text


def _wants_text(cls: type[Config] | None, keys: list[str]) -> bool:
    """True where the field is a plain string, so that ``--run 7`` stays text."""
    for depth, key in enumerate(keys):
        if cls is None or key not in cls.model_fields:
            return False
        field = cls.model_fields[key]
        if depth == len(keys) - 1:
            return field.annotation in (str, str | None)
        cls = config_class(field.annotation)
    return False


def _default_tree(cls: type[Config], keys: list[str]) -> dict[str, Any]:
    """What the field at ``keys`` holds by default, so that a flag may change one part of it."""
    tree: Any = {name: f.get_default(call_default_factory=True) for name, f in cls.model_fields.items()}
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else getattr(tree, key, None)
    return {"type": tree.type_name} if isinstance(tree, Config) and tree.type_name else {}


def apply_flags(cls: type[Config], tree: dict[str, Any], flags: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Edits the raw tree, ``type`` first; changing a type starts from that type's defaults."""
    for path, text in sorted(flags, key=lambda f: (not f[0].endswith("type"), f[0].count(".") if f[0].endswith("type") else 0)):
        keys = path.split(".")
        value: Any = text if keys[-1] == "type" or _wants_text(cls, keys) else _scalar(text, path)
        node: Any = tree
        for depth, key in enumerate(keys[:-1]):
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise ConfigError([f"--{path}: {key!r} is no index into a list of {len(node)}"])
                node = node[int(key)]
                continue
            if not isinstance(node.get(key), dict | list):
                node[key] = _default_tree(cls, keys[: depth + 1])
            node = node[key]
        last = keys[-1]
        if isinstance(node, list):
            if not last.isdigit() or int(last) >= len(node):
                raise ConfigError([f"--{path}: {last!r} is no index into a list of {len(node)}"])
            node[int(last)] = value
        else:
            if last == "type" and node.get("type") != value:
                node.clear()
            node[last] = value
    return tree


def help_text(cls: type[Config], program: str) -> str:
    """Every field with its default, class and doc."""
    lines = [f"usage: {program} [--config NAME|PATH] [--key value ...] [flags]", "", (cls.__doc__ or "").strip(), "", "fields:"]
    for path, field, default in walk(cls):
        shown = "required" if field.is_required() else repr(default)
        doc = " ".join((field.description or "").split())
        lines.append(f"  --{path} ({shown}; {field_class(field)})" + (f"\n      {doc}" if doc else ""))
        inner = config_class(field.annotation)
        if path.endswith(".type") and inner is not None and inner.registry is not None:
            lines.append(f"      types: {', '.join(inner.registry.names())}")
    lines += ["", "flags:"] + [f"  --{name}: {doc}" for name, doc in _FLAG_DOCS.items()]
    return "\n".join(lines)


def parse(cls: type[C], argv: Sequence[str] | None = None, aliases: Mapping[str, str] | None = None, program: str = "") -> tuple[C, Flags]:
    """The configuration and flags of a command line. ``aliases`` maps short names to paths (``levels`` -> ``prior.levels``).

    Raises ConfigError; exits 0 after ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(help_text(cls, program or Path(sys.argv[0]).name))
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    edits: list[tuple[str, str]] = []
    flags: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError([f"{word!r}: expected --key value"])
        name, joined, value = word[2:].partition("=")
        if name in ("check", "dry_run", "allow_low_space", "debug"):
            flags[name] = True
            continue
        if not joined:
            if not words:
                raise ConfigError([f"--{name}: a value is missing"])
            value = words.pop(0)
        if name == "config":
            tree = load_tree(value)
        elif name == "max_steps":
            if not value.isdigit():
                raise ConfigError([f"--max_steps: {value!r} is no whole number"])
            flags[name] = int(value)
        elif name == "resume":
            flags[name] = value
        else:
            edits.append(((aliases or {}).get(name, name), value))
    return cls.from_dict(apply_flags(cls, tree, edits)), Flags(**flags)


class UserError(Exception):
    """A mistake of the caller's that a script reports in one line, with exit code 2."""


def run_main(main: Callable[[], Any]) -> None:
    """Calls ``main``; a mistake of the user's is printed by one rank, in one line each, and ends with exit code 2."""
    try:
        main()
    except (ConfigError, UserError, ValueError, FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError) as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # lets the rank that speaks speak before the launcher ends it
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        raise SystemExit(2) from None
