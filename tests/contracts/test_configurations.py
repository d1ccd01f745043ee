"""What holds for every registered configuration, and for those of the scripts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from intarsia import yaml_io
from intarsia.cli import help_text, parse
from intarsia.config import Config, ConfigError, config_class, walk

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
    "stage2_prior.train": "PriorTrainConfig",
    "stage2_prior.evaluate": "EvaluateConfig",
    "pipelines.assemble": "AssembleConfig",
    "pipelines.compare": "CompareConfig",
    "pipelines.evaluate": "EvaluateConfig",
    "pipelines.guidance": "GuidanceConfig",
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


def required(cls: type[Config]) -> dict[str, Any]:
    """A value for each field that has no default: all of them are paths."""
    return {name: "some/path" for name, field in cls.model_fields.items() if field.is_required()}


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
