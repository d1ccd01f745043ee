"""SimVQ: a frozen basis, one map that moves every code, a start where the latents are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.simvq import SimVQ, SimVQConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig


def step_rng(step: int, n: int) -> StepRng:
    return StepRng(seed=0, step=step, index=torch.arange(n))


def built(**changes: object) -> SimVQ:
    torch.manual_seed(0)
    q = QUANTIZERS.build(SimVQConfig.from_dict({"codes": 16, "dim": 4, **changes}))
    assert isinstance(q, SimVQ)
    return q


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_decoding_the_codes_gives_exactly_the_returned_latents(training: bool, grid: tuple[int, ...]) -> None:
    q = built().train(training)
    q.initialize(torch.randn(100, 4), step_rng(0, 1))
    out = q(torch.randn(3, 4, *grid), step_rng(0, 3))
    assert out.z.shape == (3, 4, *grid) and torch.equal(q.decode(out.codes), out.z)


def test_decoding_under_autocast_gives_the_returned_latents_too() -> None:
    q = built().eval()
    with torch.no_grad():
        q.map.weight.normal_()
    z = torch.randn(3, 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = q(z)
        assert torch.equal(q.decode(out.codes), out.z) and torch.equal(out.z, q(z).z)
    assert torch.equal(q.decode(out.codes), out.z)


def test_codes_are_nearest_to_the_mapped_basis() -> None:
    q = built()
    with torch.no_grad():
        q.map.weight.normal_()
        q.map.bias.normal_()
    z = torch.randn(3, 4, 20)
    vectors = q.basis @ q.map.weight.T + q.map.bias
    expected = torch.cdist(z.movedim(1, -1).reshape(-1, 4), vectors).argmin(1)
    assert torch.equal(q(z, step_rng(0, 3)).codes[0].flatten(), expected)


def test_the_first_latents_give_the_codes_their_mean_and_covariance() -> None:
    q = built(codes=4096)
    z = torch.randn(5000, 4) @ torch.randn(4, 4) + torch.tensor([3.0, -2.0, 0.5, 10.0])
    q.initialize(z, step_rng(0, 1))
    codes = q.vectors().detach()
    torch.testing.assert_close(codes.mean(0), z.mean(0), rtol=0.1, atol=0.15)
    torch.testing.assert_close(codes.T.cov(), z.T.cov(), rtol=0.15, atol=0.3)
    before = {name: t.clone() for name, t in q.state_dict().items()}
    q.initialize(torch.randn(100, 4), step_rng(1, 1))
    assert all(torch.equal(before[name], t) for name, t in q.state_dict().items()), "a second call changes nothing"


def test_a_single_latent_is_enough_to_begin() -> None:
    q = built()
    q.initialize(torch.ones(1, 4), step_rng(0, 1))
    torch.testing.assert_close(q.vectors(), torch.ones(16, 4))
    for z, message in [(torch.zeros(0, 4), "n > 0"), (torch.full((2, 4), float("nan")), "NaN")]:
        with pytest.raises(ValueError, match=message):
            built().initialize(z, step_rng(0, 1))


def test_the_terms_pull_encoder_by_beta_and_the_map_by_one_and_leave_the_basis() -> None:
    q = built(beta=0.7).double()
    z = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    out = q(z, step_rng(0, 2))
    grad_z, grad_w, grad_b = torch.autograd.grad(out.loss, [z, q.map.weight, q.map.bias])
    torch.testing.assert_close(grad_z, 0.7 * 2 * (z - out.z).detach() / z.numel())
    chosen = q.map(q.basis[out.codes[0].flatten()])
    expected = F.mse_loss(chosen, z.detach().movedim(1, -1).reshape(-1, 4))
    torch.testing.assert_close((grad_w, grad_b), torch.autograd.grad(expected, [q.map.weight, q.map.bias]))
    assert "basis" in q.state_dict() and "basis" not in dict(q.named_parameters()) and "basis" in q.code_tensors()


def test_of_a_codebook_beside_the_latents_more_codes_come_to_them_than_of_free_vectors() -> None:
    """The failure that it is for: a code that is never chosen gets no gradient, unless the map moves it with the others."""
    used = {}
    free = VQ(VQConfig(codes=64, dim=8, init="normal", update="gradient", restart=0.0))
    for q in (built(codes=64, dim=8, init="identity"), free):
        torch.manual_seed(0)
        with torch.no_grad():
            if isinstance(q, SimVQ):
                q.map.bias.fill_(2.0)
            else:
                q.codebook.add_(2.0)
        optimizer = torch.optim.Adam(q.parameters(), 0.01)
        for step in range(200):
            optimizer.zero_grad()
            q(torch.randn(16, 8, 32), step_rng(step, 16)).loss.backward()
            optimizer.step()
            stats = q.update(step_rng(step, 0), comm)
        used[type(q)] = stats["batch_usage"]
    assert used[SimVQ] > 0.4 and used[SimVQ] > 2 * used[VQ], used


def test_the_statistics_of_parts_are_those_of_the_whole_and_are_consumed() -> None:
    q, z = built(), torch.randn(12, 4, 5)
    q(z, step_rng(0, 12))
    whole = q.update(step_rng(0, 0), comm)
    for rows in (slice(0, 5), slice(5, 12)):
        q(z[rows], step_rng(0, 12))
    assert all(torch.equal(whole[name], value) for name, value in q.update(step_rng(0, 0), comm).items())
    with pytest.raises(RuntimeError, match="no forward"):
        q.update(step_rng(0, 0), comm)


def test_inactive_samples_do_not_count_and_a_nan_leaves_the_statistics() -> None:
    q, z = built(), torch.randn(4, 4, 5)
    active = torch.tensor([True, True, False, False])
    torch.testing.assert_close(q(z, step_rng(0, 4), active).loss, q(z[:2], step_rng(0, 2)).loss / 2)
    assert q._pending["counts"].sum() == 20
    z[3, 1, 2] = float("nan")
    q(z, step_rng(0, 4))
    assert q._pending["counts"].sum() == 20 and not q.finite()
    q.discard()
    assert q.finite()
    with pytest.raises(ValueError, match="row 3"):
        q.eval()(z)


@pytest.mark.parametrize("change", [{"codes": 0}, {"dim": 0}, {"beta": -1.0}, {"init": "kmeans"}, {"estimator": "none"}])
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SimVQConfig.from_dict(change)
