"""What --dry_run counts is what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from intarsia.meta import build_on_meta
from intarsia.rng import StepRng
from intarsia.run_config import OptimConfig
from intarsia.specs import SignalSpec
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.sizes import activation_bytes, describe, parts
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from stage1_tokenizer.tokenizers.vqvae2 import VQVAE2, VQVAE2Config

SIGNAL = SignalSpec("image", 3, (16, 16))


@pytest.mark.parametrize("kind", [name for name in QUANTIZERS.names() if not QUANTIZERS.get(name).__module__.startswith("tests.")])
def test_every_quantiser_can_be_counted_without_memory(kind):
    tokenizer = build_on_meta(VQVAE, VQVAEConfig(quantizer=QUANTIZERS.config(kind)()), SIGNAL)
    lines = list(describe(tokenizer, OptimConfig(), kept=2))
    assert lines[0].startswith("vqvae: ") and any(line.startswith("activations: ") for line in lines)
    assert sum(parts(tokenizer).values()) == sum(p.numel() for p in tokenizer.parameters())


@pytest.mark.parametrize(("cls", "config"), [(VQVAE, VQVAEConfig()), (VQVAE2, VQVAE2Config())])
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
