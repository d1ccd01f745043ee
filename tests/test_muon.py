"""Muon: against singular values, torch's own Muon and torch's AdamW; and which weights it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intarsia.average import AveragedWeights
from intarsia.machine import tensor_bytes
from intarsia.muon import Muon, hidden_weights, orthogonal
from intarsia.run_config import OptimConfig
from intarsia.specs import SignalSpec
from intarsia.stepping import parameter_groups, state_bytes
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.gumbel import GumbelConfig
from stage1_tokenizer.quantizers.simvq import SimVQConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS
from stage1_tokenizer.tokenizers.vqvae import VQVAEConfig
from tests.tiny_priors import CASES


def groups(hidden: list[nn.Parameter], rest: list[nn.Parameter], decay: float = 0.0) -> list[dict]:
    return [{"params": hidden, "weight_decay": decay, "hidden": True, "lr": 0.02}, {"params": rest, "weight_decay": decay}]


@pytest.mark.parametrize("shape", [(8, 8), (4, 40), (40, 4), (1, 9)])
def test_singular_values_follow_the_quintic_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    wanted = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    torch.testing.assert_close(orthogonal(matrices), u @ torch.diag_embed(wanted) @ vt)
    torch.testing.assert_close(orthogonal(matrices.float()), orthogonal(matrices).float(), rtol=1e-3, atol=1e-4)
    assert wanted[:, 0].min() > 0.6 and wanted.max() < 1.3
    for one, of_all in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(orthogonal(one[None])[0], of_all)
        torch.testing.assert_close(orthogonal(1e-3 * one[None])[0], of_all)  # the length of a gradient does not matter
    assert orthogonal(torch.zeros(1, *shape)).abs().max() == 0


def test_a_matrix_of_low_rank_stays_one_in_float32():
    torch.manual_seed(0)
    matrix = (torch.randn(48, 2) @ torch.randn(2, 300))[None]
    values = torch.linalg.svdvals(orthogonal(matrix)[0])
    assert values[:2].min() > 0.6 and values[0] < 1.3 and values[2:].max() < 0.05


def test_matrices_move_as_with_the_muon_of_torch():
    """Which computes in bfloat16, hence the tolerance: of the way, not of the weights."""
    torch.manual_seed(0)
    start, target = torch.randn(24, 8), torch.randn(24, 8)
    ways = {}
    for name in ("ours", "torch"):
        w = nn.Parameter(start.clone())
        if name == "ours":
            optimizer = Muon(groups([w], [], 0.1)[:1], fused=True)
        else:
            optimizer = torch.optim.Muon([w], lr=0.02, weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            ((w - target) ** 2).mul(torch.arange(1.0, 9.0)).sum().backward()
            optimizer.step()
        ways[name] = w.detach() - start
    assert (ways["ours"] - ways["torch"]).norm() < 0.02 * ways["torch"].norm()
    assert ways["ours"].norm() > 1


def test_a_convolution_moves_as_its_matrix_does_and_a_stack_as_one():
    torch.manual_seed(0)
    conv, twin, gradient = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3), torch.randn(2, 6, 2, 3, 3)
    as_conv = [nn.Parameter(conv.clone()), nn.Parameter(twin.clone())]
    as_matrix = [nn.Parameter(conv.flatten(1).clone())]
    for params in (as_conv, as_matrix):
        optimizer = Muon(groups(params, [])[:1], fused=True)
        for p, g in zip(params, gradient, strict=False):
            p.grad = g.reshape(p.shape).clone()
        optimizer.step()
    torch.testing.assert_close(as_conv[0].flatten(1), as_matrix[0])
    assert (as_conv[0] - conv).norm() > 0


def test_all_else_moves_as_in_adamw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    other = copy.deepcopy(net)
    ours = Muon(groups([net[0].weight, net[2].weight], [net[0].bias, net[2].bias], 0.1), lr=1e-2, fused=True)
    theirs = torch.optim.AdamW([other[0].bias, other[2].bias], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(5):
        ours.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        for i in (0, 2):
            other[i].bias.grad = net[i].bias.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(net[0].bias, other[0].bias) and torch.equal(net[2].bias, other[2].bias)
    assert not torch.equal(net[0].weight, other[0].weight)
    with pytest.raises(ValueError, match="closure"):
        ours.step(lambda: None)


def names(module: nn.Module) -> set[str]:
    chosen = {id(p) for p in hidden_weights(module)}
    return {name for name, p in module.named_parameters() if id(p) in chosen}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_a_prior_muon_trains_all_matrices_but_embeddings_and_last_layers(case):
    prior = case.build()
    chosen, vocabularies = names(prior), {size for level in prior.own for size in (level.vocab, *level.factors)}
    assert chosen and all(name.endswith("weight") for name in chosen)
    for name, p in prior.named_parameters():
        if name in chosen:
            assert p.ndim >= 2
        elif p.ndim >= 2:
            known = ("codes", "context", "seen", "labels", "places", "depths", "biases")
            assert any(word in name for word in known) or len(p) in vocabularies or ".last." in name, name


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_of_a_tokenizer_muon_trains_encoder_and_decoder_but_nothing_of_its_quantiser(kind):
    config = VQVAEConfig.from_dict({"net": {"type": "conv", "widths": [8, 8]}, "quantizer": {"type": kind}})
    tokenizer = TOKENIZERS.build(config, SignalSpec("image", 1, (8, 8)))
    chosen = names(tokenizer)
    assert {"to_codes.weight", "from_codes.weight"} < chosen and not any(name.startswith("quantizer") for name in chosen)
    assert all(name in chosen for name, p in tokenizer.named_parameters() if p.ndim == 4)


def test_frozen_and_tied_weights_are_left_out():
    net = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    net[1].weight = net[0].weight
    net[3].weight.requires_grad_(False)
    net[4].muon = False
    assert names(net) == {"2.weight"}


@pytest.mark.parametrize(
    "config",
    [VQConfig(codes=8, dim=4, update="gradient"), SimVQConfig(codes=8, dim=4), GumbelConfig(codes=8, dim=4, logits="linear")],
    ids=["gradient", "simvq", "gumbel"],
)
def test_weight_decay_leaves_codes_that_nobody_uses_where_they_are(config):
    module = nn.Sequential(nn.Linear(4, 4), QUANTIZERS.build(config))
    decayed = {id(p) for group in parameter_groups(module, OptimConfig(weight_decay=0.1)) if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(module[0].weight)}


@pytest.mark.parametrize("optim", [{}, {"muon": 0.02}, {"muon": 0.02, "average": 0.9}])
def test_the_bytes_that_training_keeps_are_those_of_the_optimizer_and_the_averages(optim):
    """Counted before training; a counter of steps for each weight comes on top."""
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    module[0].bias.requires_grad_(False)
    config = OptimConfig(**optim)
    optimizer = Muon(parameter_groups(module, config))
    module(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    averages = AveragedWeights(module, config.average).values if config.average else {}
    assert state_bytes(module, config) == tensor_bytes([*moments, *averages.values()])
