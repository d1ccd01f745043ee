"""Sharded training of priors (FSDP2): two processes with half the weights each train, write and resume what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia import sharding
from intarsia.cli import Flags
from intarsia.config import ConfigError
from intarsia.run import Run
from stage2_prior import train
from stage2_prior.priors.base import Prior
from tests.test_train_prior import write
from tests.training import Left, run_training, tiny

pytestmark = pytest.mark.faults

GPT = {"type": "gpt", "levels": "0:2", "width": 12, "depth": 2, "heads": 2}
ENVIRONMENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("codes") / "codes")


def config(run: Path, codes: Path, prior: dict[str, Any] = GPT, **changes: Any) -> train.PriorTrainConfig:
    tree = {
        "run": str(run), "codes": str(codes), "prior": prior, "steps": 6, "batch_size": 8, "precision": "fp64", "device": "cpu",
        "optim": {"lr": 1e-2, "average": 0.9, "clip": 0.5}, "log": {"every": 3, "validate_every": 3, "checkpoint_every": 3},
    }  # fmt: skip
    return train.PriorTrainConfig.from_dict(tree | changes)


def sharded(ranks, config, environment=ENVIRONMENT, **flags) -> list[Any]:
    """Trains in two processes as under an accelerate launch with FSDP; of each the error, and which share of the weights it held."""

    def work(rank: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            held = []
            prepare = Run.prepare

            def prepared(run: Run, module: Any, *rest: Any) -> Any:
                total = sum(p.numel() for p in module.parameters())
                model = prepare(run, module, *rest)
                held.append(sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters()) / total)
                return model

            patch.setattr(Run, "prepare", prepared)
            try:
                if isinstance(config, train.PriorTrainConfig):
                    train.train(config, Flags(**flags))
                else:
                    run_training(config, **flags)
            except ConfigError as error:
                return str(error)
            return held[0]

    return ranks(work, timeout=120.0)


PRIORS = {
    "gpt": GPT,
    "pixelcnn": {"type": "pixelcnn", "levels": "1:2", "width": 8, "depth": 2},
    "maskgit": {"type": "maskgit", "levels": "1:2", "width": 12, "depth": 2, "heads": 2},
    "rq": {"type": "rq", "levels": "0:1", "width": 12, "depth": 2, "inner": 1, "heads": 2},
}


@pytest.mark.parametrize("kind", PRIORS)
def test_two_shards_train_validate_and_release_what_one_process_does(kind, ranks, codes, tmp_path):
    """37 validation samples are one batch: one rank has one, the other none. Weights, moments, averages and figures are compared."""
    both = {"accumulate": 2, "batch_size": 10}
    train.train(config(tmp_path / "one", codes, PRIORS[kind], **both), Flags())
    held = sharded(ranks, config(tmp_path / "two", codes, PRIORS[kind], **both))
    assert all(0.3 < share < 0.7 for share in held) and sum(held) == pytest.approx(1), held
    one, two = Left.of(tmp_path / "one"), Left.of(tmp_path / "two")
    assert one.distance(two, ("module/", "optimizer/", "average/")) <= 1e-10
    assert one.facts["best"] == pytest.approx(two.facts["best"], abs=1e-9)
    weights = [Prior.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    assert max(float((a - b).abs().max()) for a, b in zip(weights[0].values(), weights[1].values(), strict=True)) <= 1e-10


def test_a_sharded_run_resumes_to_the_bits_of_an_unbroken_one_and_one_process_takes_its_checkpoint_over(ranks, codes, tmp_path):
    sharded(ranks, config(tmp_path / "whole", codes))
    sharded(ranks, config(tmp_path / "cut", codes), max_steps=3)
    sharded(ranks, config(tmp_path / "cut", codes))
    assert not Left.of(tmp_path / "cut").differences(Left.of(tmp_path / "whole"))

    sharded(ranks, config(tmp_path / "mixed", codes), max_steps=3)
    train.train(config(tmp_path / "mixed", codes), Flags())
    assert Left.of(tmp_path / "mixed").distance(Left.of(tmp_path / "whole"), ("module/", "optimizer/", "average/")) <= 1e-10


def test_a_sharded_run_starts_from_a_release(ranks, codes, tmp_path):
    train.train(config(tmp_path / "first", codes), Flags())
    init = str(tmp_path / "first")
    for name in ("one", "two"):
        made = config(tmp_path / name, codes, init=init, steps=2)
        train.train(made, Flags()) if name == "one" else sharded(ranks, made)
    assert Left.of(tmp_path / "one").distance(Left.of(tmp_path / "two"), ("module/", "average/")) <= 1e-10


def test_a_nan_on_one_rank_ends_the_run_on_both_before_the_weights_change(ranks, codes, tmp_path, monkeypatch):
    loss = Run.backward

    def broken(run: Run, value: torch.Tensor, part: Any, stats: Any = None) -> None:
        bad = run.step == 4 and run.comm.rank == 1
        loss(run, value * float("nan") if bad else value, part, stats)

    monkeypatch.setattr(Run, "backward", broken)
    with pytest.raises(AssertionError, match=r"RunError: step 5: not finite: loss on rank 1\n"):
        sharded(ranks, config(tmp_path / "run", codes))
    assert Left.of(tmp_path / "run").step == 3


@pytest.mark.parametrize(
    ("environment", "changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 1 in the launcher's configuration; expected 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true in the launcher's configuration; expected false"),
        ({}, {"batch_size": 5, "accumulate": 3}, "batch_size: 5 leaves some processes fewer micro-batches than others under FSDP"),
        ({}, {"optim": {"muon": 0.02}}, "optim.muon: 0.02 needs whole matrices, which FSDP deals to the processes; expected 0"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(environment, changes, words, ranks, codes, tmp_path):
    for error in sharded(ranks, config(tmp_path / "run", codes, **changes), ENVIRONMENT | environment):
        assert words in str(error)


def test_a_tokenizer_is_not_sharded(ranks, tmp_path):
    for error in sharded(ranks, tiny(tmp_path / "run")):
        assert "shards priors; a tokenizer keeps statistics of whole batches" in str(error)


def test_one_process_and_launches_without_fsdp_are_not_sharded(codes, tmp_path, monkeypatch):
    assert not sharding.requested()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert sharding.requested()
    train.train(config(tmp_path / "run", codes, steps=1), Flags())
    assert Left.of(tmp_path / "run").step == 1
