"""Residual quantisation: the paper's stages and loss, one gradient for all, dropout as a mask, prefixes, and RQ-VAE as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec, SignalSpec
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.quantizers.base import QuantizerConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import Residual, ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from tests.training import Left, run_training, tiny

INNER = VQConfig(codes=16, dim=4, decay=0.8)


def rng(step: int, n: int, start: int = 0) -> StepRng:
    return StepRng(0, step, torch.arange(start, start + n))


def built(inner: QuantizerConfig = INNER, **options: object) -> Residual:
    torch.manual_seed(0)
    q = Residual(ResidualConfig(inner=inner, **{"stages": 3, **options}))
    q.initialize(torch.randn(600, q.dim), rng(0, 600))
    return q


@pytest.mark.parametrize("shared", [False, True])
def test_each_stage_takes_the_nearest_code_to_what_the_others_left(shared: bool) -> None:
    q = built(shared=shared).eval()
    z = torch.randn(5, 4, 30)
    out = q(z)
    left = z.movedim(1, -1).reshape(-1, 4)
    for i, codes in enumerate(out.codes):
        table = q.part(i).codebook
        assert torch.equal(codes.flatten(), torch.cdist(left, table).argmin(1))
        left = left - table[codes.flatten()]
    torch.testing.assert_close(out.z.movedim(1, -1).reshape(-1, 4), z.movedim(1, -1).reshape(-1, 4) - left)
    assert len({p.data_ptr() for p in (q.part(i).codebook for i in range(3))}) == (1 if shared else 3)


def test_the_loss_is_the_papers_sum_over_partial_sums() -> None:
    """Lee et al. 2022, eq. 6, as means over positions and dimensions."""
    q = built()
    z = torch.randn(5, 4, 30, requires_grad=True)
    out = q(z, rng(0, 5))
    partial = [sum(q.part(i).decode((out.codes[i],)) for i in range(n + 1)) for n in range(3)]
    expected = 0.25 * sum((z - p).square().mean() for p in partial)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (out.loss, expected)))


@pytest.mark.parametrize("stages", [2, 8])
def test_the_loss_of_magnified_stages_is_the_papers_too(stages: int) -> None:
    q = built(LFQConfig(bits=4, entropy=0.0), stages=stages)
    z = torch.randn(64, 4, 16, requires_grad=True)
    out = q(z, rng(0, 64))
    partial = torch.stack([q.part(i).decode((codes,)) * 2.0**-i for i, codes in enumerate(out.codes)]).cumsum(0)
    expected = 0.25 * sum((z - p).square().mean() for p in partial)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (out.loss, expected)), rtol=1e-4, atol=1e-8)


def test_the_encoder_gets_the_gradient_once_not_once_per_stage() -> None:
    q = built()
    z, weight = torch.randn(5, 4, 6, requires_grad=True), torch.randn(5, 4, 6)
    (grad,) = torch.autograd.grad((q(z, rng(0, 5)).z * weight).sum(), z)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("inner", [INNER, FSQConfig(levels=(5, 5, 5)), LFQConfig(bits=4)])
@pytest.mark.parametrize("shared", [False, True])
def test_every_stage_brings_the_sum_nearer(inner: QuantizerConfig, shared: bool) -> None:
    q = built(inner, stages=4, shared=shared, dropout=0.5).eval()
    z = torch.randn(40, q.dim, 30).clamp(-1.5, 1.5)
    out = q(z)
    errors = [float((q.decode(out.codes[:n]) - z).square().mean()) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_scalar_stages_see_what_is_left_magnified() -> None:
    q = built(LFQConfig(bits=1), stages=6)
    z = torch.linspace(-1.9, 1.9, 77).view(77, 1, 1)
    out = q.eval()(z)
    assert (out.z - z).abs().max() <= 2**-5 + 1e-6, "signs of halves are binary digits"


# Quantiser dropout ---------------------------------------------------------------------------------------------
def test_weights_say_how_often_each_depth_is_drawn() -> None:
    n = 40_000
    depth = built(dropout=0.5, depth_weights=(5.0, 0.0, 1.0)).depth(rng(0, n))
    share = torch.bincount(depth, minlength=4).double() / n
    assert share[2] == 0 and share.tolist() == pytest.approx([0, 0.5 * 5 / 6, 0, 0.5 + 0.5 / 6], abs=0.01)
    alike = built(dropout=0.7, depth_weights=(2.0, 2.0, 2.0)).depth(rng(1, n))
    assert torch.equal(alike, built(dropout=0.7).depth(rng(1, n)))




def test_depths_are_drawn_per_sample_with_the_given_share_and_uniformly() -> None:
    q = built(dropout=0.6)
    depth = q.depth(rng(3, 30000))
    assert depth.dtype == torch.int64 and depth.min() == 1 and depth.max() == 3
    counts = torch.bincount(depth, minlength=4)[1:] / 30000
    torch.testing.assert_close(counts, torch.tensor([0.2, 0.2, 0.6]), rtol=0, atol=0.012)
    assert torch.equal(q.depth(StepRng(0, 3, torch.tensor([17, 5]))), depth[[17, 5]])
    assert not torch.equal(q.depth(rng(4, 30000)), depth)
    assert (built(dropout=1.0).depth(rng(0, 9000)) == 3).float().mean() == pytest.approx(1 / 3, abs=0.02)


def test_stages_beyond_the_depth_add_nothing_to_z_loss_and_statistics() -> None:
    q, only = built(dropout=1.0), built()
    only.load_state_dict(q.state_dict())
    z = torch.randn(12, 4, 9)
    out = q(z, rng(1, 12))
    assert out.depth is not None and len(out.depth.unique()) == 3
    assert torch.equal(q.decode(out.codes, out.depth), out.z)
    for i in range(12):
        depth = int(out.depth[i])
        assert torch.equal(out.z[i : i + 1], q.decode(tuple(c[i : i + 1] for c in out.codes[:depth])))
    left, loss = z, torch.zeros(())
    for i in range(3):
        part = only.part(i)
        alone = part(left[out.depth > i], StepRng(0, 1, torch.arange(12)[out.depth > i]).sub(i))
        loss = loss + alone.loss * (out.depth > i).float().mean()
        left = left - part.decode((out.codes[i],))
    torch.testing.assert_close(out.loss, loss)
    q.update(rng(1, 1), comm)
    only.update(rng(1, 1), comm)
    for name, tensor in only.state_dict().items():
        torch.testing.assert_close(q.state_dict()[name], tensor)


def test_every_stage_draws_for_itself() -> None:
    q, seeds = built(), []
    for i in range(3):
        q.part(i).register_forward_pre_hook(lambda _, arguments: seeds.append(arguments[1].seed))
    q(torch.randn(5, 4, 9), rng(1, 5))
    assert len(set(seeds)) == 3


def test_every_stage_gets_a_gradient_whatever_the_depths() -> None:
    q = built(INNER.replace(update="gradient"), dropout=1.0)
    step = next(s for s in range(500) if (q.depth(rng(s, 2)) == 1).all())
    q(torch.randn(2, 4, 3), rng(step, 2)).loss.backward()
    assert all(p.grad is not None for p in q.parameters())
    assert not q.part(2).codebook.grad.any() and q.part(0).codebook.grad.any()


def test_no_stage_is_dropped_in_eval_mode_or_without_dropout() -> None:
    z = torch.randn(3, 4, 5)
    assert built(dropout=1.0).eval()(z).depth is None and built()(z, rng(0, 3)).depth is None
    with pytest.raises(ValueError, match="StepRng is needed in training while dropout > 0"):
        built(INNER.replace(restart=0.0), dropout=0.5)(z)


def test_prefixes_and_levels_are_those_of_the_stages() -> None:
    assert built().prefixes() == (3,) and built(dropout=0.1).prefixes() == (1, 2, 3)
    assert built().level_specs("codes", (7, 7)) == tuple(LevelSpec(f"codes/{i}", 16, (7, 7)) for i in range(3))
    both = built(ProductConfig(groups=2, inner=INNER), dropout=0.1)
    assert both.prefixes() == (2, 4, 6) and both.level_specs("c", (1,))[3].name == "c/1/1"
    code = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 maps; residual decodes 3"):
        built().decode((code, code))
    with pytest.raises(ValueError, match="only the outermost"):
        Residual(ResidualConfig(inner=ResidualConfig(inner=INNER, dropout=0.1)))


# Initialisation ------------------------------------------------------------------------------------------------


def test_stage_after_stage_is_initialised_on_what_is_left() -> None:
    q = built()
    z = torch.randn(3000, 4)
    left = z
    for i in range(3):
        table = q.part(i).codebook
        spread = float(left.square().mean())
        assert float(table.square().mean()) < 1.5 * spread, f"stage {i} lies where its latents are"
        left = left - table[torch.cdist(left, table).argmin(1)]
        assert float(left.square().mean()) < 0.6 * spread


def test_a_shared_codebook_serves_every_stage_from_the_start() -> None:
    z = torch.randn(2000, 4)
    errors = {}
    for kind in ("joint", "first stage only"):
        torch.manual_seed(0)
        q = Residual(ResidualConfig(stages=3, shared=True, inner=INNER.replace(codes=64)))
        if kind == "joint":
            q.initialize(z, rng(0, 2000))
        else:
            q.part(0).initialize(z, rng(0, 2000))
        errors[kind] = float((q.eval()(z[..., None]).z[..., 0] - z).square().mean())
    assert errors["joint"] < 0.8 * errors["first stage only"]


def test_a_shared_codebook_averages_the_latents_of_all_stages_once_a_step() -> None:
    q = built(INNER.replace(restart=0.0), shared=True)
    z = torch.randn(8, 4, 20)
    counts, sums = q.part(0).counts.clone(), q.part(0).sums.clone()
    out = q(z, rng(0, 8))
    q.update(rng(0, 1), comm)
    left, n, m = z.movedim(1, -1).reshape(-1, 4), torch.zeros(16), torch.zeros(16, 4)
    table = sums / counts[:, None]
    for codes in out.codes:
        n.index_add_(0, codes.flatten(), torch.ones(160))
        m.index_add_(0, codes.flatten(), left)
        left = left - table[codes.flatten()]
    torch.testing.assert_close(q.part(0).counts, 0.8 * counts + 0.2 * n)
    torch.testing.assert_close(q.part(0).sums, 0.8 * sums + 0.2 * m, rtol=1e-4, atol=1e-4)


# RQ-VAE --------------------------------------------------------------------------------------------------------

NET = ConvConfig(widths=(8, 16), blocks=(0, 1), encoder_blocks=None, patch=1)
SIGNAL = SignalSpec("image", 1, (8, 8))


def rqvae(**options: object) -> VQVAE:
    torch.manual_seed(0)
    config = ResidualConfig(inner=INNER, **{"stages": 3, "dropout": 0.5, **options})
    tokenizer = VQVAE(VQVAEConfig(net=NET, quantizer=config, micro_batch=4), SIGNAL)
    tokenizer.initialize([images(64)], rng(0, 64), comm)
    return tokenizer


def images(n: int) -> Tensor:
    return rng(0, n).uniform("x", 1, 8, 8) * 2 - 1


def test_a_tokenizer_decodes_every_prefix_of_its_levels_and_refuses_others() -> None:
    tokenizer, x = rqvae(), images(6)
    codes = tokenizer.encode(x)
    assert tokenizer.spec.prefixes == (1, 2, 3) and [level.name for level in tokenizer.spec.levels] == ["codes/0", "codes/1", "codes/2"]
    shapes = [tokenizer.decode(codes[:n]).shape for n in (1, 2, 3)]
    assert shapes == [x.shape] * 3
    assert not torch.equal(tokenizer.decode(codes[:1]), tokenizer.decode(codes))
    with pytest.raises(ValueError, match="0 levels; decode accepts 1, 2, 3"):
        tokenizer.decode([])
    with pytest.raises(ValueError, match="1 levels; decode accepts 3"):
        rqvae(dropout=0.0).decode(codes[:1])


def test_its_fingerprint_covers_every_stage_and_a_release_loads(tmp_path: Path) -> None:
    tokenizer, x = rqvae(), images(5)
    before = tokenizer.fingerprint
    for i in range(3):
        saved = tokenizer.quantizer.part(i).codebook.clone()
        tokenizer.quantizer.part(i).codebook[0, 0] += 1e-3
        assert tokenizer.fingerprint != before
        tokenizer.quantizer.part(i).codebook.copy_(saved)
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert loaded.spec == tokenizer.spec
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(x), tokenizer.encode(x), strict=True))


TRAINED = {
    "residual": ResidualConfig(stages=2, dropout=0.5, inner=VQConfig(codes=24, dim=4, decay=0.9, restart=0.3)),
    "shared": ResidualConfig(stages=2, shared=True, inner=VQConfig(codes=24, dim=4, decay=0.9, restart=0.3)),
    "product": ProductConfig(groups=2, inner=VQConfig(codes=24, dim=2, decay=0.9, restart=0.3)),
    "fsq": FSQConfig(levels=(5, 4, 3)),
    "lfq": LFQConfig(bits=5),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", [name if name in ("residual", "lfq") else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED])
def test_c1_two_processes_and_accumulation_train_what_one_process_trains(ranks, tmp_path: Path, name: str) -> None:
    def config(folder: str, **more: object) -> object:
        base = tiny(tmp_path / folder, steps=12, precision="fp64", log={"every": 5, "checkpoint_every": 12}, **more)
        return base.replace(tokenizer=base.tokenizer.replace(quantizer=TRAINED[name]))

    def work(rank: int) -> None:
        import os

        os.environ["LOCAL_WORLD_SIZE"] = "2"
        run_training(config("two"))

    run_training(config("one"))
    run_training(config("parts", accumulate=3))
    ranks(work, timeout=120.0)
    one = Left.of(tmp_path / "one")
    assert one.distance(Left.of(tmp_path / "two")) <= 1e-10
    assert one.distance(Left.of(tmp_path / "parts")) <= 1e-10


@pytest.mark.parametrize(
    "change",
    [
        {"stages": 0},
        {"dropout": 1.5},
        {"inner": {"type": "vqq"}},
        {"depth_weights": [1.0, 2.0], "dropout": 0.5},
        {"depth_weights": [1.0, -1.0, 1.0, 1.0], "dropout": 0.5},
        {"depth_weights": [0.0] * 4, "dropout": 0.5},
        {"depth_weights": [1.0] * 4},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ResidualConfig.from_dict(change)


def test_a_gpt_over_all_depths_or_the_first_two_makes_a_pipeline() -> None:
    from intarsia.specs import CodesSpec
    from pipelines import TwoStagePipeline
    from stage2_prior.priors.gpt import GPTConfig, GPTPrior

    tokenizer = rqvae()
    spec = CodesSpec(tokenizer.spec.levels, tokenizer.fingerprint)
    for levels, order in (("0:3", "position"), ("0:2", "level")):
        torch.manual_seed(1)
        prior = GPTPrior(GPTConfig(levels=levels, order=order, width=16, depth=1, heads=2), spec)
        pipeline = TwoStagePipeline(tokenizer, [prior], micro_batch=4)
        x = pipeline.sample(5, seed=0)
        assert x.shape == (5, 1, 8, 8) and torch.equal(pipeline.sample(2, seed=0), x[:2])
        assert torch.isfinite(pipeline.nll(tokenizer.encode(images(3))[: int(levels[-1])])).all()


def test_samples_of_fewer_stages_pass_on_a_share_of_the_gradient() -> None:
    config = ResidualConfig(stages=3, dropout=0.7, inner=VQConfig(codes=8, dim=4, beta=0.0))
    rng = StepRng(0, 3, torch.arange(12))
    weight, given = torch.randn(12, 4, 5), torch.randn(12, 4, 5)
    found = []
    for share in (1.0, 0.25, 0.0):
        torch.manual_seed(0)
        q = Residual(config.replace(shallow_gradient=share)).train()
        z = given.clone().requires_grad_()
        out = q(z, rng)
        (gradient,) = torch.autograd.grad((out.z * weight).sum() + out.loss, z)
        few = (q.depth(rng) < 3)[:, None, None]
        assert 0 < few.sum() < 12
        torch.testing.assert_close(gradient, torch.where(few, share * weight, weight))
        found.append(out.z)
        (gradient,) = torch.autograd.grad((q.eval()(z).z * weight).sum(), z)
        assert torch.equal(gradient, weight)
    assert all(torch.equal(z, found[0]) for z in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.0}, "shallow_gradient: 0.5, but dropout is 0"),
        ({"inner": FSQConfig(levels=(5, 5))}, "shallow_gradient: 0.5, but the gradient goes through an inner fsq quantizer"),
    ],
)
def test_a_share_of_the_gradient_that_would_do_nothing_or_harm_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Residual(ResidualConfig(**{"stages": 2, "dropout": 0.5, "shallow_gradient": 0.5} | changes))
