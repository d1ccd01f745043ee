"""On a device of its own (``pretend_card``) everything stays there, asks the processor for nothing, and comes to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import Cond, SignalSpec
from pipelines import TwoStagePipeline
from stage1_tokenizer.quantizers.base import QUANTIZERS, QuantizerConfig
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.gumbel import GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.simvq import SimVQConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, TokenizerConfig
from tests import tiny_pipelines as tiny
from tests.pretend_card import Card, OnCard, moved, off, on
from tests.tiny_pipelines import ladders  # noqa: F401
from tests.tiny_priors import CASES, Case
from tests.training import HIERARCHY, NET, TOKENIZER, bars

SIGNAL = SignalSpec("image", 1, (8, 8))
VQ = VQConfig(codes=24, dim=4, decay=0.9, restart=0.3)
RESIDUAL = ResidualConfig(stages=3, dropout=0.5, shallow_gradient=0.5, inner=VQConfig(codes=8, dim=4))
KINDS: dict[str, QuantizerConfig] = {
    "vq": VQ,
    "vq rate": VQ.replace(rate=0.01),
    "vq grow": VQ.replace(grow=(2,)),
    "vq cosine": VQ.replace(cosine=True),
    "vq rotation": VQ.replace(estimator="rotation"),
    "vq gradient": VQ.replace(update="gradient"),
    "gumbel": GumbelConfig(codes=24, dim=4),
    "product": ProductConfig(groups=2, inner=VQConfig(codes=8, dim=2)),
    "residual": RESIDUAL,
    "residual shared": ResidualConfig(stages=3, shared=True, inner=VQConfig(codes=8, dim=4)),
    "fsq": FSQConfig(levels=(5, 4, 3)),
    "lfq": LFQConfig(bits=5),
    "bsq": BSQConfig(bits=5),
    "simvq": SimVQConfig(codes=24, dim=4),
}
TOKENIZER_CASES: dict[str, TokenizerConfig] = {name: TOKENIZER.replace(quantizer=config) for name, config in KINDS.items()} | {
    "attention": TOKENIZER.replace(net=NET.replace(attention=(1,))),
    "depths": TOKENIZER.replace(quantizer=RESIDUAL, by_depth=True, prefix_decoders=(1,)),
    "vqvae2": HIERARCHY,
    "vqvae2 unconditioned": HIERARCHY.replace(conditioned=False),
}
FORWARD_ALONE = {"vq cosine", "product", "residual", "residual shared", "bsq", "depths"}  # backward makes tensors from numbers


def equal(found: Any, wanted: Tensor) -> bool:
    assert isinstance(found, OnCard)
    return torch.allclose(off(found.detach()).double(), wanted.detach().double(), atol=1e-5)


def test_every_registered_quantizer_and_tokenizer_is_among_the_cases() -> None:
    assert {str(config.type_name) for config in KINDS.values()} == set(QUANTIZERS.names())
    assert {str(config.type_name) for config in TOKENIZER_CASES.values()} >= set(TOKENIZERS.names()) - {"ladder", "tokens"}


@pytest.mark.parametrize("name", TOKENIZER_CASES)
def test_a_tokenizer_trains_encodes_and_decodes_on_its_device(name: str) -> None:
    config, x, first = TOKENIZER_CASES[name], bars(8).float() / 127.5 - 1, bars(32, 100).float() / 127.5 - 1
    made = []
    for put in (lambda module: module, moved):
        torch.manual_seed(0)
        made.append(put(TOKENIZERS.build(config, SIGNAL)))

    def run(model: Any, here: Callable[[Any], Any]) -> list[Tensor]:
        model.initialize([here(first)], StepRng(0, 0, here(torch.arange(32))), comm)
        model.train()
        for step in range(3):
            out = model(here(x), rng=StepRng(0, step, here(torch.arange(8))))
            loss = out.loss + sum((y - here(x)).square().mean() for y in (out.x, *(y for _, y in out.prefixes)))
            if name not in FORWARD_ALONE:
                model.zero_grad()
                loss.backward()
            model.finite()
            model.update(StepRng(0, step, here(torch.zeros(1, dtype=torch.int64))), comm)
        model.eval()
        codes = model.encode(here(x))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [loss, *model.state_dict().values(), *grads, *codes, model.decode(codes)]

    wanted = run(made[0], lambda value: value)
    with Card():
        found = run(made[1], on)
    assert len(found) == len(wanted) and all(equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prior_trains_rates_and_samples_on_its_device(case: Case) -> None:
    def run(prior: Any, here: Callable[[Any], Any]) -> list[Tensor]:
        codes, cond = [here(c) for c in case.codes(3)], case.cond(3)
        cond = None if cond is None else Cond(label=here(cond.label))
        rng = StepRng(0, 1, here(torch.arange(3)))
        drawn = prior.sample(torch.arange(3), upper=codes[: prior.levels.start], cond=cond, seed=0)
        rated = prior.nll(codes, cond, rng)
        return [prior.train().loss(codes, cond, rng)[0], rated, *drawn]

    wanted = run(case.build(), lambda value: value)
    with Card():
        found = run(moved(case.build()), on)
    assert all(equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["gpt", "top pixelcnn", "three"])
def test_a_pipeline_samples_rates_and_completes_on_its_device(kind: str) -> None:
    x, mask = torch.rand(3, 1, 8, 8), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True

    def run(pipeline: TwoStagePipeline) -> list[Any]:
        return [
            pipeline.sample(3, label="bag", seed=0, temperature=0.9),
            torch.from_numpy(pipeline.sample(2, seed=1, output="np")),
            *pipeline.encode(x),
            pipeline.reconstruct(x),
            pipeline.nll(x, label=torch.zeros(3, dtype=torch.int64)),
            pipeline.complete(x, mask, seed=0),
            pipeline.inpaint(x, mask, seed=0, blend=1),
            pipeline.variations(x, redraw=0, seed=0),
        ]

    wanted = run(tiny.pipeline(kind, micro_batch=8))
    pipeline = tiny.pipeline(kind, micro_batch=8)
    for part in (pipeline.tokenizer, *pipeline.priors):
        moved(part)
    with Card():
        found = run(pipeline)
    assert sum(isinstance(t, OnCard) for t in found) > 0
    assert all(torch.allclose(off(a).float(), b.float(), atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_what_a_card_refuses_is_refused() -> None:
    here, there = torch.arange(6.0), on(torch.arange(6.0))
    with Card():
        for wrong in (lambda: here + there, lambda: there * torch.ones(6), lambda: torch.cat([here, there]), lambda: here @ there):
            with pytest.raises(RuntimeError, match="on the card and, of shape .* on the processor"):
                wrong()
        for wrong in (lambda: there.numpy(), lambda: __import__("numpy").asarray(there)):
            with pytest.raises(TypeError, match="use cpu"):
                wrong()
        assert not isinstance(there.cpu(), OnCard)
        assert all(isinstance(t, OnCard) and t.device.type == "cuda" for t in (here.to("cuda"), torch.zeros(2, device="cuda")))
        assert (there[torch.tensor([1, 2])] + 1).cpu().tolist() == [2.0, 3.0]
        there.view(2, 3)[1].mul_(2)
        assert there.cpu().tolist() == [0, 1, 2, 6, 8, 10]
