"""Vector quantisation: the paper's gradients, moving averages, restarts, precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.entropy import EntropyConfig
from stage1_tokenizer.quantizers.restart import empty_slots, offer
from stage1_tokenizer.quantizers.search import kmeans
from stage1_tokenizer.quantizers.vq import VQ, VQConfig

VARIANTS = [
    VQConfig(codes=16, dim=4),
    VQConfig(codes=16, dim=4, update="gradient"),
    VQConfig(codes=16, dim=4, cosine=True),
    VQConfig(codes=16, dim=4, cosine=True, update="gradient"),
    VQConfig(codes=16, dim=4, init="normal", restart=0.0),
    VQConfig(codes=16, dim=4, estimator="rotation", grow=(4, 9), entropy=EntropyConfig(weight=0.1)),
]


def step_rng(step: int, n: int, start: int = 0) -> StepRng:
    return StepRng(seed=0, step=step, index=torch.arange(start, start + n))


def state(q: VQ) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in q.state_dict().items()}


@pytest.fixture(params=VARIANTS, ids=lambda c: f"{c.update}-{'cosine' if c.cosine else 'euclid'}-{c.init}-{c.estimator}")
def vq(request: pytest.FixtureRequest) -> Iterator[VQ]:
    torch.manual_seed(0)
    q = QUANTIZERS.build(request.param)
    assert isinstance(q, VQ)
    q.initialize(torch.randn(500, 4), step_rng(0, 500))
    yield q


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_decoding_the_codes_gives_exactly_the_returned_latents(vq: VQ, grid: tuple[int, ...], training: bool) -> None:
    vq.train(training)
    out = vq(torch.randn(3, 4, *grid), step_rng(0, 3))
    assert out.z.shape == (3, 4, *grid)
    assert out.codes[0].shape == (3, *grid) and out.codes[0].dtype == torch.int64
    assert torch.equal(vq.decode(out.codes), out.z)


def test_the_commitment_term_pulls_the_encoder_alone_by_beta() -> None:
    q = VQ(VQConfig(codes=8, dim=4, beta=0.7, init="normal"))
    z = torch.randn(2, 4, 3, requires_grad=True)
    out = q(z, step_rng(0, 2))
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grad, 0.7 * 2 * (z - out.z).detach() / z.numel())


def test_the_codebook_term_pulls_the_codebook_alone_by_one() -> None:
    q = VQ(VQConfig(codes=8, dim=4, beta=0.7, init="normal", update="gradient"))
    z = torch.randn(2, 4, 3, requires_grad=True)
    out = q(z, step_rng(0, 2))
    grad_z, grad_e = torch.autograd.grad(out.loss, [z, q.codebook])
    torch.testing.assert_close(grad_z, 0.7 * 2 * (z - out.z).detach() / z.numel())
    rows, codes = z.detach().movedim(1, -1).reshape(-1, 4), out.codes[0].flatten()
    expected = torch.zeros(8, 4).index_add_(0, codes, 2 * (q.codebook.detach()[codes] - rows) / z.numel())
    torch.testing.assert_close(grad_e, expected)


def test_the_gradient_passes_straight_through(vq: VQ) -> None:
    z = torch.randn(2, 4, 3, requires_grad=True)
    weight = torch.randn(2, 4, 3)
    (grad,) = torch.autograd.grad((vq(z, step_rng(0, 2)).z * weight).sum(), z)
    if vq.config.estimator == "rotation":
        assert not torch.equal(grad, weight)
    elif vq.config.cosine:  # through the normalisation of the latents
        (weight,) = torch.autograd.grad((F.normalize(z, dim=1) * weight).sum(), z)
        torch.testing.assert_close(grad, weight)
    else:
        assert torch.equal(grad, weight)


def test_moving_averages_follow_the_reference() -> None:
    q = VQ(VQConfig(codes=8, dim=4, init="normal", restart=0.0, decay=0.9))
    counts, sums, codebook = q.counts.double(), q.sums.double(), q.codebook.double()
    for step in range(20):
        z = torch.randn(5, 4, 6)
        codes = q(z, step_rng(step, 5)).codes[0].flatten()
        onehot = F.one_hot(codes, 8).double()
        rows = z.movedim(1, -1).reshape(-1, 4).double()
        counts = 0.9 * counts + 0.1 * onehot.sum(0)
        sums = 0.9 * sums + 0.1 * onehot.T @ rows
        codebook = sums / ((counts + 1e-5) / (counts.sum() + 8e-5) * counts.sum())[:, None]
        q.update(step_rng(step, 0), comm)
        torch.testing.assert_close(q.codebook.double(), codebook, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(q.counts.double(), counts, rtol=1e-5, atol=1e-6)


def test_forward_alone_changes_no_codebook(vq: VQ) -> None:
    before = state(vq)
    vq(torch.randn(4, 4, 5), step_rng(0, 4))
    vq.discard()
    vq.eval()
    vq(torch.randn(4, 4, 5))
    assert all(torch.equal(before[name], t) for name, t in vq.state_dict().items())


def test_accumulation_equals_the_big_batch(vq: VQ) -> None:
    vq = vq.double()
    z = torch.randn(12, 4, 5, dtype=torch.float64)
    start = state(vq)
    vq(z, step_rng(3, 12))
    vq.update(step_rng(3, 0), comm)
    whole = state(vq)
    vq.load_state_dict(start)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        vq(z[rows], step_rng(3, rows.stop - rows.start, rows.start))
    vq.update(step_rng(3, 0), comm)
    for name, t in vq.state_dict().items():
        torch.testing.assert_close(t, whole[name], rtol=1e-12, atol=1e-12)


def collapsed(config: VQConfig) -> VQ:
    """A codebook of which all but one vector lie far from every latent."""
    q = VQ(config)
    with torch.no_grad():
        q.codebook[1:] += 100
        if config.update == "ema":
            q.sums.copy_(q.codebook)
    return q


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_restarts_raise_usage_and_without_them_it_stays_low(update: str) -> None:
    usage = {}
    for restart in (0.0, 0.1):
        torch.manual_seed(1)
        q = collapsed(VQConfig(codes=32, dim=4, init="normal", decay=0.8, update=update, restart=restart))
        for step in range(40):
            out = q(torch.randn(8, 4, 10), step_rng(step, 8, step * 8))
            q.update(step_rng(step, 0), comm)
        usage[restart] = out.codes[0].unique().numel()
    assert usage[0.0] <= 2
    assert usage[0.1] >= 24


def test_a_restart_resets_vector_sum_and_count_together() -> None:
    q = collapsed(VQConfig(codes=4, dim=4, init="normal", decay=0.1, restart=0.2))
    z = torch.randn(6, 4, 5)
    q(z, step_rng(0, 6))
    q.update(step_rng(0, 0), comm)
    rows = z.movedim(1, -1).reshape(-1, 4)
    for k in range(1, 4):
        assert (rows == q.codebook[k]).all(1).any(), "a restarted code is one of the latents"
        torch.testing.assert_close(q.sums[k], q.codebook[k] * q.counts[k])
        assert q.counts[k] >= 0.2 * q.counts.mean()


def test_codes_of_no_latent_stay_where_they_are() -> None:
    """They would go to 0, where the smoothed count divides a sum that fades: at once where k-means or a release gave them none."""
    q = VQ(VQConfig(codes=24, dim=4, restart=0.0, decay=0.5)).train()
    z = torch.randn(1, 4, 10)
    q.initialize(z[0].t(), step_rng(0, 1))
    near = q.eval()(z).codes[0].unique()
    unused = torch.ones(24, dtype=torch.bool)
    unused[near] = False
    assert unused.sum() >= 14 and bool((q.counts[unused] == 0).any())
    first = q.codebook[unused].clone()
    for step in range(60):
        q.train()(z, step_rng(step, 1))
        if step == 30:
            q.reestimate(comm)
        else:
            q.update(step_rng(step, 0), comm)
    torch.testing.assert_close(q.codebook[unused], first, atol=0, rtol=0.02)


def test_no_two_codes_of_a_step_restart_from_one_latent() -> None:
    z = torch.randn(3, 4, 2)
    for batch in (z, torch.cat([z, z])):  # six latents, and each of them twice
        q = collapsed(VQConfig(codes=32, dim=4, init="normal", decay=0.1, restart=0.5))
        q(batch, step_rng(0, len(batch)))
        restarts = int(q.update(step_rng(0, 0), comm)["restarts"])
        rows = z.movedim(1, -1).reshape(-1, 4)
        taken = (q.codebook[:, None] == rows).all(2)
        assert 3 <= restarts <= 6 and taken[1:].any(1).sum() == restarts and (taken[1:].sum(0) <= 1).all()


def test_which_latents_restart_codes_does_not_depend_on_the_order_of_samples() -> None:
    z = torch.randn(10, 4, 5)
    restarted = []
    for order in (torch.arange(10), torch.arange(9, -1, -1)):
        torch.manual_seed(0)
        q = collapsed(VQConfig(codes=8, dim=4, init="normal", decay=0.1))
        q(z[order], StepRng(0, 0, order))
        q.update(step_rng(0, 0), comm)
        restarted.append(q.codebook[1:].clone())
    assert torch.equal(*restarted)


def test_the_samples_that_restart_codes_are_others_at_every_step() -> None:
    z, keys = torch.randn(50, 4), []
    for step in range(2):
        pending = empty_slots(8, 4, z)
        offer(pending, z, torch.ones(50, dtype=torch.bool), step_rng(step, 50))
        rows = (z[:, None] == pending["candidate"]).all(2).int().argmax(0)
        keys.append((pending["key"], rows))
    assert not (keys[0][0] == keys[1][0]).any() and (keys[0][1] == keys[1][1]).sum() < 4


def test_restarts_need_the_random_numbers_of_the_step() -> None:
    with pytest.raises(ValueError, match="StepRng"):
        VQ(VQConfig(codes=4, dim=4))(torch.randn(2, 4, 3))


@pytest.mark.parametrize("config", [VQConfig(codes=16, dim=4), VQConfig(codes=16, dim=4, cosine=True)], ids=["euclid", "cosine"])
def test_the_first_codebook_is_that_of_kmeans_and_its_counts_have_mean_1(config: VQConfig) -> None:
    torch.manual_seed(0)
    q, z = VQ(config), torch.randn(500, 4) * torch.linspace(0.1, 5, 500)[:, None]
    q.initialize(z, step_rng(0, 500))
    centres, counts = kmeans(F.normalize(z, dim=1) if config.cosine else z, 16, step_rng(0, 500))
    torch.testing.assert_close(q.codebook, F.normalize(centres, dim=1) if config.cosine else centres)
    torch.testing.assert_close(q.counts, counts * 16 / 500)
    torch.testing.assert_close(q.sums, q.codebook * q.counts[:, None])


def test_initialising_twice_changes_nothing(vq: VQ) -> None:
    before = state(vq)
    vq.initialize(torch.randn(100, 4), step_rng(1, 100))
    assert all(torch.equal(before[name], t) for name, t in vq.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f2_half_precision_latents_get_the_codes_of_their_float32_copy(vq: VQ, dtype: torch.dtype) -> None:
    z = (torch.randn(8, 4, 50) * 3).to(dtype)
    vq.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = vq(z)
    assert torch.equal(half.codes[0], vq(z.float()).codes[0])
    assert half.loss.dtype == half.z.dtype == torch.float32


def test_large_half_precision_latents_stay_finite(vq: VQ) -> None:
    out = vq((torch.randn(4, 4, 5) * 300).half(), step_rng(0, 4))
    assert torch.isfinite(out.loss) and torch.isfinite(out.z).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f2_casting_a_model_to_half_precision_leaves_the_codebook_in_float32(vq: VQ, dtype: torch.dtype) -> None:
    before = state(vq)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), vq).to(dtype)
    assert model[0].weight.dtype == dtype
    assert all(torch.equal(before[name], t) and t.dtype == before[name].dtype for name, t in vq.state_dict().items())
    assert vq.double().codebook.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_leaves_the_statistics_alone(vq: VQ, bad: float) -> None:
    z = torch.randn(4, 4, 5)
    vq(z, step_rng(0, 4))
    good = {name: t.clone() for name, t in vq._pending.items()}
    z[2, 1, 3] = bad
    vq(z, step_rng(1, 4))
    assert not vq.finite()
    assert all(torch.equal(good[name], t) for name, t in vq._pending.items() if name != "finite")
    vq.eval()
    with pytest.raises(ValueError, match="row 2"):
        vq(z)


def test_bad_latents_and_codes_are_refused_by_name(vq: VQ) -> None:
    for z, message in [
        (torch.randn(0, 4, 3), "empty"),
        (torch.randn(2, 5, 3), r"expected \(batch, 4, \*grid\)"),
        (torch.randn(2, 4), "shape"),
        (torch.ones(2, 4, 3, dtype=torch.int64), "floating point"),
    ]:
        with pytest.raises(ValueError, match=message):
            vq(z, step_rng(0, 2))
    for codes, message in [
        (torch.tensor([[16]]), r"\[0, 15\]"),
        (torch.tensor([[-1]]), r"\[0, 15\]"),
        (torch.tensor([[1]], dtype=torch.int32), "int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            vq.decode((codes,))


@pytest.mark.parametrize(
    "change",
    [
        {"codes": 0},
        {"decay": 1.0},
        {"restart": 1.0},
        {"beta": -0.1},
        {"update": "sgd"},
        {"beta_warmup": -1},
        {"estimator": "none"},
        {"entropy": {"weight": -1.0}},
        {"entropy": {"temperature": 0.0}},
        {"grow": [3, 3]},
        {"grow": [0]},
        {"codes": 3, "grow": [1, 2]},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=list(change)[-1]):
        VQConfig.from_dict(change)


def test_two_processes_hold_the_codebook_of_one(tmp_path: Path) -> None:
    def run(rank: int, world: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        q = collapsed(VQConfig(codes=64, dim=4, init="normal", decay=0.7)).double()
        for step in range(10):
            z = StepRng(5, step, torch.arange(12)).normal("z", 4, 5).double()
            mine = slice(rank * 7, 12 if rank == world - 1 else 7)
            q(z[mine], step_rng(step, mine.stop - mine.start, mine.start))
            q.update(step_rng(step, 0), comm)
        return dict(q.state_dict())

    alone = run(0, 1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
                assert comm.world_size == 2
                torch.save(run(rank, 2), tmp_path / f"{rank}.pt")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-10, atol=1e-10)
