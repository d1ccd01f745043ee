"""Strict configuration: a frozen pydantic model stands above the class that it configures.

Python, YAML and flags are three spellings of one tree: ``VQConfig(codes=512)``, ``{type: vq, codes: 512}`` and
``--tokenizer.quantizer.codes 512``. Precedence: defaults < ``--config`` < flags. Every mistake is one line with its
full path, and all are reported at once, before anything is built.

Each field is of one class: *identity* (what a model becomes; compared on resume; the default), ``Budget`` (how long:
may grow) or ``Place`` (device, paths, logging: free). ``Added`` marks, beside that, a field that came after releases.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticUndefined

from intarsia import yaml_io
from intarsia.registry import Registry

T = TypeVar("T")
Budget = Annotated[T, "budget"]
Place = Annotated[T, "place"]
Added = Annotated[T, "added"]
"""A field that a released configuration did not have yet; its default must be what was done before it came. At its default it
stays out of hashes, so that releases keep their fingerprints."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ConfigError(ValueError):
    """All mistakes of a configuration, one per line, each with its path."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


class Config(BaseModel):
    """Base of all configurations: frozen, strict, without unknown keys, inf or nan; ``type`` picks among registered ones."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )
    registry: ClassVar[Registry[Any] | None] = None
    type_name: ClassVar[str | None] = None

    def __init_subclass__(cls, registry: Registry[Any] | None = None, **kwargs: Any) -> None:
        if registry is not None:
            cls.registry = registry
        cls.type_name = None
        super().__init_subclass__(**kwargs)

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            target, tree = _resolve_type(cls, dict(value))
            if target is not cls:
                return typing.cast(Self, target.model_validate(tree))
            return handler({name: _at_home(cls, name, part) for name, part in complete(cls, tree).items()})
        return handler(value)

    def to_dict(self) -> dict[str, Any]:
        """The plain tree: dictionaries (``type`` first), lists and scalars. ``from_dict`` reads it back."""
        head: dict[str, Any] = {"type": self.type_name} if self.type_name else {}
        return head | {name: plain(getattr(self, name)) for name in type(self).model_fields}

    def to_yaml(self) -> str:
        return yaml_io.dump(self.to_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Raises ConfigError with every mistake."""
        if not isinstance(tree, Mapping):
            raise ConfigError([f"the configuration is a {type(tree).__name__}; expected a mapping"])
        tree = _tuples(tree)
        errors = list(_unknown_keys(cls, tree, ""))
        try:
            config = cls.model_validate(tree)
        except pydantic.ValidationError as error:
            raise ConfigError(_dedupe(errors + _messages(error))) from None
        if errors:
            raise ConfigError(_dedupe(errors))
        return config

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values; ``model_copy`` would not validate."""
        return type(self).from_dict(self.to_dict() | {k: plain(v) for k, v in changes.items()})

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.default:
                yield name, getattr(self, name)


def plain(value: Any) -> Any:
    """A value as dictionaries, lists and scalars."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def hashed(value: Any) -> Any:
    """``plain(value)`` without the ``Added`` fields that hold their default: what fingerprints are made of."""
    if isinstance(value, Config):
        fields = type(value).model_fields.items()
        kept = [name for name, field in fields if "added" not in field.metadata or getattr(value, name) != field.default]
        return ({"type": value.type_name} if value.type_name else {}) | {name: hashed(getattr(value, name)) for name in kept}
    return [hashed(v) for v in value] if isinstance(value, tuple | list) else plain(value)


def _tuples(value: Any, depth: int = 0) -> Any:
    """Lists as tuples. Raises ConfigError where the tree is nested too deep, before anything walks it."""
    if depth > yaml_io.MAX_DEPTH:
        raise ConfigError([f"the configuration is nested more than {yaml_io.MAX_DEPTH} deep"])
    if isinstance(value, list | tuple):
        return tuple(_tuples(v, depth + 1) for v in value)
    if isinstance(value, Mapping):
        return {k: _tuples(v, depth + 1) for k, v in value.items()}
    return value


def _resolve_type(cls: type[Config], tree: dict[str, Any]) -> tuple[type[Config], dict[str, Any]]:
    """The class that ``tree['type']`` names below ``cls``, and the tree without ``type``."""
    if cls.registry is None or (cls.type_name is None and "type" not in tree):
        if cls.registry is not None:
            raise ValueError(f"needs a 'type'; known: {', '.join(cls.registry.names())}")
        return cls, tree
    name = tree.pop("type", cls.type_name)
    target = cls.registry.config(name)
    if not issubclass(target, cls):
        raise ValueError(f"type {name!r} is no {cls.__name__}")
    return target, tree


def complete(cls: type[Config], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` laid over the default of each field that it names: a part of a default is changed, the rest stays.

    Another ``type`` than the default's starts from that type's own defaults.
    """
    done = dict(tree)
    for name, value in tree.items():
        field = cls.model_fields.get(name)
        if field is not None and isinstance(value, Mapping):
            done[name] = _tuples(_lay_over(plain(field.get_default(call_default_factory=True)), value))
    return done


def _at_home(cls: type[Config], name: str, value: Any) -> Any:
    """A text that begins with ``~/`` is a path in the user's home folder, as a shell would have it; a place may be ``~`` itself."""
    field = cls.model_fields.get(name)
    home = isinstance(value, str) and (value.startswith("~/") or (value == "~" and field is not None and field_class(field) == "place"))
    return os.path.expanduser(value) if home else value


def _lay_over(default: Any, given: Any) -> Any:
    if not isinstance(default, dict) or not isinstance(given, Mapping):
        return given
    if given.get("type", default.get("type")) != default.get("type"):
        return given
    return default | {key: _lay_over(default.get(key), value) for key, value in given.items()}


def config_class(annotation: Any) -> type[Config] | None:
    """The Config class that a field's annotation holds, through Annotated, Optional and tuples of one kind."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) is Annotated:
        return config_class(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType, tuple, list):
        for part in get_args(annotation):
            if (found := config_class(part)) is not None:
                return found
    return None


def field_class(field: pydantic.fields.FieldInfo) -> str:
    """"identity", "budget" or "place"."""
    return next((m for m in field.metadata if m in ("budget", "place")), "identity")


def _unknown_keys(cls: type[Config], tree: Mapping[str, Any], path: str) -> Iterator[str]:
    """Unknown keys of the whole tree with the nearest known one (pydantic's own message has no hint)."""
    try:
        target, rest = _resolve_type(cls, dict(tree))
    except ValueError:
        return  # the validator says it
    for key, value in complete(target, rest).items():
        where = f"{path}{key}"
        field = target.model_fields.get(key)
        if field is None:
            known = ", ".join(target.model_fields)
            if others := _types_with(cls, key):
                have = f"of the type {target.type_name!r}; {others} ({path}type)"
                yield f"{where}: unknown key {have}; allowed: {known}"
            else:
                yield f"{where}: unknown key{nearest(key, target.model_fields)} allowed: {known}"
        elif (inner := config_class(field.annotation)) is not None:
            for at, item in [("", value)] if isinstance(value, Mapping) else _numbered(value):
                yield from _unknown_keys(inner, item, f"{where}.{at}")


def _types_with(cls: type[Config], key: Any) -> str:
    """Which other types of the registry have a key, in words; "" where none has."""
    configs = {} if cls.registry is None else {name: cls.registry.config(name) for name in cls.registry.names()}
    names = [name for name, config in configs.items() if issubclass(config, cls) and key in config.model_fields]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} it" if names else ""


def _numbered(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    items = value if isinstance(value, list | tuple) else ()
    return [(f"{i}.", item) for i, item in enumerate(items) if isinstance(item, Mapping)]


def nearest(word: Any, known: Iterable[str]) -> str:
    """"; did you mean 'codes'?" where a known word is near, else ";"."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ";"


def _messages(error: pydantic.ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            continue  # said with the nearest key by _unknown_keys
        path = ".".join(str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        given = item.get("input")
        shown = "" if isinstance(given, Mapping | BaseModel) or item["type"] == "missing" else f"; got {_shown(given)}"
        lines.append(f"{path}: {message}{shown}" if path else f"{message}")
    return lines


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dedupe(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def differences(old: Config, new: Config, *, kinds: tuple[str, ...] = ("identity",), path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of each field of the given classes ("identity", "budget", "place") that differs.

    A field of class budget or place takes all that it holds along with it; inside an identity field each part has its own class.
    """
    if type(old) is not type(new):
        return [(f"{path}type", old.type_name, new.type_name)] if "identity" in kinds else []
    found: list[tuple[str, Any, Any]] = []
    for name, field in type(old).model_fields.items():
        found += _compare(getattr(old, name), getattr(new, name), field_class(field), kinds, f"{path}{name}")
    return found


def _compare(old: Any, new: Any, kind: str, kinds: tuple[str, ...], path: str) -> list[tuple[str, Any, Any]]:
    if kind == "identity" and isinstance(old, Config) and isinstance(new, Config):
        return differences(old, new, kinds=kinds, path=f"{path}.")
    if kind == "identity" and isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        parts = [_compare(a, b, kind, kinds, f"{path}.{i}") for i, (a, b) in enumerate(zip(old, new, strict=True))]
        if any(isinstance(a, Config) for a in old):
            return [line for part in parts for line in part]
    return [(path, plain(old), plain(new))] if old != new and kind in kinds else []


def walk(cls: type[Config], tree: Mapping[str, Any] | None = None, path: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo, Any]]:
    """(path, field, value as a plain tree) of every leaf below ``cls``: the values of ``tree``, else the defaults.

    A typed field is walked with the type that ``tree`` or its default names; a required one has the value PydanticUndefined.
    """
    tree = complete(cls, tree or {})
    for name, field in cls.model_fields.items():
        where = f"{path}{name}"
        value = tree.get(name, plain(field.get_default(call_default_factory=True)))
        inner = config_class(field.annotation)
        required = value is PydanticUndefined and get_origin(field.annotation) is None
        if inner is None or not (required or isinstance(value, Mapping)):
            yield where, field, value
            continue
        below = dict(value) if isinstance(value, Mapping) else {}
        if inner.registry is not None:
            yield f"{where}.type", field, below.get("type", PydanticUndefined)
            if below.get("type") not in inner.registry.names():
                continue
            inner, below = _resolve_type(inner, below)
        yield from walk(inner, below, f"{where}.")
