"""The watch over the codes in two processes: it sees the codes of both, acts on both, and goes on exactly where a run was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stage1_tokenizer.health import HealthConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.train import TokenizerTrainConfig
from tests.training import TOKENIZER, Left, run_training, tiny, together

pytestmark = pytest.mark.faults

STEPS = 28
FAR = VQConfig(codes=16, dim=4, update="gradient", init="normal", restart=0.0, beta=5.0)  # codes that few latents are near to
PARTS = ("module/", "optimizer/", "extra-health/")


def config(run: Path) -> TokenizerTrainConfig:
    """Looks after steps 7, 14, 21 and 28, with remedies; checkpoints after steps 5, 10, ... lie between two looks."""
    return tiny(
        run,
        steps=STEPS,
        batch_size=5,
        precision="fp64",
        tokenizer=TOKENIZER.replace(quantizer=ResidualConfig(stages=2, inner=FAR)),
        health=HealthConfig(every=7, usage=0.9, collapse="auto", quiet=True),
        log={"every": 1, "checkpoint_every": 5},
    )


def figures(run: Path) -> list[dict[str, float]]:
    """What each look logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{name: value for name, value in line.items() if name.startswith("health/")} for line in lines]
    return [look for look in found if look]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Path:
    """one, two: unbroken. cut: in two processes, interrupted twice. up, down: begun in one (two) processes, ended in two (one)."""
    folder = tmp_path_factory.mktemp("runs")
    run_training(config(folder / "one"))
    run_training(config(folder / "up"), max_steps=11)
    plan = [("two", None), ("cut", 4), ("cut", 17), ("cut", None), ("up", None), ("down", 11)]
    together(ranks, *(lambda name=name, stop=stop: run_training(config(folder / name), max_steps=stop) for name, stop in plan))
    run_training(config(folder / "down"))
    return folder


def test_two_processes_see_all_codes_and_apply_the_remedies_of_one(runs):
    one, two = Left.of(runs / "one"), Left.of(runs / "two")
    assert one.distance(two, PARTS) <= 1e-10
    looks = figures(runs / "one")
    assert len(looks) == STEPS // 7 and all("health/usage/codes/1" in look for look in looks)
    for mine, theirs in zip(looks, figures(runs / "two"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)
    assert one.tensors["extra-health/stage"].max() > 0  # there was a collapse, and codebooks were set anew


def test_an_interrupted_run_in_two_processes_equals_the_unbroken_one_to_the_bit(runs):
    assert Left.of(runs / "cut").differences(Left.of(runs / "two")) == []


@pytest.mark.parametrize("run", ["up", "down"])
def test_no_code_is_lost_or_counted_twice_where_the_number_of_processes_changes_between_two_looks(runs, run):
    whole = Left.of(runs / "one")
    assert Left.of(runs / run).distance(whole, PARTS) <= 1e-10
    for mine, theirs in zip(figures(runs / run), figures(runs / "one"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)
