"""Two processes train every registered prior as one does (C1, C3), also in micro-batches and where a rank has no sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intarsia.cli import Flags
from stage2_prior import train as script
from stage2_prior.priors.base import PRIORS
from tests.tiny_codes import write_tiny_codes
from tests.training import Left, together

pytestmark = pytest.mark.faults

NOISE = {"corruption": 0.2, "dropout": 0.2, "cond_dropout": 0.3}
SMALL = {"width": 8, "depth": 1, "heads": 2} | NOISE
CASES: dict[str, dict[str, Any]] = {
    "gpt over two levels": {"type": "gpt", "levels": "0:2"},
    "gpt by position, factorised": {"type": "gpt", "levels": "1:3", "order": "position", "head": "factorised"},
    "rq": {"type": "rq", "levels": "1:3", "inner": 1, "positions": "rotary"},
    "rq, factorised": {"type": "rq", "levels": "1:3", "inner": 1, "label": "prefix", "head": "factorised"},
    "pixelcnn": {"type": "pixelcnn", "levels": "0:1"},
    "pixelcnn with attention": {"type": "pixelcnn", "levels": "1:2", "attention": 1},
    "maskgit over two levels": {"type": "maskgit", "levels": "1:3"},
}
RUNS: dict[str, dict[str, Any]] = {"whole": {}, "parts": {"accumulate": 3}, "single": {"batch_size": 1}}


def test_every_registered_prior_has_a_case():
    assert {case["type"] for case in CASES.values()} == set(PRIORS.names())


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_codes(tmp_path_factory.mktemp("codes") / "codes")


@pytest.mark.parametrize("case", CASES)
def test_c1_and_c3_two_processes_train_a_prior_as_one_does(case, codes, ranks, tmp_path):
    """With all noise on: 13 = 7 + 6 samples, the same in three micro-batches, and one sample on two ranks; 11 to validate on."""

    def train(run: str, **changes: Any) -> None:
        tree = {
            "run": str(tmp_path / run), "codes": str(codes), "prior": SMALL | CASES[case], "steps": 20, "batch_size": 13,
            "precision": "fp64", "device": "cpu", "optim": {"lr": 1e-2, "average": 0.9, "clip": 0.5},
            "log": {"every": 10, "validate_every": 20, "checkpoint_every": 20},
        }  # fmt: skip
        script.train(script.PriorTrainConfig.from_dict(tree | changes), Flags())

    for name, changes in RUNS.items():
        train(f"one-{name}", **changes)
    together(ranks, *(lambda name=name, changes=changes: train(f"two-{name}", **changes) for name, changes in RUNS.items()))
    one, two = ({name: Left.of(tmp_path / f"{count}-{name}") for name in RUNS} for count in ("one", "two"))
    everything = ("module/", "optimizer/", "average/", "means/")
    for name in RUNS:
        assert one[name].step == two[name].step == 20
        assert one[name].distance(two[name], everything) <= 1e-10, name
        assert one[name].facts["best"] == pytest.approx(two[name].facts["best"], abs=1e-10), name
    assert one["whole"].distance(one["parts"]) <= 1e-10 and one["whole"].distance(two["parts"]) <= 1e-10
    assert one["whole"].distance(one["single"], ("module/",)) > 1e-3  # it does see other batches
