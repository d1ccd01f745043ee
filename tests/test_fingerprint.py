"""What a fingerprint is taken of: all that decides a code, for any registered quantiser and for one of a user's own."""

from __future__ import annotations

import pytest
import torch

from intarsia.rng import StepRng
from intarsia.specs import SignalSpec
from stage1_tokenizer.nets.base import NETS
from stage1_tokenizer.nets.conv import ConvNet
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantizer
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from tests.plain_vq import PlainVQ

OWN = "a user's own"


@pytest.mark.parametrize("name", [*QUANTIZERS.names(), OWN])
def test_a_tensor_outside_the_fingerprint_decides_no_code_and_no_vector(name: str) -> None:
    torch.manual_seed(0)
    quantizer: Quantizer = PlainVQ() if name == OWN else QUANTIZERS.build(QUANTIZERS.config(name)())
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(700, quantizer.dim, 2, 2, generator=draw)
    quantizer.initialize(z.movedim(1, -1).flatten(0, -2), StepRng(0, 0, torch.arange(700)))
    quantizer.eval()
    codes, vectors = quantizer(z).codes, quantizer(z).z
    inside = quantizer.code_tensors()
    outside = {key: t for key, t in quantizer.state_dict(keep_vars=True).items() if key not in inside}
    with torch.no_grad():
        for tensor in outside.values():
            if tensor.dtype != torch.bool:
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 1)
    assert all(torch.equal(a, b) for a, b in zip(quantizer(z).codes, codes, strict=True))
    assert torch.equal(quantizer(z).z, vectors) and torch.equal(quantizer.decode(codes), vectors)
    if name == OWN:
        assert "codebook" in inside


def test_a_net_whose_encoder_has_no_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VQVAEConfig()
    signal = SignalSpec("image", 1, (28, 28))
    made = NETS.build(config.net, signal)
    assert isinstance(made, ConvNet)
    made.analysis = made.encoder
    del made.encoder
    monkeypatch.setattr(NETS, "build", lambda *a: made)
    with pytest.raises(ValueError, match="tokenizer.net: a conv has no module 'encoder'"):
        VQVAE(config, signal)
