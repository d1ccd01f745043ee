"""On a card: the same training as on the processor, the same promises, and no waiting inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import SignalSpec
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAE
from tests.tiny_priors import CASES, Case
from tests.training import TOKENIZER, Left, bars, run_training, tiny

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SIGNAL = SignalSpec("image", 1, (8, 8))
CONDITIONAL = [case for case in CASES if case.classes]


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    """A run asks torch for deterministic operations; the next test begins without."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the card."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def tokenizer(**quantizer: object) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TOKENIZER.replace(quantizer=TOKENIZER.quantizer.replace(**quantizer)), SIGNAL).to(DEVICE)


def signals(n: int, start: int = 0) -> torch.Tensor:
    return (bars(n, start).float() / 127.5 - 1).to(DEVICE)


def test_training_in_float64_follows_the_processor(tmp_path: Path) -> None:
    for device in ("cpu", DEVICE):
        run_training(tiny(tmp_path / device, steps=10, precision="fp64", device=device))
    assert Left.of(tmp_path / "cpu").distance(Left.of(tmp_path / DEVICE)) < 1e-9


def test_the_same_command_gives_the_same_bits_and_resumes_to_them(tmp_path: Path) -> None:
    for name, stops in (("one", [10]), ("two", [10]), ("cut", [5, 10])):
        for stop in stops:
            run_training(tiny(tmp_path / name, steps=10, device=DEVICE, log={"every": 5}), max_steps=stop)
    whole = Left.of(tmp_path / "one")
    assert whole.differences(Left.of(tmp_path / "two")) == [] and whole.differences(Left.of(tmp_path / "cut")) == []


@pytest.mark.parametrize("quantizer", [{}, {"update": "gradient"}, {"cosine": True}], ids=["ema", "gradient", "cosine"])
def test_a_training_step_of_a_tokenizer_does_not_wait_for_the_card(quantizer: dict[str, object]) -> None:
    model = tokenizer(**quantizer)
    x, index = signals(8), torch.arange(8, device=DEVICE)
    model.initialize([signals(32, 100)], StepRng(0, 0, torch.arange(32, device=DEVICE)), comm)
    model.train()
    for step in range(3):
        with no_waiting() if step else warnings.catch_warnings():  # the first step allocates and picks kernels
            rng = StepRng(0, step, index)
            out = model(x, rng=rng)
            ((out.x - x).square().mean() + out.loss).backward()
            model.finite()
            model.update(rng, comm)


@pytest.mark.parametrize("case", CONDITIONAL, ids=str)
def test_a_training_step_of_a_prior_does_not_wait_for_the_card(case: Case) -> None:
    prior = case.build().to(DEVICE).train()
    codes, cond = [c.to(DEVICE) for c in case.codes(8)], case.cond(8)
    assert cond is not None
    cond = cond.to(DEVICE)
    for step in range(3):
        with no_waiting() if step else warnings.catch_warnings():
            loss, _ = prior(codes, cond, StepRng(0, step, torch.arange(8, device=DEVICE)))
            loss.backward()


def test_codes_do_not_depend_on_the_batch_and_decode_to_what_training_saw() -> None:
    model = tokenizer().eval()
    x = signals(37)
    (whole,) = model.encode(x)
    for rows in ([0], [36], list(range(20, 3, -1))):
        assert torch.equal(model.encode(x[rows])[0], whole[rows])
    assert torch.equal(model.decode([whole])[5:9], model.decode([whole[5:9]]))
    again = tokenizer().eval()
    assert torch.equal(again.encode(x)[0], whole)


@pytest.mark.parametrize("case", CONDITIONAL, ids=str)
def test_f4_a_sample_does_not_depend_on_the_others(case: Case) -> None:
    prior = case.build().to(DEVICE)
    upper = tuple(c.to(DEVICE) for c in case.codes(24)[: prior.levels.start])
    cond, ids = case.cond(24), torch.arange(24, device=DEVICE)
    assert cond is not None

    def draw(rows: torch.Tensor) -> list[torch.Tensor]:
        return prior.sample(ids[rows], upper=tuple(u[rows] for u in upper), cond=cond.to(DEVICE)[rows], seed=3, micro_batch=8)

    whole = draw(ids)
    for rows in (ids[:1], ids[5:18], ids.flip(0)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(draw(rows), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f2_half_precision_latents_get_the_codes_of_their_float32_copy(dtype: torch.dtype) -> None:
    from stage1_tokenizer.quantizers.vq import VQ

    torch.manual_seed(0)
    vq = VQ(VQConfig(codes=64, dim=8, init="normal")).to(DEVICE).eval()
    z = torch.randn(4, 8, 5, 5, device=DEVICE).to(dtype)
    with torch.autocast(DEVICE, dtype):
        half = vq(z)
    assert torch.equal(half.codes[0], vq(z.float()).codes[0]) and half.z.dtype == torch.float32
