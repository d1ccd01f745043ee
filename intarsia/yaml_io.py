"""YAML as configuration needs it: the scalars of YAML 1.2's core schema, no aliases, no duplicate keys, bounded size.

``1e-4`` is a float, ``no`` and ``12:30:00`` are strings, and what ``dump`` writes ``load`` reads back as the same tree.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_RESOLVERS: list[tuple[str, str, str]] = [
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+0123456789."),
]


class YAMLError(ValueError):
    """The text is no YAML that a configuration may hold; the message says where."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MAX_DEPTH:
            raise YAMLError(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} is not a name")
            if key.value in seen:
                raise YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_map(self, node: Any) -> Any:  # eager, so that duplicates are found
        yield self.construct_mapping(node, deep=True)

    def construct_core_int(self, node: Any) -> int:
        return int(node.value)

    def construct_core_float(self, node: Any) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_tag, re.compile(_pattern), [("" if c == "\0" else c) for c in _first])
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_core_float)


def load(text: str) -> Any:
    """The tree in ``text``. Raises YAMLError with the line."""
    if len(text.encode()) > MAX_BYTES:
        raise YAMLError(f"{len(text.encode())} bytes; at most {MAX_BYTES} are read")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, restricted further
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise YAMLError(f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise YAMLError(str(error).splitlines()[0]) from None


def dump(tree: Any) -> str:
    """``tree`` as block YAML in its own order; lists on one line."""

    class Flow(list):  # type: ignore[type-arg]
        pass

    def flow(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: flow(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [flow(v) for v in value] if any(isinstance(v, dict) for v in value) else Flow(value)
        return value

    class Dumper(_Dumper):
        pass

    Dumper.add_representer(Flow, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))
    return yaml.dump(flow(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
