"""VQVAE: codes belong to a signal alone, decoding gives what training saw, the fingerprint follows the code path."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.objectives.base import OBJECTIVES
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.base import QUANTIZERS, QuantizerConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.residual import Residual, ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import Tokenizer, TokenizerOutput
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig

NET = ConvConfig(widths=(8, 16), blocks=(1, 1), encoder_blocks=None, patch=1)
CONFIG = VQVAEConfig(micro_batch=8, net=NET, quantizer=VQConfig(codes=32, dim=4))
SIGNALS = {1: SignalSpec("audio", 1, (32,)), 2: SignalSpec("image", 3, (16, 16)), 3: SignalSpec("video", 1, (4, 8, 8))}


def signals(signal: SignalSpec, n: int, seed: int = 0) -> Tensor:
    return StepRng(seed, 0, torch.arange(n)).uniform("x", signal.channels, *signal.shape) * 2 - 1


def built(axes: int = 2) -> VQVAE:
    torch.manual_seed(0)
    tokenizer = VQVAE(CONFIG, SIGNALS[axes])
    tokenizer.initialize([signals(SIGNALS[axes], 64)], StepRng(0, 0, torch.arange(64)), comm)
    return tokenizer


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_spec_tells_the_shapes_of_the_codes(axes: int) -> None:
    tokenizer = built(axes)
    grid = tuple(s // 2 for s in SIGNALS[axes].shape)
    assert tokenizer.spec.levels == (LevelSpec("codes", 32, grid),)
    codes = tokenizer.encode(signals(SIGNALS[axes], 3))
    assert [c.shape for c in codes] == [(3, *grid)] and codes[0].dtype == torch.int64
    assert tokenizer.decode(codes).shape == (3, SIGNALS[axes].channels, *SIGNALS[axes].shape)


def test_any_size_that_the_stride_divides_is_encoded_and_decoded() -> None:
    tokenizer = built()
    codes = tokenizer.encode(torch.zeros(2, 3, 24, 10))
    assert codes[0].shape == (2, 12, 5)
    assert tokenizer.decode(codes).shape == (2, 3, 24, 10)


@pytest.mark.parametrize("kind", QUANTIZERS.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_are_cast_and_quantisers_stay_wide(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = signals(SIGNALS[2], 3)
    for config in (QUANTIZERS.config(kind)(), *([VQConfig(codes=16, dim=4, update="gradient")] if kind == "vq" else [])):
        tokenizer = VQVAE(CONFIG.replace(quantizer=config), SIGNALS[2])
        tokenizer.initialize([signals(SIGNALS[2], 64)], StepRng(0, 0, torch.arange(64)), comm)
        assert tokenizer.to(dtype).dtype == dtype
        codes = tokenizer.encode(x)
        assert tokenizer.decode(codes).dtype == dtype and tokenizer.decode(codes).isfinite().all()
        assert all(t.dtype in (torch.float32, torch.float64) for t in tokenizer.quantizer.parameters())


def test_the_codes_of_a_signal_do_not_depend_on_its_batch() -> None:
    tokenizer, x = built(), signals(SIGNALS[2], 21)
    together = tokenizer.encode(x)[0]
    decoded = tokenizer.decode([together])
    for rows in ([0], [20, 3], list(range(20, -1, -1))):
        assert torch.equal(tokenizer.encode(x[rows])[0], together[rows])
        assert torch.equal(tokenizer.decode([together[rows]]), decoded[rows])


def test_decoding_the_codes_gives_what_training_saw() -> None:
    tokenizer, x = built(), signals(SIGNALS[2], 8)
    tokenizer.train()
    seen = tokenizer(x, None, StepRng(0, 0, torch.arange(8)))
    tokenizer.discard()
    codes = tokenizer.encode(x)
    assert tokenizer.training, "the mode is restored"
    assert torch.equal(codes[0], seen.codes[0])
    torch.testing.assert_close(tokenizer.decode(codes), seen.x, rtol=1e-6, atol=1e-6)


def test_training_lowers_the_loss_and_uses_the_codebook() -> None:
    torch.manual_seed(0)
    tokenizer, x = built(), signals(SIGNALS[2], 16) * 0.1 + signals(SIGNALS[2], 16)[:, :, :1] * 0.9
    objective = OBJECTIVES.build(ReconstructionConfig())
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for step in range(60):
        rng = StepRng(0, step, torch.arange(16))
        loss, stats = objective.tokenizer_loss(tokenizer(x, None, rng), x, step, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.update(rng, comm)
        losses.append(stats["reconstruction"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert tokenizer.encode(x)[0].unique().numel() > 16


def test_the_fingerprint_follows_the_code_path_alone() -> None:
    tokenizer = built()
    before, whole = tokenizer.fingerprint, tokenizer.weights_sha256
    with torch.no_grad():
        for parameter in (*tokenizer.net.decoder.parameters(), *tokenizer.from_codes.parameters()):
            parameter += 1
        tokenizer.quantizer.counts += 1
        tokenizer.quantizer.sums += 1
    assert tokenizer.fingerprint == before and tokenizer.weights_sha256 != whole
    for tensor in (tokenizer.quantizer.codebook, tokenizer.to_codes.bias, tokenizer.net.encoder[0].weight):
        saved = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-3
        assert tokenizer.fingerprint != before
        with torch.no_grad():
            tensor.copy_(saved)
    assert tokenizer.fingerprint == before


def test_saving_and_loading_keeps_every_code_and_pixel(tmp_path: Path) -> None:
    tokenizer, x = built(), signals(SIGNALS[2], 5)
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, VQVAE) and loaded.config == CONFIG and loaded.signal == SIGNALS[2]
    assert loaded.spec == tokenizer.spec
    codes = tokenizer.encode(x)
    assert torch.equal(loaded.encode(x)[0], codes[0])
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    before = loaded.quantizer.codebook.clone()
    loaded.initialize([signals(SIGNALS[2], 64, seed=1)], StepRng(1, 0, torch.arange(64)), comm)
    assert torch.equal(loaded.quantizer.codebook, before), "a loaded codebook counts as initialised"


def test_reestimating_moves_each_used_code_to_the_mean_of_its_latents() -> None:
    tokenizer, x = built(), signals(SIGNALS[2], 24)
    with torch.no_grad():
        tokenizer.to_codes.weight += 0.05 * torch.randn_like(tokenizer.to_codes.weight)
    z = tokenizer.latents(x).detach().movedim(1, -1).reshape(-1, 4)
    codes = tokenizer.eval()(x).codes[0].flatten()
    tokenizer.reestimate([(x[:10], StepRng(0, 0, torch.arange(10))), (x[10:], StepRng(0, 0, torch.arange(10, 24)))], comm)
    for k in codes.unique().tolist():
        torch.testing.assert_close(tokenizer.quantizer.codebook[k], z[codes == k].mean(0), rtol=1e-4, atol=1e-5)


def test_stages_are_reestimated_one_after_the_other_each_on_what_the_new_ones_before_it_leave() -> None:
    torch.manual_seed(0)
    tokenizer, x = VQVAE(CONFIG.replace(quantizer=ResidualConfig(stages=3, inner=CONFIG.quantizer)), SIGNALS[2]), signals(SIGNALS[2], 24)
    tokenizer.initialize([signals(SIGNALS[2], 64)], StepRng(0, 0, torch.arange(64)), comm)
    with torch.no_grad():
        tokenizer.to_codes.weight += 0.05 * torch.randn_like(tokenizer.to_codes.weight)
    before = copy.deepcopy(tokenizer.quantizer).eval()
    tokenizer.reestimate([(x[:10], StepRng(0, 0, torch.arange(10))), (x[10:], StepRng(0, 0, torch.arange(10, 24)))], comm)
    left, after = tokenizer.latents(x).detach().movedim(1, -1).reshape(-1, 4), tokenizer.quantizer.eval()
    for i in range(3):
        codes = before.part(i)(left[..., None]).codes[0][:, 0]
        for k in codes.unique().tolist():
            torch.testing.assert_close(after.part(i).codebook[k], left[codes == k].mean(0), rtol=1e-4, atol=1e-5)
        left = left - after.part(i)(left[..., None]).z[..., 0].detach()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"expected \(batch, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 15), r"the stride \(2, 2\) divides"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floating point"),
        (torch.full((2, 3, 16, 16), 255.0), "row 0 holds 255"),
        (torch.stack([torch.zeros(3, 16, 16), torch.full((3, 16, 16), float("nan"))]), "row 1 holds nan"),
    ],
)
def test_signals_that_are_none_are_refused_and_leave_the_codebook(x: Tensor, message: str) -> None:
    tokenizer = built()
    before = tokenizer.quantizer.codebook.clone()
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(x)
    assert torch.equal(tokenizer.quantizer.codebook, before)


def test_codes_and_conditions_that_do_not_fit_are_refused() -> None:
    tokenizer = built()
    good = torch.zeros(1, 8, 8, dtype=torch.int64)
    for codes, message in [([good, good], "2 levels"), ([good + 32], r"\[0, 31\]"), ([good - 1], r"\[0, 31\]")]:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(codes)
    with pytest.raises(ValueError, match="no use for a condition"):
        tokenizer.decode([good], Cond(label=torch.zeros(1, dtype=torch.int64)))


def test_the_objective_weighs_reconstructions_prefixes_and_quantiser_terms() -> None:
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    out = TokenizerOutput(x + 0.5, (), torch.tensor(0.3), prefixes=((1, x - 0.25),))
    rng = StepRng(0, 0, torch.arange(4))
    loss, stats = OBJECTIVES.build(ReconstructionConfig(weight=2.0, prefix_weight=0.1)).tokenizer_loss(out, x, 0, rng)
    torch.testing.assert_close(loss, torch.tensor(2.0 * (0.25 + 0.1 * 0.0625) + 0.3))
    torch.testing.assert_close(stats["reconstruction"], torch.tensor(0.25))
    loss, _ = OBJECTIVES.build(ReconstructionConfig(error="l1", weight=2.0, prefix_weight=0.0)).tokenizer_loss(out, x, 0, rng)
    torch.testing.assert_close(loss, torch.tensor(2.0 * 0.5 + 0.3))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_decoder_that_is_told_the_depth_decodes_each_prefix_as_training_saw_it(axes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantizer = ResidualConfig(stages=3, dropout=1.0, inner=VQConfig(codes=16, dim=4))
    plain = VQVAE(CONFIG.replace(quantizer=quantizer), SIGNALS[axes])
    told = VQVAE(CONFIG.replace(quantizer=quantizer, by_depth=True), SIGNALS[axes])
    assert not told.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x, rng = signals(SIGNALS[axes], 8), StepRng(0, 1, torch.arange(8))
    codes = plain.eval().encode(x)
    for maps in (1, 2, 3):
        torch.testing.assert_close(told.eval().decode(codes[:maps]), plain.decode(codes[:maps]))  # at first it makes no difference
    changed = [p for name, p in told.named_parameters() if "told" in name]
    for table in changed:
        nn.init.normal_(table, std=0.5)
    out = told.train()(x, rng=rng)
    assert isinstance(told.quantizer, Residual)
    depth = told.quantizer.depth(rng)
    assert len(set(depth.tolist())) == 3
    out.x.square().sum().backward()
    assert len(changed) == 2 * 6 and all(p.grad is not None and (p.grad != 0).any(1).all() for p in changed)
    told.eval().save_pretrained(tmp_path / "model")
    again = VQVAE.from_pretrained(tmp_path / "model")
    for i, maps in enumerate(depth.tolist()):
        torch.testing.assert_close(again.decode([c[i : i + 1] for c in out.codes[:maps]]), out.x[i : i + 1].detach(), atol=1e-5, rtol=1e-5)
    assert again.fingerprint == told.fingerprint


@pytest.mark.parametrize("inner", [VQConfig(codes=16, dim=4), VQConfig(codes=16, dim=4, update="gradient"), FSQConfig(levels=(3, 3, 3))])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_prefix_decoder_learns_from_every_sample_and_leaves_the_codes_alone(axes: int, inner: QuantizerConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantizer = ResidualConfig(stages=3, dropout=0.5, depth_weights=(0, 1, 1), inner=inner)
    plain = VQVAE(CONFIG.replace(quantizer=quantizer), SIGNALS[axes])
    own = VQVAE(CONFIG.replace(quantizer=quantizer, prefix_decoders=(1,)), SIGNALS[axes])
    found = own.load_state_dict(plain.state_dict(), strict=False)
    assert found.missing_keys and all(key.startswith("prefix_decoders.1.") for key in found.missing_keys)
    assert not any("encoder" in key for key in found.missing_keys)
    assert own.prefixes() == plain.prefixes() == (1, 2, 3)
    before = own.fingerprint
    nn.init.normal_(own.prefix_decoders["1"].from_codes.weight)
    assert own.fingerprint == before
    x, rng = signals(SIGNALS[axes], 8), StepRng(0, 1, torch.arange(8))
    out, was = own.train()(x, rng=rng), plain.train()(x, rng=rng)
    torch.testing.assert_close(out.x, was.x)
    ((count, first),) = out.prefixes
    assert count == 1 and first.shape == x.shape
    (first - x).square().mean().backward()
    reached = {name for name, p in own.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert reached == {name for name, _ in own.named_parameters() if name.startswith("prefix_decoders.1.")}
    own.eval()
    torch.testing.assert_close(own.decode(out.codes[:1]), first.detach(), atol=1e-5, rtol=1e-5)
    for maps in (2, 3):
        torch.testing.assert_close(own.decode(out.codes[:maps]), plain.eval().decode(out.codes[:maps]))
    own.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(VQVAE.from_pretrained(tmp_path / "model").decode(out.codes[:1]), own.decode(out.codes[:1]))


@pytest.mark.parametrize(
    ("quantizer", "counts", "why"),
    [
        (VQConfig(codes=16, dim=4), (1,), "1, but this vq quantizer decodes from these counts of leading maps: none"),
        (ResidualConfig(stages=3, dropout=0.5, inner=VQConfig(codes=16, dim=4)), (1, 3), "3, but this residual .* leading maps: 1, 2"),
        (ResidualConfig(stages=3, dropout=0.5, inner=VQConfig(codes=16, dim=4)), (2, 1), "expected different counts of maps that rise"),
    ],
)
def test_prefix_decoders_are_of_prefixes_that_decode(quantizer: QuantizerConfig, counts: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=f"prefix_decoders: .*{why}"):
        VQVAE(CONFIG.replace(quantizer=quantizer, prefix_decoders=counts), SIGNALS[2])


@pytest.mark.parametrize("quantizer", [VQConfig(codes=16, dim=4), ResidualConfig(stages=3, inner=VQConfig(codes=16, dim=4))])
def test_a_depth_that_is_always_the_same_is_not_told(quantizer: QuantizerConfig) -> None:
    with pytest.raises(ValueError, match=f"by_depth: true, but this {quantizer.type_name} quantizer decodes from all of its maps alone"):
        VQVAE(CONFIG.replace(quantizer=quantizer, by_depth=True), SIGNALS[2])
