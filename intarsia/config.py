"""Strict configuration: a frozen pydantic model stands above the class that it configures.

Python, YAML and flags are three spellings of one tree: ``VQConfig(codes=512)``, ``{type: vq, codes: 512}`` and
``--tokenizer.quantizer.codes 512``. Precedence: defaults < ``--config`` < flags. Every mistake is one line with its
full path, and all are reported at once, before anything is built.

Each field is of one class: *identity* (what a model becomes; compared on resume; the default), ``Budget`` (how long:
may grow) or ``Place`` (device, paths, logging: free).
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticUndefined

from intarsia import yaml_io
from intarsia.registry import Registry

T = TypeVar("T")
Budget = Annotated[T, "budget"]
Place = Annotated[T, "place"]


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
            return handler(tree)
        return handler(value)

    def to_dict(self) -> dict[str, Any]:
        """The plain tree: dictionaries (``type`` first), lists and scalars. ``from_dict`` reads it back."""
        head: dict[str, Any] = {"type": self.type_name} if self.type_name else {}
        return head | {name: _plain(getattr(self, name)) for name in type(self).model_fields}

    def to_yaml(self) -> str:
        return yaml_io.dump(self.to_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Raises ConfigError with every mistake."""
        if not isinstance(tree, Mapping):
            raise ConfigError([f"the configuration is a {type(tree).__name__}; expected a mapping"])
        errors = list(_unknown_keys(cls, tree, ""))
        try:
            config = cls.model_validate(_tuples(tree))
        except pydantic.ValidationError as error:
            raise ConfigError(_dedupe(errors + _messages(error))) from None
        if errors:
            raise ConfigError(_dedupe(errors))
        return config

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values; ``model_copy`` would not validate."""
        return type(self).from_dict(self.to_dict() | {k: _plain(v) for k, v in changes.items()})

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.default:
                yield name, getattr(self, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
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
    except (ValueError, TypeError):
        return  # the validator says it
    for key, value in rest.items():
        where = f"{path}{key}"
        field = target.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), target.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            yield f"{where}: unknown key{hint} allowed: {', '.join(target.model_fields)}"
        elif (inner := config_class(field.annotation)) is not None:
            if isinstance(value, Mapping):
                yield from _unknown_keys(inner, value, where + ".")
            elif isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    if isinstance(item, Mapping):
                        yield from _unknown_keys(inner, item, f"{where}.{i}.")


def _messages(error: pydantic.ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            continue  # said with the nearest key by _unknown_keys
        path = ".".join(str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        given = item.get("input")
        shown = "" if isinstance(given, Mapping | BaseModel) or item["type"] == "missing" else f"; got {given!r}"
        lines.append(f"{path}: {message}{shown}" if path else f"{message}")
    return lines


def _dedupe(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def differences(old: Config, new: Config, *, kinds: tuple[str, ...] = ("identity",), path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of each field of the given classes that differs."""
    if type(old) is not type(new):
        return [(f"{path}type", old.type_name, new.type_name)]
    found: list[tuple[str, Any, Any]] = []
    for name, field in type(old).model_fields.items():
        a, b = getattr(old, name), getattr(new, name)
        kind = field_class(field)
        if kind == "identity" and isinstance(a, Config) and isinstance(b, Config):
            found += differences(a, b, kinds=kinds, path=f"{path}{name}.")
        elif a != b and kind in kinds:
            found.append((f"{path}{name}", _plain(a), _plain(b)))
    return found


def walk(cls: type[Config], path: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo, Any]]:
    """(path, field, default as a plain tree) of every leaf below ``cls``; a typed field is walked with its default's type."""
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True)
        inner = config_class(field.annotation)
        if isinstance(default, Config):
            if default.type_name:
                yield f"{path}{name}.type", field, default.type_name
            yield from walk(type(default), f"{path}{name}.")
        elif inner is not None and inner.registry is None and get_origin(field.annotation) is None:
            yield from walk(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", field, None if default is PydanticUndefined else _plain(default)
