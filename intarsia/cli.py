"""Command lines: ``--config NAME|PATH`` and ``--a.b value`` over a Config, with the same one-line errors everywhere."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic_core import PydanticUndefined

from intarsia import yaml_io
from intarsia.config import Config, ConfigError, config_class, field_class, nearest, walk
from intarsia.flags import apply_flags

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
    imports: tuple[str, ...] = ()


_SWITCHES = ("check", "dry_run", "allow_low_space", "debug")
_FLAG_DOCS = {
    "check": "validate the configuration and look at the data, then stop",
    "dry_run": "build on the meta device, print parameters and memory, then stop",
    "max_steps": "stop early after this many steps; the schedule still reads steps",
    "resume": "resume from this checkpoint folder; an error if it is damaged",
    "allow_low_space": "start even where the disk has little space left",
    "debug": "print tracebacks",
    "import": "import this module first, such as one that registers types of your own; may be given several times",
}


def configs_folder() -> Path:
    """Where the shipped configurations lie: ``configs/`` beside this package, in the checkout as in an installation."""
    return Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> list[str]:
    """The names of the shipped configurations, such as ``fashion_mnist/vqvae``."""
    root = configs_folder()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """A file path first, then the name of a shipped configuration. Raises ConfigError with the names that there are."""
    name = os.path.expanduser(name)
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name.removesuffix(".yaml") in shipped:
        return configs_folder() / (name.removesuffix(".yaml") + ".yaml")
    hint = f"{nearest(name, shipped)} shipped: {', '.join(shipped)}"
    raise ConfigError([f"--config: {name!r} is neither a file nor a shipped configuration{hint}"])


def load_tree(name: str) -> dict[str, Any]:
    """The raw tree of a configuration file. Raises ConfigError with path and line."""
    path = find_config(name)
    try:
        if path.stat().st_size > yaml_io.MAX_BYTES:
            raise yaml_io.YAMLError(f"{path.stat().st_size} bytes; at most {yaml_io.MAX_BYTES} are read")
        tree = yaml_io.load(path.read_text(encoding="utf-8"))
    except (yaml_io.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: holds a {type(tree).__name__}; expected a mapping"])
    return tree


def help_text(
    cls: type[Config], program: str, tree: Mapping[str, Any] | None = None, aliases: Mapping[str, str] | None = None
) -> str:
    """Every field with its value (that of ``tree``, else the default), class and doc."""
    lines = [f"usage: {program} [--config NAME|PATH] [--key value ...] [flags]", "", (cls.__doc__ or "").strip(), "", "fields:"]
    for path, field, value in walk(cls, tree):
        shown = "required" if value is PydanticUndefined else repr(value)
        doc = " ".join((field.description or "").split())
        lines.append(f"  --{path} ({shown}; {field_class(field)})" + (f"\n      {doc}" if doc else ""))
        inner = config_class(field.annotation)
        if path.endswith(".type") and inner is not None and inner.registry is not None:
            lines.append(f"      types: {', '.join(inner.registry.names())}; --{path} NAME --help lists the fields of another one")
        elif get_origin(field.annotation) is Literal:
            lines.append(f"      one of: {', '.join(map(str, get_args(field.annotation)))}")
    if aliases:
        lines += ["", "short names:"] + [f"  --{name} is --{path}" for name, path in aliases.items()]
    lines += ["", "flags:"] + [f"  --{name}: {doc}" for name, doc in _FLAG_DOCS.items()]
    return "\n".join(lines)


def parse(cls: type[C], argv: Sequence[str] | None = None, aliases: Mapping[str, str] | None = None, program: str = "") -> tuple[C, Flags]:
    """The configuration and flags of a command line. ``aliases`` maps short names to paths (``levels`` -> ``prior.levels``).

    Raises ConfigError; exits 0 after ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    wants_help = "--help" in words or "-h" in words
    words = [word for word in words if word not in ("--help", "-h")]
    config: str | None = None
    edits: list[tuple[str, str]] = []
    flags: dict[str, Any] = {}
    errors: list[str] = []
    while words:
        word = words.pop(0)
        name, joined, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            errors.append(f"{word!r}: expected --key value")
            continue
        if name in _SWITCHES:
            if joined:
                errors.append(f"--{name}: {value!r} is too much; the flag takes no value")
            flags[name] = True
            continue
        if not joined:
            if not words or words[0].startswith("--"):
                errors.append(f"--{name}: a value is missing")
                continue
            value = words.pop(0)
        if name == "config":
            if config is not None:
                errors.append(f"--config: given twice, {config!r} and {value!r}")
            config = value
        elif name == "max_steps":
            if not (value.isascii() and value.isdecimal() and int(value) > 0):
                errors.append(f"--max_steps: {value!r}; expected a whole number of at least 1")
            else:
                flags[name] = int(value)
        elif name == "resume":
            flags[name] = os.path.expanduser(value)
        elif name == "import":
            errors += _import(value)
            flags["imports"] = (*flags.get("imports", ()), value)
        else:
            head, dot, rest = name.partition(".")
            path = (aliases or {}).get(head, head) + dot + rest
            if path.split(".")[0] in cls.model_fields:
                edits.append((path, value))
            else:
                known = [*cls.model_fields, *(aliases or {}), "config", *_FLAG_DOCS]
                errors.append(f"--{name}: unknown key{nearest(name.split('.')[0], known)} allowed: {', '.join(known)}")
    try:
        tree = apply_flags(cls, load_tree(config) if config is not None else {}, edits)
        if wants_help:
            _show(help_text(cls, program or Path(sys.argv[0]).name, tree, aliases))
            raise SystemExit(0)
        parsed = cls.from_dict(tree)
    except ConfigError as error:
        raise ConfigError(errors + error.errors) from None
    if errors:
        raise ConfigError(errors)
    return parsed, Flags(**flags)


def _import(name: str) -> list[str]:
    """Imports a module; what is wrong with its name. What goes wrong within it is raised as it is."""
    if not all(part.isidentifier() for part in name.split(".")):
        return [f"--import: {name!r}; expected the name of a module, such as package.module"]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        return [f"--import: there is no module {name!r} in the current folder or on Python's path"]
    return []


def _show(text: str) -> None:
    """Prints; a reader that closes the pipe before the end, as head does, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail again


_REPORTED = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REPORTED |= {errno.ENAMETOOLONG, errno.ELOOP} | _FULL  # of an OSError; any other has its traceback


class UserError(Exception):
    """A mistake of the caller's that a script reports in one line, with exit code 2."""


class RunError(Exception):
    """A run that cannot go on: numbers that are not finite, ranks that differ, a full disk. One line, exit code 3."""


def run_main(main: Callable[[], Any]) -> None:
    """Calls ``main``; a mistake of the user's is printed in one line and ends with exit code 2, a failed run with 3.

    What all ranks raise is printed by rank 0. The others wait a moment, in which the launcher ends them, and speak only
    where they are alone with their error. A rank that a launcher started ends without Python's teardown (``_leave``).
    """
    try:
        _report(main)
    except SystemExit as stop:
        if isinstance(stop.code, int):
            _leave(stop.code)
        raise
    _leave(0)


def _report(main: Callable[[], Any]) -> None:
    try:
        main()
    except (RunError, ConfigError, UserError, ValueError, OSError) as error:
        if "--debug" in sys.argv or (isinstance(error, OSError) and error.errno not in _REPORTED):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3.0)
        place = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        for line in str(error).splitlines() or [repr(error)]:
            print(f"error: {line}{place}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        full = isinstance(error, OSError) and error.errno in _FULL
        raise SystemExit(3 if full or isinstance(error, RunError) else 2) from None


def _leave(code: int) -> None:
    """Ends one of several launched processes after its exit handlers; returns in any other.

    Threads of gloo outlive destroy_process_group where DDP was used, and a rank whose work was done and saved has been seen to abort as
    it ended, which the launcher reports as a failure.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
