"""The state of inference: what is set, and that all of it is as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.inference import exact_arithmetic, inference, module_device, module_dtype
from intarsia.rng import uniform
from intarsia.specs import SignalSpec
from pipelines import TwoStagePipeline
from stage1_tokenizer.quantizers.search import nearest
from stage2_prior.priors.base import Prior
from stage2_prior.priors.maskgit import MaskGITConfig
from stage2_prior.sampling import DrawOptions
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture

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


class Fixed(Prior):
    """Draws uniform codes; it has no parameters, and may have a buffer."""

    type_name = "fixed"
    Options = DrawOptions

    def _sample(self, ids: Tensor, upper: Any, label: Any, seed: int, known: Any, options: Any) -> list[Tensor]:
        draws = [uniform(seed, "fixed", ids[:, None], i, torch.arange(level.positions)[None]) for i, level in enumerate(self.own)]
        return [(u * level.vocab).long().view(-1, *level.shape) for u, level in zip(draws, self.own, strict=True)]


def test_parts_without_parameters_are_where_and_what_their_buffers_are_and_else_on_the_cpu_in_float32() -> None:
    tokenizer = tiny.Tokens(tiny.TokensConfig(), SignalSpec("image", 1, (8, 8)))
    prior = Fixed(MaskGITConfig(), tiny.codes_spec(tokenizer))
    for bare in (nn.Identity(), prior):
        assert (module_device(bare), module_dtype(bare)) == (torch.device("cpu"), torch.float32)
    x = TwoStagePipeline(tokenizer, [prior]).sample(3, label="bag", seed=0)
    assert x.shape == (3, 1, 8, 8)
    prior.register_buffer("count", torch.zeros((), dtype=torch.int64, device="meta"))
    prior.register_buffer("one", torch.ones((), dtype=torch.float64, device="meta"))
    assert (prior.device, prior.dtype) == (torch.device("meta"), torch.float64)
    assert (tokenizer.device, tokenizer.double().dtype) == (torch.device("cpu"), torch.float64)
    mixed = nn.Linear(2, 2).to(torch.float64)
    mixed.register_buffer("one", torch.ones((), device="meta"))
    assert (module_device(mixed), module_dtype(mixed)) == (torch.device("cpu"), torch.float64)  # parameters come first
