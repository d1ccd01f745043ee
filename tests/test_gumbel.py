"""Gumbel-Softmax: draws by the right law, the temperature by the step, codes that stand for z outside the relaxation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.gumbel import Gumbel, GumbelConfig, gumbel_noise

F64 = torch.float64


def step_rng(step: int, n: int, start: int = 0) -> StepRng:
    return StepRng(seed=0, step=step, index=torch.arange(start, start + n))


def built(**changes: object) -> Gumbel:
    torch.manual_seed(0)
    q = QUANTIZERS.build(GumbelConfig.from_dict({"codes": 8, "dim": 4, "scale": 1.5, **changes}))
    assert isinstance(q, Gumbel)
    q.initialize(torch.randn(200, 4), step_rng(0, 1))
    return q


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("hard, training", [(True, True), (True, False), (False, False)])
def test_decoding_the_codes_gives_exactly_the_returned_latents(grid: tuple[int, ...], hard: bool, training: bool) -> None:
    q = built(hard=hard).train(training)
    out = q(torch.randn(3, 4, *grid), step_rng(0, 3))
    assert out.z.shape == (3, 4, *grid) and out.codes[0].shape == (3, *grid)
    assert torch.equal(q.decode(out.codes), out.z)


def test_a_soft_latent_in_training_is_a_mixture_and_says_so() -> None:
    q = built(hard=False)
    out = q(torch.randn(3, 4, 5), step_rng(0, 3))
    assert q.soft and not built().soft
    assert not torch.allclose(q.decode(out.codes), out.z, atol=1e-3)


@pytest.mark.parametrize("logits", ["distance", "linear"])
def test_afterwards_the_likeliest_code_is_chosen(logits: str) -> None:
    q = built(logits=logits).eval()
    z = torch.randn(3, 4, 50)
    rows = z.movedim(1, -1).reshape(-1, 4)
    expected = torch.cdist(rows, q.codebook).argmin(1)
    assert torch.equal(q(z).codes[0].flatten(), expected), "a linear head starts as the distance"
    if q.head is not None:
        with torch.no_grad():
            q.head.weight.normal_()
        assert torch.equal(q(z).codes[0].flatten(), q.head(rows).argmax(1))


def test_far_from_the_origin_the_nearest_code_is_chosen_and_the_divergence_is_that_of_the_distances() -> None:
    z = 100 + 0.1 * torch.randn(32, 32, 16)
    rows = z.movedim(1, -1).reshape(-1, 32)
    q = QUANTIZERS.build(GumbelConfig(codes=64, dim=32))
    q.initialize(rows, step_rng(0, 1))
    distance = torch.cdist(rows.double(), q.codebook.detach().double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert torch.equal(q.eval()(z).codes[0].flatten(), distance.argmin(1))
    log_p = torch.log_softmax(-16 * distance, 1)
    assert q(z).stats["kl"].item() == pytest.approx(((log_p.exp() * log_p).sum(1).mean() + math.log(64)).item(), rel=1e-4)


def test_codes_are_drawn_by_the_softmax_of_the_logits() -> None:
    """Gumbel-max: chi-square over 40,000 draws at one latent; 7 degrees of freedom, 0.1 % at 24.3."""
    q = built(kl=0.0)
    z = torch.randn(1, 4, 1).expand(40, 4, 1000)
    p = torch.softmax(-1.5 * torch.cdist(z[:1, :, 0], q.codebook).square(), 1)[0].double()
    counts = torch.bincount(q(z, step_rng(0, 40)).codes[0].flatten(), minlength=8).double()
    assert ((counts - 40000 * p) ** 2 / (40000 * p)).sum() < 24.3


@pytest.mark.parametrize("logits", ["distance", "linear"])
@pytest.mark.parametrize("hard", [True, False])
def test_the_gradients_are_those_of_the_relaxation(hard: bool, logits: str) -> None:
    q = built(hard=hard, logits=logits, temperature=0.7, kl=0.3).double()
    z, weight = torch.randn(2, 4, 3, dtype=F64, requires_grad=True), torch.randn(2, 3, 4, dtype=F64)
    rng = step_rng(0, 2)
    out = q(z, rng)
    rows = z.movedim(1, -1)
    raw = q.head(rows) if q.head is not None else -1.5 * (rows[:, :, None] - q.codebook).square().sum(-1)
    y = torch.softmax((raw + gumbel_noise(rng, 3, 8, z)) / 0.7, -1)
    if hard:
        y = F.one_hot(y.argmax(-1), 8) + y - y.detach()
    log_q = torch.log_softmax(raw, -1)
    loss = 0.3 * (log_q.exp() * (log_q + math.log(8))).sum(-1).mean()
    expected = y @ q.codebook
    torch.testing.assert_close(out.z.movedim(1, -1), expected)
    torch.testing.assert_close(out.loss, loss)
    inputs = [z, *q.parameters()]
    found = torch.autograd.grad((out.z.movedim(1, -1) * weight).sum() + out.loss, inputs)
    wanted = torch.autograd.grad((expected * weight).sum() + loss, inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_temperature_falls_by_a_constant_factor_and_stays() -> None:
    q = built(temperature=1.0, temperature_end=0.25, temperature_steps=10)
    taus = [q.temperature(step) for step in (0, 5, 10, 1000)]
    assert taus == pytest.approx([1.0, 0.5, 0.25, 0.25])
    assert q(torch.randn(2, 4, 3), step_rng(5, 2)).stats["temperature"] == pytest.approx(0.5)


def test_the_divergence_is_zero_for_equal_logits_and_log_k_for_certain_ones() -> None:
    q = built(logits="linear", kl=1.0)
    assert q.head is not None
    with torch.no_grad():
        q.head.weight.zero_()
        q.head.bias.zero_()
        assert q(torch.randn(2, 4, 3), step_rng(0, 2)).loss.abs() < 1e-6
        q.head.bias[3] = 1000.0
        assert q(torch.randn(2, 4, 3), step_rng(0, 2)).loss == pytest.approx(math.log(8))


def test_a_sample_is_drawn_alike_in_any_batch_and_otherwise_in_another_step() -> None:
    q, z = built(), torch.randn(12, 4, 5)
    whole = q(z, step_rng(3, 12)).codes[0]
    assert torch.equal(q(z[4:9], step_rng(3, 5, 4)).codes[0], whole[4:9])
    assert not torch.equal(q(z, step_rng(4, 12)).codes[0], whole)


def test_noise_made_in_parts_is_the_noise_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gumbel_noise(step_rng(0, 9), 5, 7, torch.zeros(()))
    assert torch.equal(whole, step_rng(0, 9).gumbel("gumbel", 5, 7))
    monkeypatch.setattr("stage1_tokenizer.quantizers.gumbel._NOISE_CELLS", 80)
    assert torch.equal(gumbel_noise(step_rng(0, 9), 5, 7, torch.zeros(())), whole)


def test_accumulation_equals_the_big_batch() -> None:
    q, z = built().double(), torch.randn(12, 4, 5, dtype=F64)
    out = q(z, step_rng(3, 12))
    grads = torch.autograd.grad(out.loss + out.z.square().sum() / 12, list(q.parameters()))
    whole = q.update(step_rng(3, 0), comm)
    total = [torch.zeros_like(g) for g in grads]
    for rows in (slice(0, 5), slice(5, 12)):
        share = (rows.stop - rows.start) / 12
        out = q(z[rows], step_rng(3, rows.stop - rows.start, rows.start))
        parts = torch.autograd.grad(out.loss * share + out.z.square().sum() / 12, list(q.parameters()))
        total = [a + b for a, b in zip(total, parts, strict=True)]
    for a, b in zip(total, grads, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(whole[name], value) for name, value in q.update(step_rng(3, 0), comm).items())


def test_inactive_samples_do_not_count_and_a_nan_leaves_the_statistics() -> None:
    q, z = built(kl=1.0), torch.randn(4, 4, 5)
    active = torch.tensor([True, True, False, False])
    torch.testing.assert_close(q(z, step_rng(0, 4), active).loss, q(z[:2], step_rng(0, 2)).loss / 2)
    assert q._pending["counts"].sum() == 20
    z[3, 1, 2] = float("inf")
    q(z, step_rng(0, 4))
    assert q._pending["counts"].sum() == 20 and not q.finite()
    with pytest.raises(ValueError, match="row 3"):
        q.eval()(z)


def test_initialising_twice_changes_nothing_and_training_needs_random_numbers() -> None:
    q = built(logits="linear")
    before = {name: t.clone() for name, t in q.state_dict().items()}
    q.initialize(torch.randn(50, 4), step_rng(1, 1))
    assert all(torch.equal(before[name], t) for name, t in q.state_dict().items())
    with pytest.raises(ValueError, match="StepRng"):
        q(torch.randn(2, 4, 3))


def test_training_uses_the_codes_and_lowers_the_error() -> None:
    q = built(codes=16, temperature_steps=150)
    latents = torch.nn.Parameter(torch.randn(32, 4, 16))
    target = torch.randn(32, 4, 16)
    optimizer = torch.optim.Adam([latents, *q.parameters()], 0.03)
    errors = []
    for step in range(200):
        optimizer.zero_grad()
        out = q(latents, step_rng(step, 32))
        error = F.mse_loss(out.z, target)
        (error + out.loss).backward()
        optimizer.step()
        stats = q.update(step_rng(step, 0), comm)
        errors.append(error.item())
    assert stats["batch_usage"] > 0.7 and sum(errors[-10:]) < 0.5 * sum(errors[:10])


@pytest.mark.parametrize(
    "change", [{"codes": 0}, {"temperature": 0.0}, {"temperature_end": -1.0}, {"temperature_steps": 0}, {"kl": -1.0}, {"logits": "cosine"}]
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        GumbelConfig.from_dict(change)


@pytest.mark.parametrize("hard", [True, False])
def test_where_nothing_learns_the_codes_are_those_of_eval_mode(hard: bool) -> None:
    q = built(hard=hard).requires_grad_(False).train()
    z = torch.randn(5, 4, 3, 3)
    drawn = q(z.clone().requires_grad_(), step_rng(0, 5)).codes[0]
    out = q(z, step_rng(0, 5))
    expected = q.eval()(z)
    assert torch.equal(out.codes[0], expected.codes[0]) and torch.equal(out.z, expected.z) and not torch.equal(drawn, out.codes[0])
