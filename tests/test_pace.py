"""The pace of a training: its own steps, made when asked for, in processes that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines import pace as module
from pipelines.pace import Stepper, pace, ratio

TRAINING = (
    "stage1_tokenizer.train", "--config=fashion/vqvae", "--tokenizer.net.widths=[8, 8]", "--tokenizer.net.blocks=[0, 0]",
    "--tokenizer.net.encoder_blocks=[0, 0]", "--tokenizer.quantizer.codes=16", "--init_samples=64", "--log.pictures_every=0",
    "--log.validate_every=0", "--device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARMUP", 1)
    monkeypatch.setattr(module, "REPEATS", 3)


def test_a_step_takes_part_of_the_time_and_the_process_leaves_nothing() -> None:
    begin = time.perf_counter()
    with Stepper(TRAINING) as stepper:
        steps, folder = [stepper.step() for _ in range(4)], Path(stepper._folder.name)
        assert folder.is_dir()
    assert 0 < sum(steps) < time.perf_counter() - begin
    assert not folder.exists() and stepper._process.poll() is not None


def test_trainings_are_compared_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes ten times slower between two pairs of steps changes nothing."""
    clock = iter([1.0, 2.0, 10.0, 20.0, 30.0, 20.0])  # this, other, this, other, ...

    class Clock(Stepper):
        def __init__(self, training: Sequence[str]) -> None: ...
        def __enter__(self) -> Stepper:
            return self

        def __exit__(self, *error: object) -> None: ...
        def step(self) -> float:
            return next(clock)

    monkeypatch.setattr(module, "Stepper", Clock)
    assert ratio([], []) == 0.5


def test_a_training_that_fails_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pace([*TRAINING, "--tokenizer.quantizer.codes=-3"])
    assert stop.value.code == 2 and "codes -3" in capsys.readouterr().err
