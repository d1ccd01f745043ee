"""What --dry_run counts is what a real step keeps."""

from __future__ import annotations

import math

import pytest
import torch

from intarsia.meta import build_on_meta
from intarsia.rng import StepRng
from intarsia.run_config import OptimConfig
from intarsia.specs import SignalSpec
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.sizes import NUMBERS_AT_ONCE, activation_bytes, describe, parts, rows_at_once
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from stage1_tokenizer.tokenizers.vqvae2 import VQVAE2, VQVAE2Config

SIGNAL = SignalSpec("image", 3, (16, 16))


@pytest.mark.parametrize("kind", [name for name in QUANTIZERS.names() if not QUANTIZERS.get(name).__module__.startswith("tests.")])
def test_every_quantiser_can_be_counted_without_memory(kind):
    tokenizer = build_on_meta(VQVAE, VQVAEConfig(quantizer=QUANTIZERS.config(kind)()), SIGNAL)
    lines = list(describe(tokenizer, OptimConfig(), kept=2))
    assert lines[0].startswith("vqvae: ") and any(line.startswith("activations: ") for line in lines)
    assert sum(parts(tokenizer).values()) == sum(p.numel() for p in tokenizer.parameters())


TOLD = VQVAEConfig(quantizer=ResidualConfig(stages=3, dropout=0.5, inner=VQConfig(codes=8, dim=32)), by_depth=True, prefix_decoders=(1, 2))


@pytest.mark.parametrize(("cls", "config"), [(VQVAE, VQVAEConfig()), (VQVAE, TOLD), (VQVAE2, VQVAE2Config())])
def test_activations_are_those_that_a_real_forward_keeps(cls, config):
    torch.manual_seed(0)
    tokenizer = cls(config, SIGNAL)
    sizes = {}
    own = {p.data_ptr() for p in tokenizer.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = tokenizer(torch.zeros(1, 3, 16, 16), rng=StepRng(0, 0, torch.zeros(1, dtype=torch.int64)))
    assert out.x.requires_grad
    assert activation_bytes(build_on_meta(cls, config, SIGNAL)) == pytest.approx(sum(sizes.values()), rel=0.05)


def images(side, channels=3):
    return SignalSpec("image", channels, (side, side))


@pytest.mark.parametrize(
    ("signal", "micro_batch", "rows"),
    [
        (images(28, 1), 32, 256),
        (images(64), 48, 256),
        (images(209), 32, 256),
        (images(384), 4, 72),
        (images(384), 32, 64),
        (images(1024), 4, 8),
        (images(1024), 32, 32),  # the tokenizer pads fewer to so many anyway
        (images(8192), 1, 1),
        (SignalSpec("audio", 1, (1 << 20,), 16000), 1, 32),
    ],
)
def test_a_pass_takes_as_many_signals_as_fit_in_whole_micro_batches(signal, micro_batch, rows):
    found = rows_at_once(signal, micro_batch)
    assert found == rows and (found <= micro_batch or found * signal.channels * math.prod(signal.shape) <= NUMBERS_AT_ONCE)
    assert rows_at_once(signal, micro_batch, 3) <= 3
