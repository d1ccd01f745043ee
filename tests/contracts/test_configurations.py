"""What holds for every registered configuration, and for those of the scripts."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from intarsia import yaml_io
from intarsia.cli import help_text, parse
from intarsia.config import Config, ConfigError, config_class, walk

ROOT = Path(__file__).resolve().parents[2]
REGISTRIES = {
    "SOURCES": "stage1_tokenizer.data.base",
    "NETS": "stage1_tokenizer.nets.base",
    "QUANTIZERS": "stage1_tokenizer.quantizers.base",
    "TOKENIZERS": "stage1_tokenizer.tokenizers.base",
    "OBJECTIVES": "stage1_tokenizer.objectives.base",
    "PRIORS": "stage2_prior.priors.base",
}
SCRIPTS = {
    "stage1_tokenizer.train": "TokenizerTrainConfig",
    "stage1_tokenizer.encode": "EncodeConfig",
    "stage1_tokenizer.evaluate": "EvaluateConfig",
    "stage1_tokenizer.doctor": "DoctorConfig",
    "stage2_prior.train": "PriorTrainConfig",
    "stage2_prior.evaluate": "EvaluateConfig",
    "pipelines.assemble": "AssembleConfig",
    "pipelines.compare": "CompareConfig",
    "pipelines.compare_quantizers": "CompareConfig",
    "pipelines.evaluate": "EvaluateConfig",
    "pipelines.evaluation.train_features": "TrainFeaturesConfig",
    "pipelines.guidance": "GuidanceConfig",
    "pipelines.judge_completions": "JudgeConfig",
    "pipelines.quickstart": "QuickstartConfig",
    "pipelines.report": "ReportConfig",
    "pipelines.sample": "SampleConfig",
}


def registered() -> list[type[Config]]:
    found = []
    for name, module in REGISTRIES.items():
        registry = getattr(importlib.import_module(module), name)
        assert registry.names(), f"{name} is empty"
        packages = {registry.config(kind): registry.get(kind).__module__ for kind in registry.names()}
        found += [config for config, home in packages.items() if not home.startswith("tests.")]
    return found


def script_configs() -> list[type[Config]]:
    return [getattr(importlib.import_module(module), name) for module, name in SCRIPTS.items()]


TYPES = registered()
ALL = TYPES + script_configs()
IDS = [f"{cls.__module__}.{cls.__name__}" for cls in ALL]


def scripts() -> dict[str, str]:
    """Module -> configuration of every script in the packages: what calls ``run_main``, and what it parses."""
    found = {}
    for package in ("intarsia", "stage1_tokenizer", "stage2_prior", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [
                (node.func.id, node.args)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            ]
            parsed = [args[0].id for name, args in calls if name == "parse" and isinstance(args[0], ast.Name)]
            if parsed and any(name == "run_main" for name, _ in calls):
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = parsed[0]
    return found


def test_no_script_is_forgotten():
    assert scripts() == SCRIPTS


GIVEN = {"quantizers": ({"name": "one", "quantizer": {"type": "vq"}},)}


def required(cls: type[Config]) -> dict[str, Any]:
    """A value for each field that has no default: a path, but for ``GIVEN``."""
    return {name: GIVEN.get(name, "some/path") for name, field in cls.model_fields.items() if field.is_required()}


@pytest.mark.parametrize("cls", ALL, ids=IDS)
def test_a_configuration_and_its_yaml_are_one_tree(cls):
    config = cls(**required(cls))
    assert cls.from_dict(yaml_io.load(config.to_yaml())) == config == cls.from_dict(config.to_dict())
    assert config.replace() == config
    if cls in TYPES:
        base = next(parent for parent in cls.__mro__ if parent.__dict__.get("registry"))
        assert type(base.from_dict(config.to_dict())) is cls, "the base finds the class by its type"


@pytest.mark.parametrize("cls", ALL, ids=IDS)
def test_every_field_says_what_it_is(cls):
    assert cls.__doc__, cls
    silent = [name for name, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not silent, silent


@pytest.mark.parametrize("cls", ALL, ids=IDS)
def test_help_lists_every_field(cls):
    text = help_text(cls, "program")
    for path, _, _ in walk(cls):
        assert f"  --{path} (" in text


@pytest.mark.parametrize("cls", ALL, ids=IDS)
def test_a_wrong_type_is_refused_at_every_field_by_its_path(cls):
    for path, _, _ in walk(cls):
        if path.endswith(".type"):
            continue
        tree: dict[str, Any] = required(cls)
        node = tree
        for key in path.split(".")[:-1]:
            node = node.setdefault(key, {})
        node[path.split(".")[-1]] = {"nonsense": object()}
        with pytest.raises(ConfigError) as caught:
            cls.from_dict(tree)
        where = (path, path.rsplit(".", 1)[0])
        assert all(line.startswith(where) and "\n" not in line for line in caught.value.errors), caught.value.errors


@pytest.mark.parametrize("cls", ALL, ids=IDS)
def test_a_misspelt_key_is_refused_at_every_level_with_the_right_one(cls):
    for path, _, _ in walk(cls):
        if path.endswith(".type") or len(path.split(".")[-1]) < 4:
            continue
        *above, last = path.split(".")
        tree: dict[str, Any] = required(cls)
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last + "x"] = 1
        with pytest.raises(ConfigError) as caught:
            cls.from_dict(tree)
        assert any(line.startswith(f"{path}x: unknown key; did you mean {last!r}?") for line in caught.value.errors), caught.value.errors


@pytest.mark.parametrize("cls", script_configs(), ids=list(SCRIPTS))
def test_every_default_can_be_given_as_a_flag(cls):
    """What --help prints as the value, given back as a flag, is the same configuration."""
    whole = cls(**required(cls))
    argv: list[str] = []
    for path, field, value in walk(cls, whole.to_dict()):
        if not (path.endswith(".type") and config_class(field.annotation)):
            argv += [f"--{path}={value if isinstance(value, str) else _spelt(value)}"]
    assert parse(cls, argv)[0] == whole


def _spelt(value: Any) -> str:
    return yaml_io.dump({"v": value}).removeprefix("v: ").removeprefix("v:").strip()
