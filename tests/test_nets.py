"""The nets: any number of axes, mirrored shapes, honest receptive fields."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.specs import SignalSpec
from stage1_tokenizer.nets.base import NETS
from stage1_tokenizer.nets.blocks import AttentionBlock, norm_layer, unpatch
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.nets.ladder import Down, GridConfig, Head, Up

SIGNALS = {1: SignalSpec("audio", 2, (32,)), 2: SignalSpec("image", 3, (16, 24)), 3: SignalSpec("video", 1, (8, 8, 16))}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_features_lie_on_the_grid_and_the_decoder_returns_the_signal_shape(axes: int, patch: int, upsample: str) -> None:
    signal = SIGNALS[axes]
    net = NETS.build(ConvConfig(widths=(8, 16), blocks=(1, 1), encoder_blocks=(0, 1), patch=patch, upsample=upsample), signal)
    x = torch.randn(2, signal.channels, *signal.shape)
    features = net.encode(x)
    assert net.stride == (2 * patch,) * axes
    assert features.shape == (2, net.width, *net.grid) == (2, 16, *(s // (2 * patch) for s in signal.shape))
    assert net.decode(features).shape == x.shape
    assert net.last_layer.shape[0] == signal.channels * patch**axes


def test_unpatch_puts_each_channel_at_its_place() -> None:
    x = torch.arange(2 * 4 * 3 * 2).reshape(1, 8, 3, 2)
    y = unpatch(x, 2)
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(y[0, c, i::2, j::2], x[0, 4 * c + 2 * i + j])


def test_unpatch_takes_a_size_for_each_axis() -> None:
    x = torch.arange(6 * 2 * 2).reshape(1, 6, 2, 2)
    y = unpatch(x, (3, 1))
    assert y.shape == (1, 2, 6, 2)
    assert all(torch.equal(y[0, c, i::3], x[0, 3 * c + i]) for c in range(2) for i in range(3))


def test_a_signal_that_the_stride_does_not_divide_is_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match=r"stride of 8; signal shape \(28, 28\)"):
        NETS.build(ConvConfig(patch=1, widths=(8, 8, 8, 8), blocks=(0,) * 4, encoder_blocks=None), SignalSpec("image", 1, (28, 28)))


def test_block_counts_must_match_the_widths() -> None:
    with pytest.raises(ConfigError, match="blocks"):
        ConvConfig.from_dict({"widths": [8, 16], "blocks": [1]})


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize(("patch", "blocks", "encoder_blocks"), [(1, (1, 2, 1), (0, 1, 1)), (2, (1, 1), (1, 0)), (4, (1,), (0,))])
def test_no_code_or_sample_depends_on_more_than_the_halo(
    upsample: str, patch: int, blocks: tuple[int, ...], encoder_blocks: tuple[int, ...]
) -> None:
    widths = (4,) * len(blocks)
    config = ConvConfig(widths=widths, blocks=blocks, encoder_blocks=encoder_blocks, patch=patch, norm="none", upsample=upsample)
    stride = patch * 2 ** (len(blocks) - 1)
    cells = 25
    net = NETS.build(config, SignalSpec("audio", 1, (cells * stride,))).double()
    assert net.halo is not None
    x = torch.randn(1, 1, cells * stride, dtype=torch.float64, requires_grad=True)
    net.encode(x)[0, :, cells // 2].square().sum().backward()
    assert x.grad is not None
    touched = x.grad[0, 0].nonzero().flatten() // stride - cells // 2
    encoder_reach = int(touched.abs().max())
    h = torch.randn(1, 4, cells, dtype=torch.float64, requires_grad=True)
    here = slice(cells // 2 * stride, (cells // 2 + 1) * stride)
    net.decode(h)[0, 0, here].square().sum().backward()
    assert h.grad is not None
    decoder_reach = int((h.grad[0].abs().sum(0).nonzero().flatten() - cells // 2).abs().max())
    assert net.halo == max(encoder_reach, decoder_reach)


def test_group_norm_makes_the_reach_global() -> None:
    assert NETS.build(ConvConfig(), SignalSpec("image", 1, (28, 28))).halo is None


# Attention -------------------------------------------------------------------------------------------------------
def test_attention_is_that_of_every_cell_over_the_whole_grid() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(2, 128, "none").double(), torch.randn(2, 128, 3, 4, dtype=torch.float64)
    assert block.heads == 2
    q, k, v = (block.qkv(x).flatten(2)[:, i * 128 : (i + 1) * 128] for i in range(3))
    out = torch.zeros(2, 128, 12, dtype=torch.float64)
    for head in range(2):
        part = slice(64 * head, 64 * head + 64)
        for cell in range(12):
            weights = torch.softmax((q[:, part, cell, None] * k[:, part]).sum(1) / 8, 1)
            out[:, part, cell] = (weights[:, None] * v[:, part]).sum(2)
    torch.testing.assert_close(block(x), x + block.out(out.view(2, 128, 3, 4)))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_attention_at_chosen_stages_makes_the_reach_global_and_leaves_the_others_names(axes: int) -> None:
    common = {"widths": (8, 16), "blocks": (1, 1), "encoder_blocks": (1, 1), "norm": "none"}
    plain, with_it = (NETS.build(ConvConfig(attention=a, **common), SIGNALS[axes]) for a in ((), (1,)))
    blocks = [(name, m) for name, m in with_it.named_modules() if isinstance(m, AttentionBlock)]
    assert [m.qkv.in_channels for _, m in blocks] == [16, 16], "in the encoder and in the decoder, on the coarse grid alone"
    assert plain.halo is not None and with_it.halo is None and set(plain.state_dict()).isdisjoint(blocks[0][0])
    x = torch.randn(2, SIGNALS[axes].channels, *SIGNALS[axes].shape, requires_grad=True)
    features = with_it.encode(x)
    features.flatten(2)[0, :, 0].sum().backward()
    assert x.grad is not None and (x.grad[0] != 0).flatten(1).all() and not x.grad[1].any()
    assert with_it.decode(features).shape == x.shape


@pytest.mark.parametrize("stages", [(2,), (-1,), (0, 0)])
def test_attention_at_a_stage_that_is_not_there_is_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"attention: .* expected different stages in \[0, 1\]"):
        ConvConfig.from_dict({"widths": [8, 16], "blocks": [1, 1], "attention": list(stages)})


def test_names_and_hashed_configuration_of_a_net_without_attention_are_those_of_released_ones() -> None:
    """A trained pipeline ships with the package: its weights must load and its fingerprint must stay."""
    from intarsia.config import hashed

    net = NETS.build(ConvConfig(widths=(8, 16), blocks=(1, 2), encoder_blocks=(1, 0)), SIGNALS[2])
    parts = sorted({name.rsplit(".", 1)[0] for name, _ in net.named_parameters()})
    blocks = ("encoder.1", "decoder.0", "decoder.1", "decoder.4")
    expected = ["encoder.0", "encoder.2.norm", "encoder.3", "encoder.4.norm", "decoder.2.norm", "decoder.3.conv"]
    expected += ["decoder.5.norm", "decoder.6", *(f"{b}.{part}" for b in blocks for part in ("conv1", "conv2", "norm1", "norm2"))]
    assert parts == sorted(expected)
    assert list(hashed(ConvConfig())) == ["type", "widths", "blocks", "encoder_blocks", "patch", "norm", "upsample"]
    assert hashed(ConvConfig(attention=(1,)))["attention"] == [1]


# The ladder ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_up_undoes_the_shape_of_down_and_every_part_is_used(axes: int, factor: int, upsample: str) -> None:
    grid = GridConfig(width=16, factor=factor, blocks=1, encoder_blocks=1, attention=True)
    down, up = Down(axes, grid, 8, "group"), Up(axes, grid, 8, "group", upsample)
    x = torch.randn(2, 8, *(8,) * axes)
    assert down(x).shape == (2, 16, *(8 // factor,) * axes) and up(down(x)).shape == x.shape
    up(down(x)).sum().backward()
    assert all(p.grad is not None for module in (down, up) for p in module.parameters())


HEADS = [
    ((1, 1), 0, (1, 1)),
    ((2, 2), 0, (2, 2)),
    ((16, 16), 3, (2, 2)),
    ((6, 6), 1, (3, 3)),
    ((2, 8), 0, (2, 8)),
    ((3, 6), 0, (3, 6)),
]


@pytest.mark.parametrize(("stride", "doublings", "patch"), HEADS)
def test_a_head_leads_from_any_grid_to_the_signal(stride: tuple[int, int], doublings: int, patch: tuple[int, int]) -> None:
    head = Head(2, 64, stride, 3, 1, "none", "nearest")
    assert head(torch.zeros(1, 64, 2, 3)).shape == (1, 3, 2 * stride[0], 3 * stride[1])
    assert head.patch == patch and sum(type(layer).__name__ == "Upsample" for layer in head.layers) == doublings


def test_any_width_has_a_norm() -> None:
    groups = {width: norm_layer("group", width).num_groups for width in range(1, 300)}
    assert all(width % n == 0 and (width // n >= 8 or n == 1) for width, n in groups.items())
    assert {width: groups[width] for width in (8, 33, 64, 96, 128, 512 // 2)} == {8: 1, 33: 1, 64: 8, 96: 4, 128: 16, 256: 32}


def test_a_patch_is_at_least_one_sample() -> None:
    with pytest.raises(ConfigError, match="patch: .*greater than or equal to 1"):
        ConvConfig.from_dict({"patch": 0})
