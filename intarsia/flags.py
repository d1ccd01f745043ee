"""Flags ``--a.b value`` as edits of the raw tree of a configuration, before it is validated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intarsia import yaml_io
from intarsia.config import Config, ConfigError, config_class, plain


def _value(text: str, annotation: Any, path: str) -> Any:
    """What ``text`` says to a field of this annotation: a plain string field takes it as it is, so that ``--run 7`` stays text."""
    if annotation is str or (annotation == str | None and text not in ("null", "~")):
        return text
    try:
        return yaml_io.load(text)
    except yaml_io.YAMLError as error:
        if text[:1] in "[{":
            raise ConfigError([f"--{path}: {text!r} is no YAML value ({error})"]) from None
        return text


@dataclass
class _Cursor:
    """A place in a tree that flags edit: the node, the Config class that it is for, and the default that it lies over."""

    node: Any
    cls: type[Config] | None
    default: Any
    path: str

    def child(self, key: str) -> tuple[Any, Any, type[Config] | None]:
        """(annotation, default, Config class of the field) of the part ``key``."""
        if isinstance(self.node, list):
            return None, None, self.cls
        cls, default = self._chosen()
        if cls is None or key not in cls.model_fields:
            return None, None, None
        annotation = cls.model_fields[key].annotation
        return annotation, default.get(key), config_class(annotation)

    def _chosen(self) -> tuple[type[Config] | None, dict[str, Any]]:
        """The class that the node's ``type``, else the default's, picks, and the defaults that go with it."""
        default = self.default if isinstance(self.default, dict) else {}
        if self.cls is None or self.cls.registry is None:
            return self.cls, default or _defaults(self.cls)
        name = self.node.get("type", default.get("type"))
        if name not in self.cls.registry.names():
            return None, {}
        cls = self.cls.registry.config(name)
        return cls, default if default.get("type") == name else _defaults(cls)

    def enter(self, key: str) -> _Cursor:
        """The cursor at the part ``key``, which is made where it is missing: a list with its default items, a mapping empty."""
        if isinstance(self.node, list):
            return _Cursor(self.node[self.item(key)], self.cls, None, self.path)
        _, default, cls = self.child(key)
        if not isinstance(self.node.get(key), dict | list):
            if (whole := self.node.get(key)) is not None:
                raise ConfigError([f"--{self.path}: {key!r} is {whole!r} as a whole already; give it whole, or all its parts"])
            self.node[key] = copy.deepcopy(default) if isinstance(default, list) else {}
        return _Cursor(self.node[key], cls, default, self.path)

    def item(self, key: str) -> int:
        if not (key.isascii() and key.isdecimal() and int(key) < len(self.node)):
            raise ConfigError([f"--{self.path}: {key!r} is no index into a list of {len(self.node)}"])
        return int(key)


def _defaults(cls: type[Config] | None) -> dict[str, Any]:
    return {} if cls is None else {name: plain(f.get_default(call_default_factory=True)) for name, f in cls.model_fields.items()}


def apply_flags(cls: type[Config], tree: dict[str, Any], flags: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Edits the raw tree, ``type`` first; changing a type starts from that type's defaults.

    Raises:
        ConfigError: for a path that leads nowhere, and where a part is set of what has a plain value, in either order.
    """

    def order(flag: tuple[str, str]) -> tuple[bool, int]:
        keys = flag[0].split(".")
        return (keys[-1] != "type", len(keys) if keys[-1] == "type" else 0)

    parts: dict[str, str] = {}  # what flags set the parts of
    for path, text in sorted(flags, key=order):
        *above, last = path.split(".")
        at = _Cursor(tree, cls, None, path)
        for key in above:
            if not isinstance(at.node, dict | list):
                raise ConfigError([f"--{path}: {key!r} is no part of {at.node!r}"])
            at = at.enter(key)
        if isinstance(at.node, list):
            at.node[at.item(last)] = _value(text, None, path)
        elif isinstance(at.node, dict):
            usual = at.default.get("type", text) if isinstance(at.default, dict) else text
            if last == "type" and at.node.get("type", usual) != text:
                at.node.clear()
            value = text if last == "type" else _value(text, at.child(last)[0], path)
            if path in parts:
                raise ConfigError([f"--{parts[path]} and --{path} {text}: a part and the whole; give it whole, or all its parts"])
            at.node[last] = value
        else:
            raise ConfigError([f"--{path}: {last!r} is no part of {at.node!r}"])
        if last != "type":  # which comes first, whatever the order, and may be said of a whole too
            parts |= {".".join(above[: i + 1]): path for i in range(len(above))}
    return tree
