"""docs/scale.md: launcher configurations that start what they say, and a table that the code made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs import table
from intarsia.meta import build_on_meta
from stage1_tokenizer.data.bundled import BundledConfig, BundledSource
from stage1_tokenizer.data.near_duplicates import without_near_duplicates
from stage2_prior.priors.base import PRIORS

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
TEXT = (ROOT / "docs/scale.md").read_text(encoding="utf-8")


# Launchers -----------------------------------------------------------------------------------------------------------
EXPECTED: dict[str, dict[str, Any]] = {
    "cpu": {"distributed_type": "NO", "num_processes": 1, "num_machines": 1, "use_cpu": True},
    "two_cpus": {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "use_cpu": False},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "multi_node": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "machine_rank": 0},
    "fsdp2": {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 1, "use_cpu": False},
}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_each_launcher_and_finds_what_it_is_for(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    found = {name: getattr(config, name) for name in EXPECTED[path.stem]}
    assert {name: getattr(value, "value", value) for name, value in found.items()} == EXPECTED[path.stem]
    assert config.mixed_precision == "no", "the run's own --precision decides"
    if path.stem == "fsdp2":
        assert config.fsdp_config == {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False}
    assert f"configs/accelerate/{path.name} " in TEXT


def test_every_launcher_is_there():
    assert {path.stem for path in LAUNCHERS} == EXPECTED.keys()


WORDS = ["--steps", "2", "--batch_size", "8", "--precision", "fp32", "--device", "cpu", "--log.every", "1", "--log.validate_every", "0"]
TOKENIZER = ["--init_samples", "64", "--log.pictures_every", "0", "--tokenizer.net.widths", "[8, 8]", "--tokenizer.quantizer.codes", "32"]


def launch(launcher: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", f"configs/accelerate/{launcher}.yaml"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*line, *words], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300, check=False)


def world_of(run: Path) -> int:
    """How many processes wrote the newest checkpoint."""
    (path,) = run.glob("checkpoints/step-00000002/manifest.json")
    return int(json.loads(path.read_text())["meta"]["world_size"])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "environment", "world"), [("cpu", {}, 1), ("two_cpus", {"ACCELERATE_USE_CPU": "true"}, 2)])
def test_the_cpu_launchers_start_that_many_processes_in_one_run(launcher, environment, world, tmp_path):
    done = launch(launcher, environment, "-m", "stage1_tokenizer.train", "--run", str(tmp_path / "run"), *WORDS, *TOKENIZER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert world_of(tmp_path / "run") == world and (tmp_path / "run/model/config.json").is_file()


@pytest.mark.slow
def test_two_cpus_without_the_variable_are_one_run_of_two_or_none(tmp_path):
    """Never two runs in one folder; which of both depends on accelerate."""
    done = launch("two_cpus", {}, "-m", "stage1_tokenizer.train", "--run", str(tmp_path / "run"), *WORDS, *TOKENIZER)
    if done.returncode == 0:
        assert world_of(tmp_path / "run") == 2
    else:
        assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_the_fsdp_launcher_shards_a_prior_on_two_cpus_and_refuses_a_tokenizer(tmp_path):
    from tests.test_train_prior import write

    codes, words = write(tmp_path / "codes"), ["--num_processes", "2", "-m"]
    prior = ["--codes", str(codes), "--prior.width", "16", "--prior.depth", "2", "--prior.heads", "2"]
    environment = {"ACCELERATE_USE_CPU": "true"}
    done = launch("fsdp2", environment, *words, "stage2_prior.train", "--run", str(tmp_path / "prior"), *WORDS, *prior)
    assert done.returncode == 0, done.stderr[-3000:]
    assert world_of(tmp_path / "prior") == 2 and (tmp_path / "prior/model/config.json").is_file()
    done = launch("fsdp2", environment, *words, "stage1_tokenizer.train", "--run", str(tmp_path / "tokenizer"), *WORDS, *TOKENIZER)
    assert done.returncode != 0 and "shards priors; a tokenizer keeps statistics of whole batches" in done.stderr, done.stderr[-3000:]


# The table -----------------------------------------------------------------------------------------------------------
def written() -> dict[str, list[str]]:
    """The cells of each row that stands in the document."""
    heading, _, *rows = TEXT.partition(table.BEGIN)[2].partition(table.END)[0].splitlines()
    assert heading == f"| {' | '.join(table.HEADING)} |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row for row in cells}


def test_the_table_has_a_row_for_every_large_configuration():
    assert list(written()) == table.large()


@pytest.mark.parametrize("name", table.large())
def test_what_the_table_says_of_a_configuration_is_what_it_builds(name):
    """All but the activations: see the slow test."""
    column = table.HEADING.index("activations a sample")
    found = table.row(name, measure=False).cells()
    assert [c for i, c in enumerate(found) if i != column] == [c for i, c in enumerate(written()[name]) if i != column]


@pytest.mark.slow
def test_the_whole_table_is_what_the_command_writes(tmp_path):
    path = tmp_path / "scale.md"
    path.write_text(TEXT)
    table.main([str(path)])
    assert path.read_text() == TEXT


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt_b", 111), ("gpt_l", 343), ("gpt_xl", 775), ("gpt_xxl", 1400), ("vqvae_1024_maskgit", 177)]
)
def test_the_priors_of_imagenet_have_the_published_sizes_within_a_few_per_cent(name, millions):
    assert table.row(f"imagenet256/{name}", measure=False).parameters / 1e6 == pytest.approx(millions, rel=0.04)


def test_memory_follows_from_the_parameters():
    """A prior with averages takes five copies of four bytes, six replicated; a tokenizer four and its statistics."""
    prior = table.row("imagenet256/gpt_b", measure=False)
    assert prior.state == 20 * prior.parameters and prior.replicated == 24 * prior.parameters
    assert prior.shards == prior.state // 8 + 4 * prior.parameters
    tokenizer = table.row("cifar10/vqvae", measure=False)
    assert 16 * tokenizer.parameters < tokenizer.state < 16.5 * tokenizer.parameters and tokenizer.shards == 0


def test_saved_bytes_are_the_tensors_that_backward_needs():
    """Of tanh(linear(x)): the input, once, and the output; the weights are no activations."""
    linear, x = nn.Linear(8, 16), torch.zeros(4, 8, requires_grad=True)
    assert table.saved_bytes(linear, lambda: torch.tanh(linear(x)) + linear(x).square().mean() * 0) == 4 * (4 * 8 + 4 * 16 + 4 * 16)


def test_the_activations_of_a_deep_transformer_are_those_of_the_line_through_one_and_two_blocks():
    spec = table.spec_of("cifar10/gpt")
    for kind in ("gpt", "maskgit"):
        config = PRIORS.config(kind).from_dict({"width": 16, "depth": 5, "heads": 2})
        assert table.prior_activations(config, spec) == table._prior_activations(config, spec)


def test_a_prior_takes_the_tokenizer_with_the_longest_name_that_its_own_begins_with():
    assert table.tokenizer_of("emoji/vqvae2_bottom_maskgit") == "emoji/vqvae2"
    assert table.tokenizer_of("emoji/vqvae_32_gpt") == "emoji/vqvae_32" and table.tokenizer_of("emoji/gpt") == "emoji/vqvae"


def test_the_figures_in_the_text_are_those_of_the_code():
    source = BundledSource(BundledConfig(name="emoji"))
    far = [without_near_duplicates(source, name) for name in ("validation", "test")]
    kept, held = [len(split) for split in far if split is not None], sum(len(source.split(name)) for name in ("validation", "test"))
    assert f"Of the {held} held-out glyphs, {held - sum(kept)} have a near neighbour" in TEXT
    assert f"the {kept[0]} + {kept[1]} without" in TEXT
    assert source.near_duplicates == 0.5 and "of at most 0.5" in TEXT
    assert re.search(r"takes 20 bytes a parameter", TEXT)


def test_nothing_is_allocated_for_a_billion_parameters():
    config, spec = table.config_of("imagenet256/gpt_xxl").prior, table.spec_of("imagenet256/gpt_xxl")
    module = build_on_meta(PRIORS.get("gpt"), config, spec)
    assert all(p.is_meta for p in module.parameters()) and sum(p.numel() for p in module.parameters()) > 1e9
