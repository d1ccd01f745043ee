"""LFQ and BSQ: signs are bits, entropies are those of all 2^d codes enumerated, and training uses them all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers import search
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.bsq import BSQ, BSQConfig
from stage1_tokenizer.quantizers.entropy import bits_mean_entropy, joint
from stage1_tokenizer.quantizers.lfq import LFQ, LFQConfig, SignConfig, SignQuantizer
from tests.test_search import Largest

KINDS = [LFQConfig, BSQConfig]


def built(config: SignConfig) -> SignQuantizer:
    q = QUANTIZERS.build(config)
    assert isinstance(q, SignQuantizer)
    return q.double()


def rng(step: int, n: int, start: int = 0) -> StepRng:
    return StepRng(0, step, torch.arange(start, start + n))


def assignments(q: SignQuantizer, u: Tensor) -> Tensor:
    """(N, 2^d) p(c | u) by its definition, all codes enumerated."""
    table = torch.tensor(list(itertools.product((-1, 1), repeat=q.dim)), dtype=u.dtype).flip(1) * q.value
    return F.softmax(-(u[:, None] - table).square().sum(-1) / q.config.tau, 1)


def test_the_first_bit_is_the_lowest() -> None:
    q = LFQ(LFQConfig(bits=5))
    z = torch.tensor([1.0, -2.0, 0.5, -0.1, -3.0]).view(1, 5, 1)
    assert q(z, rng(0, 1)).codes[0].item() == 0b00101
    assert q.level_specs("codes", (3,)) == (LevelSpec("codes", 32, (3,), (2,) * 5),)
    assert q.decode((torch.tensor([[5]]),)).flatten().tolist() == [1, -1, 1, -1, -1]


def test_bsq_lies_on_the_unit_sphere_and_its_gradient_passes_the_normalisation() -> None:
    q = BSQ(BSQConfig(bits=6)).double()
    z = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 5, dtype=torch.float64)
    out = q(z, rng(0, 4))
    torch.testing.assert_close(out.z.norm(dim=1), torch.ones(4, 5, dtype=torch.float64))
    (grad,) = torch.autograd.grad((out.z * weight).sum(), z)
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * weight).sum(), z)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_of_a_sample_is_that_of_all_codes_enumerated(kind: type[SignConfig]) -> None:
    q = built(kind(bits=7, diversity=0.0, beta=0.0, entropy=1.0, group=3, tau=0.7))
    z = torch.randn(3, 7, 11, dtype=torch.float64)
    p = assignments(q, q.project(z.movedim(1, -1)).flatten(0, 1))
    torch.testing.assert_close(q(z, rng(0, 3)).loss * 7, -(p * p.log()).sum(1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_mean_term_is_that_of_minus_its_entropy_where_the_running_mean_is_the_mean(kind: type[SignConfig]) -> None:
    """One group: exact over the joint distribution of all bits."""
    config = kind(bits=5, beta=0.0, entropy=1.0, decay=0.0, tau=0.5)
    q = built(config)
    z = torch.randn(6, 5, 40, dtype=torch.float64, requires_grad=True)
    q(z, rng(0, 6))
    q.update(rng(0, 1), comm)  # decay 0: the running mean is this batch's
    (grad,) = torch.autograd.grad(q(z, rng(1, 6)).loss, z)
    p = assignments(q, q.project(z.movedim(1, -1)).flatten(0, 1))
    mean = p.mean(0)
    torch.testing.assert_close(q.usage, mean.detach())
    reference = (-(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()) / 5
    (expected,) = torch.autograd.grad(reference, z)
    torch.testing.assert_close(grad, expected)


def test_groups_of_bits_bound_the_entropy_of_the_mean_from_above() -> None:
    z = torch.randn(2, 6, 300, dtype=torch.float64)
    z[:, 3:] = z[:, :3] * 2  # bits that belong together
    found = {}
    for group in (1, 3, 6):
        q = built(LFQConfig(bits=6, group=group, decay=0.0, tau=0.5))
        for step in range(2):
            stats = q(z, rng(step, 2)).stats
            q.update(rng(step, 1), comm)
        found[group] = float(stats["mean_entropy"])
    assert found[6] < found[3] - 0.1 and found[3] <= found[1] + 1e-9
    mean = assignments(built(LFQConfig(bits=6, tau=0.5)), z.movedim(1, -1).flatten(0, 1)).mean(0)
    assert found[6] == pytest.approx(float(-(mean * mean.log()).sum()) / 6)


def test_the_running_mean_advances_by_the_samples_of_the_step_and_in_update_alone() -> None:
    q = built(LFQConfig(bits=3, decay=0.7))
    z = torch.randn(5, 3, 8, dtype=torch.float64)
    before = q.usage.clone()
    q(z[:2], rng(0, 2))
    q(z[2:], rng(0, 3, 2), active=torch.tensor([True, False, True]))
    assert torch.equal(q.usage, before)
    q.update(rng(0, 1), comm)
    p = assignments(q, z[[0, 1, 2, 4]].movedim(1, -1).flatten(0, 1))
    torch.testing.assert_close(q.usage, 0.7 * before + 0.3 * p.mean(0))
    with pytest.raises(RuntimeError, match="no forward"):
        q.update(rng(1, 1), comm)


def test_a_step_in_which_no_sample_is_active_keeps_the_running_mean() -> None:
    q = built(LFQConfig(bits=3))
    q(torch.randn(2, 3, 4, dtype=torch.float64), rng(0, 2))
    q.update(rng(0, 1), comm)
    before = q.usage.clone()
    out = q(torch.randn(2, 3, 4, dtype=torch.float64), rng(1, 2), active=torch.zeros(2, dtype=torch.bool))
    q.update(rng(1, 1), comm)
    assert torch.equal(q.usage, before) and out.loss.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_decade_of_magnitudes_gives_finite_losses_and_gradients(kind: type[SignConfig]) -> None:
    q = QUANTIZERS.build(kind(bits=8, tau=0.01))
    z = (torch.randn(3, 8, 9) * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]).requires_grad_()
    out = q(z, rng(0, 3))
    (grad,) = torch.autograd.grad(out.loss, z)
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_term_brings_collapsed_latents_to_all_codes(kind: type[SignConfig]) -> None:
    torch.manual_seed(0)
    q = QUANTIZERS.build(kind(bits=6, beta=0.0))
    encoder = torch.nn.Conv1d(8, 6, 1)
    torch.nn.init.constant_(encoder.bias, 1.5)  # every bit is 1 nearly always
    optimizer = torch.optim.Adam(encoder.parameters(), 2e-2)
    perplexity = []
    for step in range(200):
        z = encoder(StepRng(1, step, torch.arange(16)).normal("x", 8, 32))
        out = q(z, rng(step, 16))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        q.update(rng(step, 1), comm)
        share = torch.bincount(out.codes[0].flatten(), minlength=64) / z[:, 0].numel()
        perplexity.append(float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())))
    assert perplexity[0] < 4 and perplexity[-1] > 40


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 0}, "bits"), ({"bits": 32}, "bits"), ({"tau": 0.0}, "tau"), ({"decay": 1.0}, "decay"), ({"group": 13}, "group")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_settings_are_refused(kind: type[SignConfig], change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.from_dict(change)


def dense_mean_term(logits: Tensor, shares: list[Tensor], groups: list[slice], active: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """All 2^g probabilities of every position, by torch's own gradient."""
    total, sums = logits.new_zeros(()), []
    for group, share in zip(groups, shares, strict=True):
        p = joint(torch.sigmoid(logits[..., group]))
        keep = torch.ones(len(logits), dtype=torch.bool) if active is None else active
        p = p * keep.view(-1, *[1] * (p.ndim - 1))
        total = total + (p @ share.log()).mean()
        sums.append(p.detach().flatten(0, -2).sum(0))
    return total, sums


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_the_mean_term_in_tiles_has_value_gradient_and_sums_of_the_dense_one(monkeypatch, group: int, some: bool) -> None:
    monkeypatch.setitem(search._TILE_FLOATS, "cpu", 64)
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, 2, 7, generator=draw, dtype=torch.float64)).requires_grad_()
    groups = [slice(start, min(start + group, 7)) for start in range(0, 7, group)]
    shares = [torch.rand(1 << (g.stop - g.start), generator=draw, dtype=torch.float64) + 0.1 for g in groups]
    active = torch.tensor([True, False, True, True]) if some else None
    found, sums = bits_mean_entropy(logits, shares, groups, torch.tensor(True), active)
    expected, dense = dense_mean_term(logits, shares, groups, active)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(sums, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (grad,), (wanted,) = (torch.autograd.grad(3 * term, logits) for term in (found, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_positions_times_codes_is_made_or_kept(kind: type[SignConfig]) -> None:
    n, bits = 2048, 9
    kept: list[int] = []
    q = QUANTIZERS.build(kind(bits=bits))
    z = torch.randn(8, bits, n // 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), Largest() as largest:
        q(z, rng(0, 8)).loss.backward()
    assert max(kept) <= n * bits and largest.elements <= n * 2 ** ((bits + 1) // 2) < n * 2**bits // 8


@pytest.mark.parametrize("kind", KINDS)
def test_in_eval_mode_the_entropy_term_is_left_out(kind: type[SignConfig]) -> None:
    q = built(kind(bits=5)).eval()
    out = q(torch.randn(2, 5, 4, dtype=torch.float64))
    assert set(out.stats) == {"quantization_error"}
    torch.testing.assert_close(out.loss, q.config.beta * out.stats["quantization_error"])


def test_a_batch_with_a_nan_adds_nothing_to_the_running_mean_even_where_it_is_not_active() -> None:
    q = built(LFQConfig(bits=3))
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    z[1, 0, 0] = float("nan")
    q(z, rng(0, 2), active=torch.tensor([True, False]))
    assert not q.finite() and q._pending["positions"] == 0 and not q._pending["usage"].any()


def test_the_largest_vocabulary_has_the_largest_code() -> None:
    q = LFQ(LFQConfig(bits=31))
    assert q(torch.ones(1, 31, 2), rng(0, 1)).codes[0].unique().tolist() == [2**31 - 1]
    assert math.prod(q.level_specs("codes", (1,))[0].factors) == 2**31
