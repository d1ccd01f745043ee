"""The state of inference: what is set, and that all of it is as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from intarsia.inference import exact_arithmetic, inference
from stage1_tokenizer.quantizers.search import nearest
from tests import tiny_pipelines as tiny

UNITS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]


def settings() -> tuple[object, ...]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, *(unit.fp32_precision for unit in UNITS)


@pytest.fixture
def shortened() -> Iterator[None]:
    """A program that lets products of float32 be computed in less, as the scripts of many trainers do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fails", [False, True])
def test_arithmetic_is_in_whole_float32_on_cuda_by_deterministic_kernels_and_then_as_before(shortened: None, fails: bool) -> None:
    before = settings()
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext(), exact_arithmetic("cuda"):
            assert settings() == (False, True, *["ieee"] * len(UNITS)) and torch.backends.cudnn.enabled
            if fails:
                raise RuntimeError
        assert settings() == (True, *before[1:])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.backends.cudnn.benchmark = before[0]
    with exact_arithmetic("cpu"):
        assert settings() == (*before[:2], *["ieee"] * len(UNITS))


def test_a_module_is_in_eval_mode_without_autocast_and_then_as_before() -> None:
    module = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with inference(module):
            assert not module.training and module(torch.zeros(1, 3)).dtype == torch.float32
        assert module.training and module(torch.zeros(1, 3)).dtype == torch.bfloat16


def test_what_a_program_allows_products_changes_neither_codes_nor_likelihoods(shortened: None) -> None:
    """Has teeth on a processor that computes in bfloat16: there the plain product differs, and so did codes."""
    pipeline, x = tiny.pipeline("pixelcnn", micro_batch=4), torch.rand(4, 1, 8, 8)
    rows, table = torch.randn(4096, 64), torch.randn(1024, 64)
    loose = pipeline.encode(x), pipeline.nll(x), nearest(rows, table)
    torch.set_float32_matmul_precision("highest")
    strict = pipeline.encode(x), pipeline.nll(x), nearest(rows, table)
    assert torch.equal(loose[0][0], strict[0][0]) and torch.equal(loose[1], strict[1]) and torch.equal(loose[2], strict[2])


def test_codes_signals_likelihoods_and_samples_are_computed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("intarsia.inference.exact_arithmetic", lambda device: seen.append(device) or exact_arithmetic(device))
    pipeline = tiny.pipeline("pixelcnn", micro_batch=4)
    for call in (pipeline.reconstruct, pipeline.nll, lambda x: pipeline.sample(2, seed=0)):
        seen.clear()
        call(torch.rand(2, 1, 8, 8))  # type: ignore[operator]
        assert len(seen) >= 2 and set(seen) == {"cpu"}
