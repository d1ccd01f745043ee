"""VQVAE2: levels of any number on any axes, prefixes that decode alone, conditioning that conditions, exact statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.nets.ladder import GridConfig
from stage1_tokenizer.objectives.base import OBJECTIVES
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage1_tokenizer.tokenizers.vqvae2 import VQVAE2, LevelConfig, VQVAE2Config

SIGNALS = {1: SignalSpec("audio", 1, (32,)), 2: SignalSpec("image", 3, (16, 16)), 3: SignalSpec("video", 1, (8, 8, 8))}
NAMES = {2: ("top", "bottom"), 3: ("top", "middle", "bottom"), 4: ("top", "middle_1", "middle_2", "bottom")}


def config(count: int = 2, **changes) -> VQVAE2Config:
    grid = GridConfig(width=12, blocks=1, encoder_blocks=0)
    kinds = tuple(LevelConfig(quantizer=VQConfig(codes=16 + i, dim=3 + i, decay=0.9, restart=0.1)) for i in range(count))
    values = {"net": ConvConfig(widths=(8,), blocks=(1,), encoder_blocks=(0,), patch=2 if count < 4 else 1)}
    values |= {"ladder": (grid,) * (count - 1), "levels": kinds, "micro_batch": 4, "drop_finer": 0.0}
    return VQVAE2Config(**values | changes)


def signals(n: int, axes: int = 2, seed: int = 0) -> Tensor:
    """Smooth by half: noise over blocks of four samples, and a little noise on each."""
    signal, index = SIGNALS[axes], torch.arange(n)
    coarse = StepRng(seed, 0, index).uniform("coarse", signal.channels, *(s // 4 for s in signal.shape)) * 1.6 - 0.8
    for axis in range(axes):
        coarse = coarse.repeat_interleave(4, axis + 2)
    return coarse + StepRng(seed, 0, index).uniform("fine", signal.channels, *signal.shape) * 0.4 - 0.2


def rng_of(n: int, step: int = 0, first: int = 0) -> StepRng:
    return StepRng(0, step, torch.arange(first, first + n))


def built(count: int = 2, axes: int = 2, dtype: torch.dtype = torch.float32, **changes) -> VQVAE2:
    torch.manual_seed(0)
    tokenizer = VQVAE2(config(count, **changes), SIGNALS[axes]).to(dtype)
    tokenizer.initialize([signals(48, axes).to(dtype)], rng_of(48), comm)
    return tokenizer


def loss_of(tokenizer: VQVAE2, x: Tensor, rng: StepRng, **weights: float) -> Tensor:
    return OBJECTIVES.build(ReconstructionConfig(**weights)).tokenizer_loss(tokenizer(x, rng=rng), x, rng.step, rng)[0]


def step(tokenizer: VQVAE2, x: Tensor, at: int = 0, lr: float = 3e-2) -> None:
    """One step of plain gradient descent, and of the codebooks."""
    rng = rng_of(len(x), at)
    tokenizer.zero_grad()
    loss_of(tokenizer, x, rng).backward()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter -= lr * parameter.grad
    tokenizer.update(rng, comm)


# Shapes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("levels", [2, 3])
def test_each_level_halves_the_grid_and_every_prefix_gives_a_signal(levels: int, axes: int) -> None:
    tokenizer, x = built(levels, axes), signals(5, axes)
    grids = [tuple(s >> (levels - i) for s in SIGNALS[axes].shape) for i in range(levels)]
    expected = tuple(LevelSpec(name, 16 + i, grid) for i, (name, grid) in enumerate(zip(NAMES[levels], grids, strict=True)))
    assert tokenizer.spec.levels == expected and tokenizer.spec.prefixes == tuple(range(1, levels + 1))
    codes = tokenizer.encode(x)
    assert [c.shape[1:] for c in codes] == grids and all(c.dtype == torch.int64 for c in codes)
    for count in tokenizer.prefixes():
        assert tokenizer.decode(codes[:count]).shape == x.shape
    assert tokenizer.stride == tuple(s // g for s, g in zip(SIGNALS[axes].shape, grids[0], strict=True))


def test_four_levels_and_larger_factors_work_too() -> None:
    assert [level.shape for level in built(4).level_specs()] == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert built(4).names == NAMES[4]
    tokenizer = built(2, ladder=(GridConfig(width=8, factor=4, blocks=0, attention=True),))
    assert [level.shape for level in tokenizer.level_specs()] == [(2, 2), (8, 8)]
    assert tokenizer.decode(tokenizer.encode(signals(3))).shape == (3, 3, 16, 16)


def test_any_size_that_the_coarsest_stride_divides_is_encoded_and_decoded() -> None:
    tokenizer = built(3)
    codes = tokenizer.encode(torch.zeros(2, 3, 24, 8))
    assert [c.shape[1:] for c in codes] == [(3, 1), (6, 2), (12, 4)] and tokenizer.decode(codes).shape == (2, 3, 24, 8)
    with pytest.raises(ValueError, match=r"the stride \(8, 8\) divides"):
        tokenizer.encode(torch.zeros(2, 3, 16, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_are_cast_and_quantisers_stay_wide(dtype: torch.dtype) -> None:
    tokenizer = built(3).to(dtype)
    codes = tokenizer.encode(signals(3))
    assert tokenizer.decode(codes).dtype == tokenizer.dtype == dtype and tokenizer.decode(codes[:2]).isfinite().all()


# Codes and reconstructions ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [2, 3])
def test_decoding_all_codes_or_a_prefix_gives_what_training_saw(levels: int) -> None:
    tokenizer, x = built(levels), signals(8)
    tokenizer.train()
    seen = tokenizer(x, rng=rng_of(8))
    tokenizer.discard()
    codes = tokenizer.encode(x)
    assert tokenizer.training, "the mode is restored"
    assert all(torch.equal(a, b) for a, b in zip(codes, seen.codes, strict=True))
    assert [count for count, _ in seen.prefixes] == list(range(1, levels))
    for count, reconstruction in (*seen.prefixes, (levels, seen.x)):
        torch.testing.assert_close(tokenizer.decode(codes[:count]), reconstruction, rtol=1e-5, atol=1e-5)
    tokenizer.eval()
    torch.testing.assert_close(tokenizer(x).x, tokenizer.decode(codes), rtol=1e-5, atol=1e-5)


def test_codes_and_pixels_of_a_signal_do_not_depend_on_its_batch() -> None:
    tokenizer, x = built(3), signals(11)
    together = tokenizer.encode(x)
    for rows in ([0], [10, 3], list(range(10, -1, -1))):
        codes = [c[rows] for c in together]
        assert all(torch.equal(a, b) for a, b in zip(tokenizer.encode(x[rows]), codes, strict=True))
        for count in (1, 2, 3):
            assert torch.equal(tokenizer.decode(codes[:count]), tokenizer.decode(together[:count])[rows])


def test_each_level_changes_the_reconstruction_and_a_prefix_knows_nothing_of_finer_ones() -> None:
    tokenizer, codes = built(3), [torch.zeros(1, s, s, dtype=torch.int64) for s in (2, 4, 8)]
    before = tokenizer.decode(codes)
    for level in range(3):
        other = [c + (i == level) for i, c in enumerate(codes)]
        assert not torch.equal(tokenizer.decode(other), before)
    for count in (1, 2):
        prefix = tokenizer.decode(codes[:count])
        finer = [tokenizer.net.decoder, *tokenizer.quantizers[count:], *tokenizer.from_codes[count:], *tokenizer.up[count:]]
        with torch.no_grad():
            for module in [*finer, *tokenizer.to_codes[count:], *tokenizer.heads[count:]]:
                for tensor in module.state_dict(keep_vars=True).values():
                    if tensor.is_floating_point():
                        tensor += 0.1
        assert torch.equal(tokenizer.decode(codes[:count]), prefix) and not torch.equal(tokenizer.decode(codes), before)
        tokenizer = built(3)


def test_without_decoders_of_prefixes_only_all_levels_decode() -> None:
    tokenizer = built(3, prefix_blocks=None)
    assert tokenizer.prefixes() == (3,) and tokenizer(signals(2), rng=rng_of(2)).prefixes == ()
    with pytest.raises(ValueError, match="codes: 1 levels; decode accepts 3"):
        tokenizer.decode(tokenizer.encode(signals(2))[:1])


def test_depths_and_groups_of_a_level_are_levels_and_its_prefixes_decode() -> None:
    residual = ResidualConfig(stages=2, dropout=0.5, inner=VQConfig(codes=8, dim=4))
    kinds = (LevelConfig(quantizer=residual), LevelConfig(name="fine", quantizer=ProductConfig(groups=2, inner=VQConfig(codes=8, dim=2))))
    tokenizer, x = built(2, levels=kinds), signals(24)
    assert [(level.name, level.shape) for level in tokenizer.level_specs()] == [
        ("top/0", (4, 4)), ("top/1", (4, 4)), ("fine/0", (8, 8)), ("fine/1", (8, 8))
    ]  # fmt: skip
    assert tokenizer.prefixes() == (1, 2, 4)
    codes = tokenizer.encode(x)
    seen = tokenizer.eval()(x)
    assert [count for count, _ in seen.prefixes] == [2]
    torch.testing.assert_close(tokenizer.decode(codes[:2]), seen.prefixes[0][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokenizer.decode(codes), seen.x, rtol=1e-5, atol=1e-5)
    first = tokenizer._join(0, tokenizer.levels()[0].decode((codes[0],)), None)
    torch.testing.assert_close(tokenizer.decode(codes[:1]), tokenizer.heads[0](tokenizer.up[0](first)), rtol=1e-5, atol=1e-5)
    before = [q.clone() for q in tokenizer.levels()[0].state_dict().values()]
    step(tokenizer.train(), x)
    assert any(not torch.equal(a, b) for a, b in zip(before, tokenizer.levels()[0].state_dict().values(), strict=True))
    assert {"quantization_error/top", "quantization_error/top/0", "quantization_error/fine/0"} <= tokenizer(x, rng=rng_of(24)).stats.keys()
    assert {"perplexity/top/0", "perplexity/fine/1"} <= tokenizer.update(rng_of(1, 1), comm).keys()


# Conditioning ----------------------------------------------------------------------------------------------------
def moved(conditioned: bool) -> list[bool]:
    """Which levels' codes change when the codes of the top level come to mean something else."""
    tokenizer, x = built(3, conditioned=conditioned), signals(16)
    before = tokenizer.encode(x)
    with torch.no_grad():  # the top's codes stay: vectors and latents turn together
        tokenizer.quantizers[0].codebook.neg_()
        for parameter in tokenizer.to_codes[0].parameters():
            parameter.neg_()
    return [not torch.equal(a, b) for a, b in zip(before, tokenizer.encode(x), strict=True)]


def test_finer_codes_follow_the_coarser_codebook_where_they_are_conditioned_on_it() -> None:
    assert moved(conditioned=True) == [False, True, True]
    assert moved(conditioned=False) == [False, False, False]


@pytest.mark.parametrize("levels", [2, 3])
def test_the_gradient_of_the_finest_commitment_reaches_the_coarsest_latents_only_by_conditioning(levels: int) -> None:
    for conditioned in (True, False):
        tokenizer = built(levels, conditioned=conditioned)
        found, _, _ = tokenizer._climb(tokenizer._features(signals(4)), rng_of(4), levels)
        found[-1].loss.backward()
        assert (tokenizer.to_codes[0].weight.grad is not None) == conditioned


# Gradients -------------------------------------------------------------------------------------------------------
def touched(tokenizer: VQVAE2, value: Tensor) -> set[str]:
    """The parts of the tokenizer that a value gives a gradient to."""
    tokenizer.zero_grad()
    value.backward(retain_graph=True)
    names = [name for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    return {".".join(name.split(".")[:2]) for name in names}


def test_each_term_trains_exactly_the_parts_that_it_is_made_by() -> None:
    tokenizer, x = built(3), signals(6)
    out = tokenizer(x, rng=rng_of(6))
    encoder, down = {"net.encoder"}, {"down.0", "down.1"}
    top = encoder | down | {"to_codes.0"}
    climb_1 = top | {"from_codes.0", "up.0"}
    climb_2 = climb_1 | {"to_codes.1", "from_codes.1", "up.1"}
    assert touched(tokenizer, out.loss) == climb_2 | {"to_codes.2"}
    assert touched(tokenizer, out.prefixes[0][1].square().mean()) == climb_1 | {"heads.0"}
    assert touched(tokenizer, out.prefixes[1][1].square().mean()) == climb_2 | {"heads.1"}
    assert touched(tokenizer, out.x.square().mean()) == climb_2 | {"to_codes.2", "from_codes.2", "net.decoder"}


@pytest.mark.parametrize("changes", [{}, {"conditioned": False}, {"prefix_blocks": None}, {"drop_finer": 0.9}, {"drop_finer": 1e-9}])
def test_every_parameter_gets_a_gradient_in_every_step(changes: dict) -> None:
    """Data-parallel training waits for all of them, also where nothing, or nearly everything, is dropped, or a term weighs nothing."""
    tokenizer = built(3, **changes)
    for weight in (0.25, 0.0):
        tokenizer.zero_grad()
        loss_of(tokenizer, signals(4), rng_of(4), prefix_weight=weight).backward()
        assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []


def test_the_commitment_of_all_levels_adds_up() -> None:
    tokenizer = built(3)
    found, _, _ = tokenizer._climb(tokenizer._features(signals(4)), rng_of(4), 3)
    torch.testing.assert_close(tokenizer(signals(4), rng=rng_of(4)).loss, sum(q.loss for q in found))
    assert {f"quantization_error/{name}" for name in NAMES[3]} == tokenizer(signals(4), rng=rng_of(4)).stats.keys()


# Dropping finer levels -------------------------------------------------------------------------------------------
def test_dropped_samples_are_decoded_as_their_prefix_and_their_codes_stay() -> None:
    tokenizer, x = built(3, prefix_blocks=None, drop_finer=0.6), signals(40)
    assert tokenizer.prefixes() == (1, 2, 3)
    tokenizer.train()
    seen = tokenizer(x, rng=rng_of(40))
    tokenizer.discard()
    codes = tokenizer.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(codes, seen.codes, strict=True))
    each = torch.stack([tokenizer.decode(codes[:count]) for count in (1, 2, 3)], 1)
    distance = (each - seen.x[:, None]).flatten(2).abs().amax(2)
    assert distance.amin(1).max() < 1e-5
    kept = distance.argmin(1).bincount(minlength=3)
    assert 8 <= kept[2] <= 24 and min(kept[0], kept[1]) >= 4, kept
    part = tokenizer(x[7:9], rng=rng_of(2, first=7))
    torch.testing.assert_close(part.x, seen.x[7:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokenizer.eval()(x).x, tokenizer.decode(codes), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a StepRng is needed in training while drop_finer > 0"):
        VQVAE2(config(2, drop_finer=0.5, levels=(LevelConfig(quantizer=VQConfig(restart=0.0)),) * 2), SIGNALS[2])(x)


# Statistics ------------------------------------------------------------------------------------------------------
def test_initialisation_goes_from_coarse_to_fine_and_is_done_once() -> None:
    tokenizer, x = built(3), signals(48)
    z = tokenizer._level_latents(2, x).movedim(1, -1).reshape(-1, 5)
    error = (z - tokenizer.quantizers[2].vectors()[tokenizer.encode(x)[2].flatten()]).square().mean()
    assert error < 0.5 * z.var(0).mean(), "the codebook lies among the latents that the coarser codebooks give"
    before = [q.codebook.clone() for q in tokenizer.levels()]
    tokenizer.initialize([signals(48, seed=1)], StepRng(1, 0, torch.arange(48)), comm)
    assert all(torch.equal(a, q.codebook) for a, q in zip(before, tokenizer.levels(), strict=True))


def test_levels_with_equal_latents_draw_different_codes() -> None:
    """Two levels of one configuration and one set of latents: neither k-means nor restarts may pick the same vectors."""
    same = LevelConfig(quantizer=VQConfig(codes=16, dim=3, restart=0.9, decay=0.0))
    tokenizer = VQVAE2(config(2, levels=(same, same)), SIGNALS[2])
    z = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    rows = z.movedim(1, -1).reshape(-1, 3)
    tokenizer._level_latents = lambda level, x: z  # type: ignore[method-assign]
    tokenizer.initialize([signals(64)], rng_of(64), comm)
    top, bottom = tokenizer.levels()
    assert not torch.isin(top.codebook, bottom.codebook).any()
    with torch.no_grad():
        top.codebook[:8] += 100
        bottom.codebook.copy_(top.codebook)
    for name, quantizer in zip(tokenizer.names, (top, bottom), strict=True):
        quantizer.train()(z, rng_of(64).sub(name))
    stats = tokenizer.update(rng_of(1), comm)
    assert stats["restarts/top"] >= 8 and stats["restarts/bottom"] >= 8
    fresh = [q.codebook[:8] for q in (top, bottom)]
    assert torch.isin(fresh[0], rows).all() and not torch.equal(*fresh)


def test_accumulation_equals_the_big_batch() -> None:
    changes = {"dtype": torch.float64, "drop_finer": 0.3}
    whole, parts, x = built(3, **changes), built(3, **changes), signals(12).double()
    for at in range(3):
        step(whole, x, at, lr=0.1)
        parts.zero_grad()
        for rows in (slice(0, 5), slice(5, 12)):
            n = rows.stop - rows.start
            (loss_of(parts, x[rows], rng_of(n, at, rows.start)) * n / 12).backward()
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter -= 0.1 * parameter.grad
        parts.update(rng_of(12, at), comm)
    for name, value in whole.state_dict().items():
        assert float((value.double() - parts.state_dict()[name].double()).abs().max()) <= 1e-10, name


def test_a_nan_is_flagged_and_leaves_every_codebook() -> None:
    tokenizer, x = built(3), signals(4)
    x[2, 0, 3, 3] = float("nan")
    tokenizer.train()(x, rng=rng_of(4))
    assert not bool(tokenizer.finite())
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    tokenizer.discard()
    assert bool(tokenizer.finite()) and all(torch.equal(v, before[k]) for k, v in tokenizer.state_dict().items())
    with pytest.raises(ValueError, match="NaN or inf in row 2"):
        tokenizer.eval()(x)


def test_reestimating_moves_used_codes_to_the_means_of_latents_under_the_moved_coarser_codebooks() -> None:
    tokenizer, x = built(3), signals(24)
    with torch.no_grad():
        for parameter in tokenizer.to_codes.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    old = [q.codebook.clone() for q in tokenizer.levels()]
    tokenizer.train().reestimate([(x[:10], rng_of(10)), (x[10:], rng_of(14, first=10))], comm)
    assert tokenizer.training and bool(tokenizer.finite())
    for level, quantizer in enumerate(tokenizer.levels()):
        z = tokenizer._level_latents(level, x).detach().movedim(1, -1).reshape(-1, quantizer.dim)
        codes = torch.cdist(z, old[level]).argmin(1)
        for k in codes.unique().tolist():
            torch.testing.assert_close(quantizer.codebook[k], z[codes == k].mean(0), rtol=1e-4, atol=1e-5)


# Training --------------------------------------------------------------------------------------------------------
def test_training_lowers_every_error_and_makes_the_top_level_matter() -> None:
    tokenizer, x = built(2), signals(32)
    objective, optimizer = OBJECTIVES.build(ReconstructionConfig()), torch.optim.Adam(tokenizer.parameters(), 3e-3)
    first: Tensor | None = None
    for at in range(120):
        rng = rng_of(32, at)
        out = tokenizer(x, rng=rng)
        loss, _ = objective.tokenizer_loss(out, x, at, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.update(rng, comm)
        errors = torch.stack([(y - x).square().mean() for y in (out.x, out.prefixes[0][1])]).detach()
        first = errors if first is None else first
    assert (errors < 0.5 * first).all() and errors[0] < errors[1]
    codes = tokenizer.encode(x)
    swapped = tokenizer.decode([codes[0].roll(1, 0), codes[1]])
    assert (swapped - x).square().mean() > 3 * (tokenizer.decode(codes) - x).square().mean()


# Saving ----------------------------------------------------------------------------------------------------------
def test_saving_and_loading_keeps_every_code_and_pixel(tmp_path: Path) -> None:
    tokenizer, x = built(3), signals(5)
    step(tokenizer, signals(12))
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, VQVAE2) and loaded.config == config(3) and loaded.spec == tokenizer.spec
    codes = tokenizer.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(x), codes, strict=True))
    for count in (1, 2, 3):
        assert torch.equal(loaded.decode(codes[:count]), tokenizer.decode(codes[:count]))


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_fingerprint_follows_what_decides_the_codes_alone(conditioned: bool) -> None:
    tokenizer = built(3, conditioned=conditioned)
    before, whole, codes = tokenizer.fingerprint, tokenizer.weights_sha256, tokenizer.encode(signals(8))
    ladder = [tokenizer.from_codes[0], tokenizer.from_codes[1], tokenizer.up]
    after = [tokenizer.net.decoder, tokenizer.from_codes[2], tokenizer.heads, *([] if conditioned else ladder)]
    with torch.no_grad():
        for module in after:
            for parameter in module.parameters():
                parameter += 0.1
        for quantizer in tokenizer.levels():
            quantizer.counts += 1
            quantizer.sums += 1
    assert tokenizer.fingerprint == before and tokenizer.weights_sha256 != whole
    assert all(torch.equal(a, b) for a, b in zip(codes, tokenizer.encode(signals(8)), strict=True))
    decide = [tokenizer.net.encoder, *tokenizer.down, *tokenizer.to_codes, *(ladder if conditioned else [])]
    for tensor in [q.codebook for q in tokenizer.levels()] + [p for module in decide for p in module.parameters()]:
        saved = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-3
        assert tokenizer.fingerprint != before
        with torch.no_grad():
            tensor.copy_(saved)


# What does not fit -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": [{}]}, "levels: 1; expected at least two"),
        ({"levels": [{}, {}, {}]}, "ladder: 1 grids; expected 2, one for each level but the finest"),
        ({"levels": [{"name": "a"}, {"name": "a"}]}, r"levels: names \('a', 'a'\)"),
        ({"levels": [{"name": "a/0"}, {}]}, "different ones without a slash or a dot"),
        ({"levels": [{"name": "a.b"}, {}]}, r"levels: names \('a.b', 'bottom'\); expected different ones without a slash or a dot"),
        ({"levels": [{"name": "stop"}, {}]}, "levels: 'stop' names no level: start, stop, shape are keys"),
        ({"ladder": [{"factor": 3}]}, "ladder.0: factor: 3; expected a power of two"),
        ({"ladder": [{"widht": 3}]}, "ladder.0.widht: unknown key; did you mean 'width'"),
        ({"levels": [{}, {"quantizer": {"cods": 3}}]}, r"levels.1.quantizer.cods: unknown key; did you mean 'codes'"),
        ({"drop_finer": 1.0}, "drop_finer: Input should be less than 1"),
        ({"prefix_blocks": -1}, "prefix_blocks: Input should be greater than or equal to 0"),
    ],
)
def test_d1_configurations_that_make_no_hierarchy_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VQVAE2Config.from_dict(changes)


def test_grids_and_conditions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ladder.0: factor 4 does not divide the finer grid \(14, 14\), signal \(28, 28\)"):
        VQVAE2(VQVAE2Config(ladder=(GridConfig(factor=4),)), SignalSpec("image", 1, (28, 28)))
    with pytest.raises(ValueError, match="VQVAE2 has no use for a condition"):
        built()(signals(2), Cond(label=torch.zeros(2, dtype=torch.int64)), rng_of(2))
    with pytest.raises(ValueError, match=r"codes of level 'bottom': values in \[17, 17\]"):
        built().decode([torch.zeros(1, 4, 4, dtype=torch.int64), torch.full((1, 8, 8), 17)])
