"""YAML as configuration needs it: the scalars of YAML 1.2's core schema, no aliases, no duplicate keys, bounded size.

``1e-4`` is a float, ``no`` and ``12:30:00`` are strings, and what ``dump`` writes ``load`` reads back as the same tree.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_RESOLVERS = [  # tag, pattern, first characters ("" where the scalar may be empty)
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", rf"^(?:{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+0123456789.")),
]


class YAMLError(ValueError):
    """The text is no YAML that a configuration may hold; the message says where."""


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.events.AliasEvent):
            raise YAMLError(f"line {line}: aliases are not allowed")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YAMLError(f"line {line}: nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != _TAG + "str":
                raise YAMLError(f"line {line}: the key {_source(key)} is not a name")
            if key.value in seen:
                raise YAMLError(f"line {line}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_map(self, node: Any) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise YAMLError(f"line {node.start_mark.line + 1}: {_source(node)} is no mapping")
        return self.construct_mapping(node, deep=True)

    def construct_list(self, node: Any) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def construct_text(self, node: Any) -> str:
        return str(self.construct_scalar(node))

    def construct_nothing(self, node: Any) -> None:
        raise YAMLError(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is not allowed")

    def construct_bool(self, node: Any) -> bool:
        return self._checked(node, "bool").lower() == "true"

    def construct_null(self, node: Any) -> None:
        self._checked(node, "null")

    def construct_int(self, node: Any) -> int:
        text = self._checked(node, "int")
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        if len(text) > MAX_DIGITS:
            raise YAMLError(f"line {node.start_mark.line + 1}: an integer of {len(text)} characters; at most {MAX_DIGITS} are read")
        return int(text, base)

    def construct_float(self, node: Any) -> float:
        return float(self._checked(node, "float").lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _checked(self, node: Any, name: str) -> str:
        """The text of a scalar, which an explicit tag (``!!int x``) may not match."""
        text = self.construct_scalar(node)
        pattern = next(p for tag, p, _ in _RESOLVERS if tag == name)
        if not re.match(pattern, text) and not (name == "float" and re.match(_RESOLVERS[2][1], text)):
            raise YAMLError(f"line {node.start_mark.line + 1}: {text!r} is no {name}")
        return str(text)


def _source(node: Any) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"of kind {node.id}"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> Any:
        breaks = any(c in text for c in "\r\n\x85\u2028\u2029")  # PyYAML loses some of them unless they are escaped
        return self.represent_scalar(_TAG + "str", text, style='"' if breaks else None)


_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, {}
for _name, _pattern, _first in _RESOLVERS:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
_Loader.yaml_constructors = {  # nothing else: no dates, sets or bytes
    **{_TAG + name: getattr(_Loader, f"construct_{name}") for name in ("bool", "null", "int", "float", "map")},
    _TAG + "seq": _Loader.construct_list,
    _TAG + "str": _Loader.construct_text,
    None: _Loader.construct_nothing,
}
_Dumper.add_representer(str, _Dumper.represent_text)


def load(text: str) -> Any:
    """The tree in ``text``: dictionaries with names as keys, lists and scalars. Raises YAMLError with the line."""
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        raise YAMLError(f"{size} bytes; at most {MAX_BYTES} are read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
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
