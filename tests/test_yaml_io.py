"""YAML as configuration needs it: YAML 1.2 scalars, nothing twice, nothing hidden, nothing large."""

import math
import random
import string

import pytest

from intarsia import yaml_io

SCALARS = {
    "1e-4": 1e-4,
    "1.0e4": 1e4,
    "1E3": 1000.0,
    ".5": 0.5,
    "1.": 1.0,
    "-0.25": -0.25,
    "+3": 3,
    "010": 10,
    "0x1F": 31,
    "0o17": 15,
    "007": 7,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "": None,
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "y": "y",
    "12:30:00": "12:30:00",
    "1_000": "1_000",
    "2001-01-01": "2001-01-01",
    "0b11": "0b11",
    "1e": "1e",
    "0x": "0x",
    "tRue": "tRue",
    "'5'": "5",
    '"1e-4"': "1e-4",
    "=": "=",
    "<<": "<<",
    "!!float 3": 3.0,
    "!!str 5": "5",
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_yaml_1_2(text):
    got = yaml_io.load(f"a: {text}")["a"]
    assert got == SCALARS[text] and type(got) is type(SCALARS[text])


def test_inf_and_nan_are_floats_which_the_configuration_then_refuses():
    tree = yaml_io.load("a: .inf\nb: -.INF\nc: .nan\nd: 1e999")
    assert tree["a"] == math.inf and tree["b"] == -math.inf and math.isnan(tree["c"]) and tree["d"] == math.inf


REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' stands twice",
    "a:\n  b: 1\n  b: 1": "line 3: the key 'b' stands twice",
    "x: [{a: 1, a: 2}]": "line 1: the key 'a' stands twice",
    "a: &x [1]\nb: *x": "line 2: aliases are not allowed",
    "a: &a [*a]": "line 1: aliases are not allowed",
    "a: 1\n2: b": "line 2: the key '2' is not a name",
    "true: 1": "line 1: the key 'true' is not a name",
    "[a]: 1": "line 1: the key of kind sequence is not a name",
    "a: !!python/object/apply:os.system [id]": "line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    "a: !!timestamp 2001-01-01": "line 1: the tag 'tag:yaml.org,2002:timestamp' is not allowed",
    "a: !!set {b}": "line 1: the tag 'tag:yaml.org,2002:set' is not allowed",
    "a: !own b": "line 1: the tag '!own' is not allowed",
    "a: !!int x": "line 1: 'x' is no int",
    "a: !!bool 1": "line 1: '1' is no bool",
    "a: !!map [1]": "line 1: of kind sequence is no mapping",
    "a: !!seq {b: 1}": "line 1: expected a sequence node, but found mapping",
    "a: " + "9" * 5000: "line 1: an integer of 5000 characters; at most 400 are read",
    "a: [1": "line 1: expected ',' or ']', but got '<stream end>'",
    "a: b: c": "line 1: mapping values are not allowed here",
    "a:\n\t- b": "line 2: found character '\\t' that cannot start any token",
    "a: 1\n---\nb: 2": "line 2: but found another document",
    "a: \x01": "unacceptable character #x0001: special characters are not allowed",
}


@pytest.mark.parametrize("text", REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_refused_is_named_with_its_line(text):
    with pytest.raises(yaml_io.YAMLError) as caught:
        yaml_io.load(text)
    assert str(caught.value) == REFUSED[text]


def test_depth_is_bounded():
    deepest = "[" * yaml_io.MAX_DEPTH + "]" * yaml_io.MAX_DEPTH
    assert yaml_io.load(deepest) is not None
    for deep in ("[" + deepest + "]", "[" * 100_000, "".join(f"{' ' * i}a:\n" for i in range(200))):
        with pytest.raises(yaml_io.YAMLError, match=f"nested more than {yaml_io.MAX_DEPTH} deep"):
            yaml_io.load(deep)


def test_size_is_bounded_in_bytes():
    with pytest.raises(yaml_io.YAMLError, match=f"{yaml_io.MAX_BYTES + 2} bytes; at most {yaml_io.MAX_BYTES} are read"):
        yaml_io.load("é" * (yaml_io.MAX_BYTES // 2 + 1))


def _random_tree(draw: random.Random, depth: int = 3):
    kind = draw.randrange(9 if depth else 6)
    if kind < 3:
        letters = string.printable + "äß€😀\u2028\x85'\"\\:#-?!&*%@`{}[]|>"
        return "".join(draw.choice(letters) for _ in range(draw.randrange(12))) if kind else draw.choice(list(SCALARS))
    if kind < 6:
        number = draw.uniform(-1, 1) * 10.0 ** draw.randrange(-300, 300)
        return draw.choice([None, True, False, draw.randrange(-(10**20), 10**20), number, 0.0])
    if kind == 6:
        return {draw.choice("abcdefgh") + str(i) * draw.randrange(2): _random_tree(draw, depth - 1) for i in range(draw.randrange(4))}
    return [_random_tree(draw, depth - 1) for _ in range(draw.randrange(4))]


def _same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("seed", range(300))
def test_what_dump_writes_load_reads_back_as_the_same_tree(seed):
    tree = {"root": _random_tree(random.Random(seed))}
    text = yaml_io.dump(tree)
    assert _same(yaml_io.load(text), tree), text


def test_dump_keeps_the_order_and_writes_lists_on_one_line():
    assert yaml_io.dump({"b": [1, 2], "a": {"z": "no", "y": "1e-4"}}) == "b: [1, 2]\na:\n  z: no\n  y: '1e-4'\n"
