"""Product quantisation: groups of channels side by side, each exactly what its quantiser alone makes of them."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.product import Product, ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig

INNER = VQConfig(codes=16, dim=4, decay=0.8)


def rng(step: int, n: int) -> StepRng:
    return StepRng(0, step, torch.arange(n))


def built(groups: int = 3) -> Product:
    torch.manual_seed(0)
    q = Product(ProductConfig(groups=groups, inner=INNER))
    q.initialize(torch.randn(400, 4 * groups), rng(0, 400))
    return q


def test_levels_are_numbered_and_every_group_has_its_own_dimensions() -> None:
    q = built()
    assert q.dim == 12 and q.prefixes() == (3,)
    assert q.level_specs("top", (2, 5)) == tuple(LevelSpec(f"top/{i}", 16, (2, 5)) for i in range(3))
    fsq = Product(ProductConfig(groups=2, inner=FSQConfig(levels=(5, 3))))
    assert fsq.dim == 4 and [level.factors for level in fsq.level_specs("codes", (1,))] == [(5, 3)] * 2


def test_a_group_is_what_its_quantiser_makes_of_its_channels_over_several_steps() -> None:
    q = built()
    alone = []
    for i in range(3):
        vq = VQ(INNER)
        vq.load_state_dict(q.part(i).state_dict())
        alone.append(vq)
    for step in range(5):
        z = torch.randn(6, 12, 7)
        out = q(z, rng(step, 6))
        parts = [vq(z[:, 4 * i : 4 * i + 4], rng(step, 6).sub(i)) for i, vq in enumerate(alone)]
        assert torch.equal(out.z, torch.cat([part.z for part in parts], 1))
        assert all(torch.equal(c, part.codes[0]) for c, part in zip(out.codes, parts, strict=True))
        torch.testing.assert_close(out.loss, torch.stack([part.loss for part in parts]).mean())
        q.update(rng(step, 1), comm)
        for i, vq in enumerate(alone):
            vq.update(rng(step, 1).sub(i), comm)
            assert all(torch.equal(t, q.part(i).state_dict()[name]) for name, t in vq.state_dict().items())


def test_groups_draw_different_latents_for_their_restarts() -> None:
    """Equal channels in all groups: the same draws would restart the same codes at the same places."""
    torch.manual_seed(0)
    q = Product(ProductConfig(groups=2, inner=INNER.replace(init="normal", restart=0.3)))
    with torch.no_grad():
        q.part(1).load_state_dict(q.part(0).state_dict())
    for step in range(20):
        z = torch.randn(6, 4, 7) + 30
        q(torch.cat([z, z], 1), rng(step, 6))
        q.update(rng(step, 1), comm)
    assert not torch.equal(q.part(0).codebook, q.part(1).codebook)


def test_a_nan_in_one_group_keeps_the_step_out_of_all() -> None:
    q, z = built(), torch.randn(4, 12, 5)
    q(z, rng(0, 4))
    z[1, 11, 0] = float("nan")
    q(z, rng(1, 4))
    assert not q.finite()
    q.discard()
    assert q.finite()
    q.eval()
    with pytest.raises(ValueError, match="row 1"):
        q(z)


def test_effective_codes_multiply() -> None:
    q = built().eval()
    out = q(torch.randn(50, 12, 40))
    tuples = torch.stack([c.flatten() for c in out.codes], 1).unique(dim=0)
    assert len(tuples) > 16 * 16


def test_statistics_are_named_by_group() -> None:
    q = built(2)
    out = q(torch.randn(4, 8, 5), rng(0, 4))
    assert {"quantization_error/0", "quantization_error/1"} <= out.stats.keys()
    assert {"perplexity/0", "perplexity/1"} <= q.update(rng(0, 1), comm).keys()


def test_quantiser_dropout_inside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"product.inner: residual has quantiser dropout; only the outermost quantiser may"):
        Product(ProductConfig(groups=2, inner=ResidualConfig(stages=2, inner=INNER, dropout=0.5)))
    nested = Product(ProductConfig(groups=2, inner=ResidualConfig(stages=2, inner=INNER)))
    assert [level.name for level in nested.level_specs("codes", (1,))] == ["codes/0/0", "codes/0/1", "codes/1/0", "codes/1/1"]


def test_wrong_settings_and_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups"):
        ProductConfig.from_dict({"groups": 0})
    with pytest.raises(ConfigError, match="inner.cods"):
        ProductConfig.from_dict({"inner": {"type": "vq", "cods": 3}})
    code = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 maps; product decodes 3"):
        built().decode((code, code))
