"""Strict configuration: one tree in Python, YAML and flags; every mistake in one line with its path."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pydantic
import pytest

from intarsia import yaml_io
from intarsia.config import Added, Budget, Config, ConfigError, Place, differences, field_class, hashed, walk
from intarsia.registry import Registry

SHAPES: Registry[Any] = Registry("shape")


class ShapeConfig(Config, registry=SHAPES):
    """Base."""


class BoxConfig(ShapeConfig):
    width: Annotated[int, pydantic.Field(gt=0)] = 4
    """The width."""
    depth: int = 2
    edge: Literal["round", "sharp"] = "sharp"

    @pydantic.model_validator(mode="after")
    def _fits(self) -> BoxConfig:
        if self.width % self.depth:
            raise ValueError(f"width {self.width} is no multiple of depth {self.depth}")
        return self


SHAPES.register("box", BoxConfig)(type("Box", (), {}))


class RingConfig(ShapeConfig):
    levels: tuple[int, ...] = (8, 6, 5)
    inner: ShapeConfig = BoxConfig(width=6)


SHAPES.register("ring", RingConfig)(type("Ring", (), {}))


class StackConfig(ShapeConfig):
    stages: tuple[ShapeConfig, ...] = (BoxConfig(), BoxConfig(width=8))


SHAPES.register("stack", StackConfig)(type("Stack", (), {}))


class OptimConfig(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 0


class JobConfig(Config):
    """A job."""

    shape: ShapeConfig = BoxConfig(width=10)
    optim: OptimConfig = OptimConfig(lr=3e-4)
    extra: ShapeConfig | None = None
    steps: Budget[int] = 10
    run: Place[str] = "runs/x"
    log: Place[OptimConfig] = OptimConfig()
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    name: str = "n"
    exact: bool = True


def errors_of(tree) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        JobConfig.from_dict(tree)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


MISTAKES = {
    "misspelt key": ({"sede": 1}, "sede: unknown key; did you mean 'seed'? allowed: shape, optim, extra"),
    "foreign key": ({"zzzzz": 1}, "zzzzz: unknown key; allowed: shape, optim"),
    "nested key": ({"optim": {"lrr": 1}}, "optim.lrr: unknown key; did you mean 'lr'? allowed: lr, betas, warmup"),
    "key of another type": ({"shape": {"type": "box", "levels": [1]}}, "shape.levels: unknown key of the type 'box'; "),
    "key of the default's type": ({"shape": {"wdith": 1}}, "shape.wdith: unknown key; did you mean 'width'?"),
    "key in a list": (
        {"shape": {"type": "stack", "stages": [{"type": "box", "widht": 1}]}},
        "shape.stages.0.widht: unknown key; did you mean 'width'?",
    ),
    "type where none is": ({"optim": {"type": "box"}}, "optim.type: unknown key"),
    "misspelt type": ({"shape": {"type": "bxo"}}, "shape: unknown shape 'bxo'; did you mean 'box'? known: box, ring, stack"),
    "no such type": ({"shape": {"type": 7}}, "shape: unknown shape 7; known: box, ring, stack"),
    "a list as type": ({"shape": {"type": ["box"]}}, "shape: unknown shape ('box',)"),
    "no type": ({"extra": {"width": 2}}, "extra: needs a 'type'; known: box, ring, stack"),
    "text for int": ({"seed": "512"}, "seed: Input should be a valid integer; got '512'"),
    "bool for int": ({"seed": True}, "seed: Input should be a valid integer; got True"),
    "float for int": ({"seed": 1.0}, "seed: Input should be a valid integer; got 1.0"),
    "null for int": ({"seed": None}, "seed: Input should be a valid integer; got None"),
    "text for float": ({"optim": {"lr": "1e-4"}}, "optim.lr: Input should be a valid number; got '1e-4'"),
    "bool for float": ({"optim": {"lr": True}}, "optim.lr: Input should be a valid number; got True"),
    "int for bool": ({"exact": 1}, "exact: Input should be a valid boolean; got 1"),
    "text for bool": ({"exact": "no"}, "exact: Input should be a valid boolean; got 'no'"),
    "int for text": ({"name": 5}, "name: Input should be a valid string; got 5"),
    "nan": ({"optim": {"lr": math.nan}}, "optim.lr: Input should be a finite number; got nan"),
    "inf": ({"optim": {"lr": math.inf}}, "optim.lr: Input should be a finite number; got inf"),
    "out of range": ({"shape": {"type": "box", "width": 0}}, "shape.width: Input should be greater than 0; got 0"),
    "none of the words": ({"shape": {"type": "box", "edge": "soft"}}, "shape.edge: Input should be 'round' or 'sharp'; got 'soft'"),
    "cross-field": ({"shape": {"type": "box", "width": 5}}, "shape: width 5 is no multiple of depth 2"),
    "cross-field below": ({"shape": {"type": "ring", "inner": {"depth": 4}}}, "shape.inner: width 6 is no multiple of depth 4"),
    "scalar for mapping": ({"optim": 3}, "optim: Input should be a valid dictionary or instance of OptimConfig; got 3"),
    "mapping for scalar": ({"seed": {}}, "seed: Input should be a valid integer"),
    "scalar for list": ({"shape": {"type": "ring", "levels": 8}}, "shape.levels: Input should be a valid tuple; got 8"),
    "wrong item": ({"shape": {"type": "ring", "levels": [8, "6"]}}, "shape.levels.1: Input should be a valid integer; got '6'"),
    "list too short": ({"optim": {"betas": [0.9]}}, "optim.betas.1: Field required"),
    "list too long": ({"optim": {"betas": [0.9, 0.9, 0.9]}}, "optim.betas: Tuple should have at most 2 items"),
    "long value": ({"seed": "x" * 10_000}, "seed: Input should be a valid integer; got 'xxx"),
    "key that is no name": ({7: 1}, "7: unknown key; allowed: shape"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_with_its_path(case):
    tree, said = MISTAKES[case]
    lines = [line for line in errors_of(tree) if line.startswith(said)]
    assert len(lines) == 1 and "\n" not in lines[0] and len(lines[0]) < 300, errors_of(tree)


def test_a_mistake_is_said_once():
    for case, (tree, _) in MISTAKES.items():
        if case != "key that is no name":
            assert len(errors_of(tree)) == 1, errors_of(tree)


def test_all_mistakes_are_reported_at_once():
    said = errors_of({"sede": 1, "optim": {"lrr": 2, "warmup": "3"}, "shape": {"type": "ring", "inner": {"type": "box", "width": -1}}})
    assert [line.split(":")[0] for line in said] == ["sede", "optim.lrr", "shape.inner.width", "optim.warmup"]


def test_a_tree_that_is_nested_too_deep_is_refused_before_it_is_walked():
    lists: Any = 1
    mappings: Any = {}
    for _ in range(5000):
        lists, mappings = [lists], {"shape": mappings}
    for tree in ({"seed": lists}, {"sede": lists}, mappings):
        assert errors_of(tree) == ["the configuration is nested more than 32 deep"]


@pytest.mark.parametrize("tree", [[], None, 3, "x"])
def test_a_configuration_is_a_mapping(tree):
    assert "expected a mapping" in errors_of(tree)[0]


def test_python_is_as_strict_as_yaml():
    with pytest.raises(pydantic.ValidationError, match="valid integer"):
        JobConfig(seed="1")
    with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
        JobConfig(sede=1)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        JobConfig().seed = 3  # type: ignore[misc]


def test_a_part_of_a_default_is_changed_and_the_rest_stays():
    job = JobConfig.from_dict({"optim": {"warmup": 5}, "shape": {"depth": 5}})
    assert job.optim == OptimConfig(lr=3e-4, warmup=5) and job.shape == BoxConfig(width=10, depth=5)
    assert JobConfig(optim={"warmup": 5}) == JobConfig.from_dict({"optim": {"warmup": 5}})
    ring = JobConfig.from_dict({"shape": {"type": "ring", "inner": {"depth": 3}}}).shape
    assert ring == RingConfig(inner=BoxConfig(width=6, depth=3))


def test_another_type_starts_from_its_own_defaults():
    assert JobConfig.from_dict({"shape": {"type": "ring", "levels": [2]}}).shape == RingConfig(levels=(2,))
    assert JobConfig.from_dict({"shape": {"type": "ring", "inner": {"type": "ring"}}}).shape == RingConfig(inner=RingConfig())


JOBS = [
    JobConfig(),
    JobConfig(shape=RingConfig(levels=(), inner=RingConfig(inner=BoxConfig(edge="round"))), seed=2**70, exact=False),
    JobConfig(shape=StackConfig(stages=(RingConfig(), BoxConfig(), StackConfig(stages=())))),
    JobConfig(extra=BoxConfig(), optim=OptimConfig(lr=1e-30, betas=(0.1, 1.0)), name="no", run="1e-4"),
    JobConfig(name="", run="a: b # c\n- ü", extra=RingConfig()),
]


@pytest.mark.parametrize("job", JOBS)
def test_python_and_yaml_are_one_tree(job):
    assert JobConfig.from_dict(yaml_io.load(job.to_yaml())) == job
    assert JobConfig.from_dict(job.to_dict()) == job
    assert eval(repr(job)) == job


def test_type_stands_first_in_the_tree():
    assert next(iter(JobConfig().to_dict()["shape"].items())) == ("type", "box")


def test_replace_validates():
    job = JobConfig()
    assert job.replace(seed=3, shape=RingConfig()) == JobConfig(seed=3, shape=RingConfig())
    assert BoxConfig(width=6).replace(depth=3) == BoxConfig(width=6, depth=3)
    mistakes = (({"seed": -1}, "seed:"), ({"sede": 1}, "sede: unknown key"), ({"shape": {"type": "box", "width": 3}}, "shape: width 3"))
    for changes, said in mistakes:
        with pytest.raises(ConfigError, match=said):
            job.replace(**changes)
    assert job == JobConfig()


def test_fields_are_of_three_classes():
    kinds = {name: field_class(field) for name, field in JobConfig.model_fields.items()}
    assert kinds["seed"] == kinds["shape"] == "identity" and kinds["steps"] == "budget" and kinds["run"] == kinds["log"] == "place"


def test_differences_are_of_the_classes_asked_for():
    old = JobConfig()
    new = JobConfig(seed=1, steps=20, run="runs/y", log=OptimConfig(lr=1.0), optim=OptimConfig(lr=3e-4, warmup=2))
    assert differences(old, new) == [("optim.warmup", 0, 2), ("seed", 0, 1)]
    assert differences(old, new, kinds=("budget",)) == [("steps", 10, 20)]
    log = OptimConfig().to_dict(), OptimConfig(lr=1.0).to_dict()
    assert differences(old, new, kinds=("place",)) == [("run", "runs/x", "runs/y"), ("log", *log)]
    assert differences(new, new, kinds=("identity", "budget", "place")) == []


def test_another_type_is_one_difference():
    old, new = JobConfig(), JobConfig(shape=RingConfig(), extra=BoxConfig())
    assert differences(old, new) == [("shape.type", "box", "ring"), ("extra", None, BoxConfig().to_dict())]
    assert differences(old, new, kinds=("place",)) == []


def test_differences_name_the_item_of_a_list():
    old, new = StackConfig(), StackConfig(stages=(BoxConfig(), BoxConfig(width=8, depth=4)))
    assert differences(old, new) == [("stages.1.depth", 2, 4)]
    assert differences(old, StackConfig(stages=()))[0][0] == "stages"
    assert differences(RingConfig(), RingConfig(levels=(8, 6, 4))) == [("levels", [8, 6, 5], [8, 6, 4])]


def test_walk_lists_every_leaf_with_the_value_that_holds():
    leaves = {path: value for path, _, value in walk(JobConfig)}
    assert leaves["shape.type"] == "box" and leaves["shape.width"] == 10 and leaves["optim.lr"] == 3e-4
    assert leaves["extra"] is None and leaves["run"] == "runs/x" and leaves["log.lr"] == 1e-3
    chosen = {path: value for path, _, value in walk(JobConfig, {"shape": {"type": "ring", "inner": {"depth": 3}}, "seed": 4})}
    assert chosen["shape.levels"] == [8, 6, 5] and chosen["shape.inner.depth"] == 3 and chosen["shape.inner.width"] == 6
    assert chosen["seed"] == 4 and "shape.width" not in chosen


def test_an_unregistered_configuration_says_so():
    class LooseConfig(ShapeConfig):
        size: int = 1

    with pytest.raises(pydantic.ValidationError, match="needs a 'type'"):
        LooseConfig(size=2)


class Grown(Config):
    """A configuration to which a release did not yet give `later`."""

    width: int = 3
    """Always there."""
    later: Added[tuple[int, ...]] = ()
    """Came after the release."""


class GrownAround(Config):
    """Holds others."""

    one: Grown = Grown()
    """One."""
    several: tuple[Grown, ...] = (Grown(), Grown(later=(1,)))
    """Several."""


def test_an_added_field_enters_hashes_only_where_it_is_not_at_its_default():
    assert hashed(Grown()) == {"width": 3} and Grown().to_dict() == {"width": 3, "later": []}
    assert hashed(Grown(later=(2, 3))) == {"width": 3, "later": [2, 3]}
    assert hashed(GrownAround()) == {"one": {"width": 3}, "several": [{"width": 3}, {"width": 3, "later": [1]}]}
    assert Grown.from_dict({"width": 3}) == Grown() and differences(Grown(), Grown(later=(1,))) == [("later", [], [1])]


def test_a_key_that_other_types_have_is_said_with_those() -> None:
    with pytest.raises(ConfigError) as error:
        JobConfig.from_dict({"shape": {"type": "box", "levels": [1]}})
    assert error.value.errors == ["shape.levels: unknown key of the type 'box'; ring has it (shape.type); allowed: width, depth, edge"]


def test_a_text_that_begins_with_a_tilde_is_a_path_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paths(Config):
        run: Place[str] = ""
        init: str | None = None

    monkeypatch.setenv("HOME", "/far/someone")
    for given, found in (("~/a", "/far/someone/a"), ("~", "/far/someone"), ("a~", "a~"), ("./~", "./~"), ("~a", "~a")):
        assert Paths(run=given).run == found and Paths.from_dict({"run": given}).run == found
    assert Paths(init="~/x").init == "/far/someone/x" and Paths(init="~").init == "~"
