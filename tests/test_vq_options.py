"""What VQ can do beside the paper: the rotation trick, the entropy bonus, warm-up, growth, inactive samples, no waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.assign import assign, rotated_back
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantizer, QuantizerConfig
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.entropy import mean_entropy
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.growth import codes_at
from stage1_tokenizer.quantizers.gumbel import Gumbel, GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.simvq import SimVQ, SimVQConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig

F64 = torch.float64


def step_rng(step: int, n: int, start: int = 0) -> StepRng:
    return StepRng(seed=0, step=step, index=torch.arange(start, start + n))


# The rotation trick --------------------------------------------------------------------------------------------------
def rotation(z: Tensor, e: Tensor) -> Tensor:
    """lambda R by elementary means: the rotation of the plane of z and e by the angle between them, the identity on the rest."""
    u, v = z / z.norm(), e / e.norm()
    cosine = u @ v
    w = v - cosine * u
    sine = w.norm()
    w = w / sine
    plane = torch.stack([u, w], 1)
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return (torch.eye(len(z), dtype=F64) - plane @ plane.T + plane @ turn @ plane.T) * (e.norm() / z.norm())


def test_the_rotation_takes_the_latent_to_its_code_and_the_gradient_back() -> None:
    torch.manual_seed(0)
    z, e, grad = torch.randn(20, 5, dtype=F64), torch.randn(20, 5, dtype=F64), torch.randn(20, 5, dtype=F64)
    back = rotated_back(grad, z, e)
    for i in range(20):
        matrix = rotation(z[i], e[i])
        torch.testing.assert_close(matrix @ z[i], e[i])
        jacobian = torch.autograd.functional.jacobian(lambda x, m=matrix: m @ x, z[i])
        torch.testing.assert_close(back[i], jacobian.T @ grad[i])


def test_where_no_rotation_is_defined_the_gradient_passes_as_it_is() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    e = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-2.0, -4.0]])
    grad = torch.randn(3, 2)
    assert torch.equal(rotated_back(grad, z, e), grad)
    same = torch.randn(4, 3)
    torch.testing.assert_close(rotated_back(same, same, same), same)


@pytest.mark.parametrize("config", [VQConfig(codes=16, dim=4, cosine=True, init="normal"), BSQConfig(bits=4)])
def test_a_latent_of_length_0_has_no_gradient_and_leaves_that_of_the_others(config: QuantizerConfig) -> None:
    q, z = QUANTIZERS.build(config).train(), torch.randn(2, 4, 3)
    z[0, :, 1] = 0
    z = z.requires_grad_()
    out = q(z, step_rng(0, 2))
    ((out.z * torch.arange(1.0, 5)[:, None]).sum() + out.loss).backward()
    assert not z.grad[0, :, 1].any() and 0.01 < z.grad.norm() < 1e3 and (z.grad != 0).any(1).sum() == 5


def test_vq_turns_the_gradient_of_each_position() -> None:
    torch.manual_seed(0)
    q = VQ(VQConfig(codes=16, dim=4, init="normal", estimator="rotation", restart=0.0, beta=0.0))
    z, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    out = q(z, step_rng(0, 2))
    (grad,) = torch.autograd.grad((out.z * weight).sum(), z)
    for b in range(2):
        for p in range(3):
            matrix = rotation(z[b, :, p].detach().double(), out.z[b, :, p].detach().double())
            torch.testing.assert_close(grad[b, :, p].double(), matrix.T @ weight[b, :, p].double(), rtol=1e-4, atol=1e-5)
    assert not q.straight_through


# Gradients of the one function ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("some", [True, False])
def test_the_fused_function_has_the_gradients_of_its_parts(learns: bool, some: bool) -> None:
    torch.manual_seed(0)
    rows, vectors = torch.randn(12, 3, dtype=F64, requires_grad=True), torch.randn(5, 3, dtype=F64, requires_grad=learns)
    codes, weight = torch.randint(5, (12,)), torch.randn(12, 3, dtype=F64)
    active = torch.tensor([True, False, True]) if some else None
    z_q, loss, error = assign(rows, vectors, codes, 3, 0.3, learns, active)
    keep = torch.ones(12, 1, dtype=F64) if active is None else active.to(F64).repeat_interleave(4)[:, None]
    chosen = vectors[codes]
    expected = 0.3 * ((rows - chosen.detach()).square() * keep).mean()
    if learns:
        expected = expected + ((chosen - rows.detach()).square() * keep).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(error, F.mse_loss(rows, chosen).detach())
    assert torch.equal(z_q, chosen) and not error.requires_grad
    inputs = [rows, vectors] if learns else [rows]
    found = torch.autograd.grad((z_q * weight).sum() + 7 * loss, inputs)
    wanted = torch.autograd.grad((rows * weight).sum() + 7 * expected, inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grow", [(), (99,)])
@pytest.mark.parametrize(
    "config",
    [
        VQConfig(codes=16, dim=4, init="normal", update="gradient"),
        VQConfig(codes=16, dim=4, init="normal", update="gradient", cosine=True),
        VQConfig(codes=16, dim=4, init="normal"),
        SimVQConfig(codes=16, dim=4, init="identity"),
    ],
)
def test_the_loss_is_the_same_with_gradients_off_and_with_a_frozen_codebook(config: QuantizerConfig, grow: tuple[int, ...]) -> None:
    q, z = QUANTIZERS.build(config.replace(grow=grow) if isinstance(config, VQConfig) else config), torch.randn(3, 4, 5)
    with_gradients = q(z, step_rng(0, 3)).loss
    with torch.no_grad():
        assert torch.equal(q(z, step_rng(0, 3)).loss, with_gradients)
    q.requires_grad_(False)
    assert torch.equal(q(z, step_rng(0, 3)).loss, with_gradients)


# Samples that do not count -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_samples_that_are_not_active_change_neither_loss_nor_codebook_and_have_codes_all_the_same(update: str) -> None:
    config = VQConfig(codes=16, dim=4, init="normal", decay=0.5, restart=0.3, update=update, entropy={"weight": 0.1})
    active = torch.tensor([True, False, True, True, False, False])
    torch.manual_seed(0)
    whole = VQ(config).double()
    part = VQ(config).double()
    part.load_state_dict(whole.state_dict())
    z = torch.randn(6, 4, 5, dtype=F64, requires_grad=True)
    out = whole(z, step_rng(0, 6), active)
    few = part(z[active], StepRng(0, 0, torch.arange(6)[active]))
    torch.testing.assert_close(out.loss, few.loss * 3 / 6)
    assert torch.equal(out.codes[0][active], few.codes[0])
    assert torch.equal(whole.decode(out.codes), out.z)
    (grad,) = torch.autograd.grad(out.loss, z)
    assert torch.equal(grad.abs().amax((1, 2)) > 0, active)
    for q in (whole, part):
        q.update(step_rng(0, 0), comm)
    for name, t in whole.state_dict().items():
        torch.testing.assert_close(t, part.state_dict()[name])


def test_a_step_without_active_samples_restarts_nothing() -> None:
    q = VQ(VQConfig(codes=16, dim=4, init="normal", restart=0.5, decay=0.1))
    out = q(torch.randn(3, 4, 5), step_rng(0, 3), torch.zeros(3, dtype=torch.bool))
    assert out.loss == 0 and q.update(step_rng(0, 0), comm)["restarts"] == 0


# Entropy ------------------------------------------------------------------------------------------------------------
def soft(rows: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    return torch.softmax(-torch.cdist(rows, vectors).square() / temperature, 1)


def test_the_entropy_term_has_the_value_and_the_gradient_of_the_entropy_of_the_mean_assignment() -> None:
    """Where the running mean is the batch's own."""
    torch.manual_seed(0)
    rows, vectors = torch.randn(40, 3, dtype=F64, requires_grad=True), torch.randn(7, 3, dtype=F64, requires_grad=True)
    mean = soft(rows, vectors, 0.8).mean(0)
    exact = (mean * mean.log()).sum()
    term = mean_entropy(rows, vectors, mean.detach(), 0.8, 4)
    torch.testing.assert_close(term, exact)
    for a, b in zip(torch.autograd.grad(3 * term, [rows, vectors]), torch.autograd.grad(3 * exact, [rows, vectors]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_entropy_term_is_linear_in_the_batch_and_obeys_costs_and_inactive_samples() -> None:
    torch.manual_seed(0)
    rows, vectors, share = torch.randn(40, 3, dtype=F64), torch.randn(300, 3, dtype=F64), torch.rand(300, dtype=F64)
    share, cost = share / share.sum(), torch.where(torch.arange(300) < 200, 0.5, float("inf")).double()
    whole = mean_entropy(rows, vectors, share, 1.0, 4, cost)
    parts = [mean_entropy(rows[i : i + 10], vectors, share, 1.0, 1, cost) for i in range(0, 40, 10)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    dense = torch.softmax(-torch.cdist(rows, vectors).square() - cost, 1) @ share.log()
    torch.testing.assert_close(whole, dense.mean())
    active = torch.tensor([True, False, True, True])
    torch.testing.assert_close(mean_entropy(rows, vectors, share, 1.0, 4, cost, active), (dense.view(4, 10).mean(1) * active).mean())


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("offset", [10.0, 300.0])
def test_the_entropy_term_has_its_gradients_far_from_the_origin_too(offset: float, unused: bool) -> None:
    """Codes that are not in use yet lie where they were drawn."""
    draw = torch.Generator().manual_seed(0)
    rows, vectors = (0.1 * torch.randn(n, 32, generator=draw) + offset for n in (256, 64))
    share, cost = torch.softmax(torch.randn(64, generator=draw), 0), torch.zeros(64)
    if unused:
        vectors[32:], cost[32:] = 0.1 * torch.randn(32, 32, generator=draw), float("inf")

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (rows, vectors)]
        return torch.autograd.grad(mean_entropy(inputs[0], inputs[1], share.to(dtype), 0.01, 8, cost.to(dtype)), inputs)

    for found, exact in zip(gradients(torch.float32), gradients(F64), strict=True):
        assert (found - exact).norm() < 1e-3 * exact.norm()


def test_the_entropy_bonus_makes_latents_spread_over_the_codes() -> None:
    spread = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        q = VQ(VQConfig(codes=8, dim=2, init="normal", restart=0.0, beta=0.0, decay=0.8, entropy={"weight": weight}))
        z = (0.1 * torch.randn(16, 2, 8) + 0.5).requires_grad_()
        optimizer = torch.optim.Adam([z], 0.03)
        for step in range(60):
            optimizer.zero_grad()
            out = q(z, step_rng(step, 16))
            out.loss.backward()
            optimizer.step()
            stats = q.update(step_rng(step, 0), comm)
        spread[weight] = stats["perplexity"].item()
    assert spread[3.0] > 1.5 * spread[0.0]


# Schedules ----------------------------------------------------------------------------------------------------------
def test_beta_rises_with_the_step_and_is_whole_in_eval_mode() -> None:
    q = VQ(VQConfig(codes=8, dim=4, beta=0.4, beta_warmup=10, init="normal", restart=0.0))
    z = torch.randn(2, 4, 3)
    error = q(z, step_rng(0, 2)).stats["quantization_error"]
    for step, beta in [(0, 0.0), (5, 0.2), (10, 0.4), (99, 0.4)]:
        torch.testing.assert_close(q(z, step_rng(step, 2)).loss, beta * error)
    with pytest.raises(ValueError, match="beta_warmup"):
        q(z)
    torch.testing.assert_close(q.eval()(z).loss, 0.4 * error)


def test_the_codes_in_use_double_at_the_given_steps_up_to_all() -> None:
    assert [codes_at(step, 512, (3, 5)) for step in range(7)] == [128, 128, 128, 256, 256, 512, 512]
    assert codes_at(0, 5, (1, 2)) == 2 and codes_at(2, 5, (1, 2)) == 5


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_growing_codebook_uses_only_its_codes_and_all_at_last(update: str, cosine: bool) -> None:
    torch.manual_seed(0)
    q = VQ(VQConfig(codes=30, dim=4, update=update, cosine=cosine, grow=(5, 10), restart=0.2, decay=0.5))
    q.initialize(torch.randn(400, 4), step_rng(0, 0))
    seen = []
    for step in range(40):
        out = q(torch.randn(16, 4, 20), step_rng(step, 16, step * 16))
        used = codes_at(step, 30, (5, 10))
        assert out.codes[0].max() < used
        stats = q.update(step_rng(step, 0), comm)
        assert torch.isfinite(q.codebook).all() and q.counts[int(q.used) :].sum() == 0
        seen.append(int(stats["codes_in_use"]))
    assert seen == [codes_at(step + 1, 30, (5, 10)) for step in range(40)]
    assert out.codes[0].unique().numel() == 30
    assert q.codebook.unique(dim=0).shape[0] == 30
    assert "used" in q.code_tensors() and q.level_specs("codes", (20,))[0].vocab == 30
    if update == "ema":
        norms = q.codebook.norm(dim=1)
        assert not cosine or torch.allclose(norms, torch.ones(30))


def test_a_split_shares_the_count_and_puts_the_new_code_beside_its_parent() -> None:
    torch.manual_seed(0)
    q = VQ(VQConfig(codes=8, dim=4, init="normal", grow=(1,), restart=0.0, decay=0.5))
    q(torch.randn(4, 4, 5), step_rng(0, 4))
    twin = VQ(q.config.replace(codes=4, grow=()))
    with torch.no_grad():
        twin.codebook.copy_(q.codebook[:4])
        twin.sums.copy_(q.sums[:4])
    kept = {"counts": range(4), "sums": (0, 1, 2, 3, 8)}  # the last row of sums stays 0
    twin._pending = {name: t[list(kept[name])] if name in kept else t for name, t in q._pending.items()}
    for each in (q, twin):
        each.update(step_rng(0, 0), comm)
    torch.testing.assert_close(q.codebook[:4], twin.codebook, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.counts[:4] + q.counts[4:], twin.counts)
    size = twin.codebook.square().mean().sqrt()
    apart = (q.codebook[4:] - q.codebook[:4]).norm(dim=1)
    assert torch.all(apart > 0) and torch.all(apart < 0.06 * size)
    torch.testing.assert_close(q.sums, q.codebook * q.counts[:, None])


def test_codes_that_are_not_yet_in_use_do_not_lower_the_mean_that_restarts_go_by() -> None:
    q = VQ(VQConfig(codes=8, dim=4, init="normal", grow=(99,), restart=0.5, decay=0.0))
    with torch.no_grad():
        q.codebook[:4] = 10 * torch.eye(4)
    z = 10 * torch.eye(4).repeat_interleave(torch.tensor([16, 16, 16, 6]), 0)  # a mean of 13.5 for the four in use
    q(z[..., None], step_rng(0, 54))
    assert q.update(step_rng(0, 0), comm)["restarts"] == 1


def test_training_a_grown_codebook_on_keeps_all_its_codes() -> None:
    """As fine-tuning does: a release with all codes in use, and steps that count from 0 again."""
    q = VQ(VQConfig(codes=8, dim=4, init="normal", grow=(2, 4), restart=0.0, decay=0.999))
    q.used.fill_(8)
    q.counts.fill_(1)
    q.sums.copy_(q.codebook)
    before = q.codebook.clone()
    for step in range(6):
        rng = StepRng(0, step, torch.arange(4))
        q.train()(torch.randn(4, 4, 3), rng)
        q.update(rng, comm)
        assert q.used == 8 and torch.allclose(q.codebook, before, atol=0.2)


def test_growth_that_a_skipped_step_missed_is_made_up_for_and_then_changes_nothing() -> None:
    q = VQ(VQConfig(codes=8, dim=4, init="normal", grow=(2, 4), restart=0.0))
    q(torch.randn(4, 4, 5), step_rng(7, 4))
    q.update(step_rng(7, 0), comm)
    assert int(q.used) == 8 and q.codebook.unique(dim=0).shape[0] == 8
    restored = VQ(q.config)
    restored.load_state_dict(q.state_dict())
    for each in (q, restored):
        torch.manual_seed(1)
        each(torch.randn(4, 4, 5), step_rng(8, 4))
        each.update(step_rng(8, 0), comm)
    assert all(torch.equal(t, restored.state_dict()[name]) for name, t in q.state_dict().items())


def test_nothing_is_drawn_in_steps_in_which_nothing_can_grow_and_a_loaded_codebook_is_looked_at_once(monkeypatch) -> None:
    drawn: list[int] = []
    real = StepRng.normal
    monkeypatch.setattr(StepRng, "normal", lambda self, *args: drawn.append(self.step) or real(self, *args))
    config = VQConfig(codes=8, dim=4, init="normal", grow=(2, 4), restart=0.0)

    def steps(q: VQ, numbers: list[int]) -> list[int]:
        drawn.clear()
        for step in numbers:
            q(torch.randn(4, 4, 5), step_rng(step, 4))
            q.update(step_rng(step, 0), comm)
        return list(drawn)

    q = VQ(config)
    young = {name: t.clone() for name, t in q.state_dict().items()}
    assert steps(q, [0, 1, 2, 3, 4, 5, 6]) == [1, 3] and int(q.used) == 8
    q = VQ(config)
    assert steps(q, [0, 2, 5]) == [2, 5] and int(q.used) == 8, "skipped steps are made up for"
    loaded = VQ(config)
    loaded.load_state_dict(q.state_dict())
    assert steps(loaded, [6, 7]) == [6] and int(loaded.used) == 8
    q.load_state_dict(young)
    assert int(q.used) == 2 and steps(q, [5, 6]) == [5] and int(q.used) == 8, "what is loaded may be younger"


# No waiting ---------------------------------------------------------------------------------------------------------
EVERYTHING = {"beta_warmup": 9, "estimator": "rotation", "entropy": {"weight": 0.1}, "grow": (2,), "rate": 0.1}
VQ4 = VQConfig(codes=300, dim=4)
KINDS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VQ(VQConfig(codes=300, dim=4)),
    "vq with all options": lambda: VQ(VQConfig.from_dict({"codes": 300, "dim": 4, "cosine": True, **EVERYTHING})),
    "vq gradient": lambda: VQ(VQConfig.from_dict({"codes": 300, "dim": 4, "update": "gradient", **EVERYTHING})),
    "simvq": lambda: SimVQ(SimVQConfig(codes=300, dim=4)),
    "gumbel": lambda: Gumbel(GumbelConfig(codes=300, dim=4)),
    "gumbel soft": lambda: Gumbel(GumbelConfig(codes=300, dim=4, hard=False, logits="linear")),
    "fsq": lambda: QUANTIZERS.build(FSQConfig(levels=(8, 6, 5, 5))),
    "lfq": lambda: QUANTIZERS.build(LFQConfig(bits=4)),
    "bsq": lambda: QUANTIZERS.build(BSQConfig(bits=4)),
    "product": lambda: QUANTIZERS.build(ProductConfig(groups=2, inner=VQ4.replace(dim=2))),
    "residual with dropout": lambda: QUANTIZERS.build(ResidualConfig(stages=3, inner=VQ4, dropout=0.5)),
    "residual with depths": lambda: QUANTIZERS.build(ResidualConfig(stages=2, inner=VQ4, dropout=0.5, depth_weights=(1, 2), shared=True)),
}


def fake_step(make, device: str, wait: bool = False) -> None:
    """A training step on tensors without data, where asking for a value is an error; backward needs a real card's context."""
    with FakeTensorMode(), torch.device(device):
        quantizer: Quantizer = make().train()
        z = torch.randn(3, 4, 5, 5, requires_grad=True)
        out = quantizer(z, step_rng(3, 3), torch.ones(3, dtype=torch.bool))
        assert out.z.device == z.device and out.codes[0].dtype == torch.int64
        if device == "cpu":
            (out.z.sum() + out.loss).backward()
            assert z.grad is not None
        quantizer.finite()
        if wait:
            float(out.loss.detach())
        quantizer.update(step_rng(3, 3), comm)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_never_asks_the_device_for_a_value(kind: str, device: str) -> None:
    fake_step(KINDS[kind], device)


def test_a_step_that_does_ask_is_caught() -> None:
    with pytest.raises(RuntimeError, match="data-dependent|_local_scalar_dense"):
        fake_step(KINDS["vq"], "cpu", wait=True)
