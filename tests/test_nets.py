"""The nets: any number of axes, mirrored shapes, honest receptive fields."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.specs import SignalSpec
from stage1_tokenizer.nets.base import NETS
from stage1_tokenizer.nets.conv import ConvConfig, unpatch

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
