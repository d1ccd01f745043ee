"""The guides say what the library has: commands parse, examples run, every option, quantiser, prior and key is named."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.cli import parse
from intarsia.config import Config
from pipelines import assemble, compare, compare_quantizers, evaluate, guidance, judge_completions, report, sample
from pipelines.evaluation import train_features
from pipelines.evaluation.timing import timing
from pipelines.sample_set import SetPlan
from pipelines.sampling_config import ALIASES, SamplingConfig
from stage1_tokenizer import doctor, encode
from stage1_tokenizer import evaluate as evaluate_tokenizer
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage2_prior import evaluate as evaluate_prior
from stage2_prior import train as train_prior
from stage2_prior.priors.base import PRIORS
from stage2_prior.sampling import DrawOptions
from tests import tiny_pipelines as tiny

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
LEVELS = {"levels": "prior.levels"}
SCRIPTS: dict[str, tuple[type[Config], dict[str, str]]] = {
    "stage1_tokenizer.train": (train_tokenizer.TokenizerTrainConfig, {}),
    "stage1_tokenizer.encode": (encode.EncodeConfig, {}),
    "stage1_tokenizer.evaluate": (evaluate_tokenizer.EvaluateConfig, {}),
    "stage1_tokenizer.doctor": (doctor.DoctorConfig, {"run": "tokenizer"}),
    "stage2_prior.train": (train_prior.PriorTrainConfig, LEVELS),
    "stage2_prior.evaluate": (evaluate_prior.EvaluateConfig, {}),
    "pipelines.assemble": (assemble.AssembleConfig, ALIASES),
    "pipelines.sample": (sample.SampleConfig, ALIASES),
    "pipelines.evaluate": (evaluate.EvaluateConfig, ALIASES),
    "pipelines.compare": (compare.CompareConfig, ALIASES),
    "pipelines.guidance": (guidance.GuidanceConfig, ALIASES),
    "pipelines.judge_completions": (judge_completions.JudgeConfig, ALIASES),
    "pipelines.evaluation.train_features": (train_features.TrainFeaturesConfig, {"name": "classifier.name"}),
    "pipelines.report": (report.ReportConfig, {}),
    "pipelines.compare_quantizers": (compare_quantizers.CompareConfig, {}),
}
ladders = tiny.ladders  # a fixture


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands() -> list[tuple[str, str]]:
    """(document, line) of each command in a fenced block."""
    lines = [(path.name, line) for path in DOCS for block in blocks(path.name, "", "bash") for line in block.splitlines()]
    return [(name, line) for name, line in lines if re.match(r"(python|accelerate launch) -m ", line)]


def rows(name: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table row that begins with a word in backticks."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in read(name).splitlines() if line.startswith("| `")]
    return {cells[0].split("`")[1]: cells[1:] for cells in lines}


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_name_modules_fields_and_configurations_that_exist(document: str, line: str) -> None:
    module, *words = shlex.split(line.partition(" -m ")[2], comments=True)
    assert importlib.util.find_spec(module) is not None
    if module in SCRIPTS:
        config, aliases = SCRIPTS[module]
        parse(config, words, aliases)
    else:
        assert module.startswith(("benchmarks.", "stage1_tokenizer.quantizers.conformance")), f"{module}: not checked by this test"


def test_every_guide_has_commands_to_check() -> None:
    assert {"concepts.md", "sampling.md", "quantizers.md"} <= {document for document, _ in commands()}


def test_examples_of_sampling_run_on_a_pipeline_of_two_levels() -> None:
    scope: dict[str, Any] = {"torch": torch, "pipeline": tiny.pipeline("parallel", micro_batch=8)}
    examples = blocks("sampling.md", "python")
    assert len(examples) >= 4
    for example in examples:
        exec(example, scope)  # noqa: S102
    assert scope["y"].shape == scope["x"].shape


def test_sampling_names_every_option_and_the_priors_that_have_it() -> None:
    table, common = rows("sampling.md"), {f.name for f in fields(DrawOptions)}
    for name in SamplingConfig.model_fields:
        having = {kind for kind in PRIORS.names() if name in {f.name for f in fields(PRIORS.get(kind).Options)}}
        assert having, name
        if name in common:
            assert having == set(PRIORS.names()) and table[name][0].startswith("all")
        else:
            assert {table[name][0]} == having
    assert {f.name for kind in PRIORS.names() for f in fields(PRIORS.get(kind).Options)} == set(SamplingConfig.model_fields)
    assert set(PRIORS.names()) <= table.keys()


def test_quantizers_names_every_quantiser_and_every_field() -> None:
    text, table = read("quantizers.md"), rows("quantizers.md")
    for kind in QUANTIZERS.names():
        own = table["lfq" if kind == "bsq" else kind][-1]
        if kind == "vq":
            own += " ".join(re.findall(r"^\| `([\w.]+)", text, re.MULTILINE))
        missing = [name for name in QUANTIZERS.config(kind).model_fields if not re.search(rf"\b{name}\b", own)]
        assert kind in table and not missing, (kind, missing)


def test_quantizers_has_the_place_for_the_comparison() -> None:
    assert read("quantizers.md").count("<!-- begin fashion_mnist -->") == read("quantizers.md").count("<!-- end fashion_mnist -->") == 1


def test_formats_names_every_key_of_a_set_of_samples_and_of_the_timing() -> None:
    plan = SetPlan(n=4, first=0, seed=0, label=None, options={})
    keys = [*plan.tree(tiny.pipeline("ladder")), "seed", *timing(1.0, 4, torch.device("cpu")).to_dict()]
    text = read("formats.md")
    assert not [key for key in keys if f"`{key}`" not in text]
