"""The state of inference: what is set, and that all of it is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intarsia.inference import exact_convolutions, inference
from tests import tiny_pipelines as tiny

SETTINGS = ("benchmark", "deterministic", "allow_tf32")


def settings() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cudnn, name) for name in SETTINGS)


@pytest.mark.parametrize("fails", [False, True])
def test_on_cuda_convolutions_are_deterministic_and_in_whole_float32_and_then_as_before(fails: bool) -> None:
    before = settings()
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(RuntimeError) if fails else exact_convolutions("cpu"), exact_convolutions("cuda"):
            assert settings() == (False, True, False) and torch.backends.cudnn.enabled
            if fails:
                raise RuntimeError
        assert settings() == (True, *before[1:])
    finally:
        torch.backends.cudnn.benchmark = before[0]
    with exact_convolutions("cpu"):
        assert settings() == before


def test_a_module_is_in_eval_mode_without_autocast_and_then_as_before() -> None:
    module = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with inference(module):
            assert not module.training and module(torch.zeros(1, 3)).dtype == torch.float32
        assert module.training and module(torch.zeros(1, 3)).dtype == torch.bfloat16


def test_codes_signals_likelihoods_and_samples_are_computed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("intarsia.inference.exact_convolutions", lambda device: seen.append(device) or exact_convolutions(device))
    pipeline = tiny.pipeline("pixelcnn", micro_batch=4)
    for call in (pipeline.reconstruct, pipeline.nll, lambda x: pipeline.sample(2, seed=0)):
        seen.clear()
        call(torch.rand(2, 1, 8, 8))  # type: ignore[operator]
        assert len(seen) >= 2 and set(seen) == {"cpu"}
