"""RQ-Transformer: the formulas of the paper one position and one depth at a time, and what is computed how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.specs import Cond
from pipelines import TwoStagePipeline, assemble, sample
from stage1_tokenizer import encode
from stage1_tokenizer.quantizers.base import QuantizerConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage2_prior import train as train_prior
from stage2_prior.priors.rq import RQPrior
from tests.tiny_priors import Case
from tests.training import TOKENIZER, run_training, tiny

INNER = VQConfig(codes=12, dim=4, decay=0.9)
CASE = Case("rq", ((6, (2, 3)), (5, (2, 3)), (4, (2, 3))), classes=3)


def build(case: Case = CASE) -> RQPrior:
    prior = case.build()
    assert isinstance(prior, RQPrior)
    return prior


@torch.no_grad()
def test_logits_are_those_of_the_papers_formulas() -> None:
    prior, codes, label = build(), [c.flatten(1) for c in CASE.codes(2)], torch.tensor([2, 0])
    e = [table.weight for table in prior.tables]
    told = prior.context.places[0][None] + prior.context.label(label)[:, None]  # (B, T, D)
    begin = prior.first + prior.first_label(prior.context.label(label)) + told[:, 0]
    u = [begin] + [sum(e[d][codes[d][:, t - 1]] for d in range(3)) + told[:, t] for t in range(1, 6)]
    full = prior.logits([c.view(2, 2, 3) for c in codes], Cond(label=label))
    for t in range(6):
        h = prior.trunk(torch.stack(u[: t + 1], 1))[:, -1]
        v: list[Tensor] = [h + prior.depths[0]]
        for d in range(3):
            y = prior.inner(torch.stack(v, 1))[:, -1]
            torch.testing.assert_close(full[d][:, t], y @ prior.heads[d].weight.T, atol=2e-5, rtol=0)
            if d < 2:
                v.append(prior.depths[d + 1] + sum(e[j][codes[j][:, t]] for j in range(d + 1)))


@torch.no_grad()
def test_sampling_runs_the_spatial_trunk_once_per_position_and_the_inner_one_once_per_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build()
    calls = {"trunk": 0, "inner": 0}
    for name in calls:
        module = getattr(prior, name)

        def counted(x: Tensor, *args: object, name: str = name, append=module.append) -> Tensor:
            calls[name] += x.shape[1]
            return append(x, *args)

        monkeypatch.setattr(module, "append", counted)
    prior.sample(torch.arange(2), cond=CASE.cond(2))
    assert calls == {"trunk": 6, "inner": 18}


def test_the_schedule_runs_all_depths_of_a_position_before_the_next() -> None:
    assert build().schedule == tuple((depth, position) for position in range(6) for depth in range(3))


def test_levels_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs levels of one shape; got \(2, 2\), \(4, 4\)"):
        Case("rq", ((6, (2, 2)), (5, (4, 4)))).build()


def test_training_learns_what_a_depth_says_about_the_next_and_about_the_next_position() -> None:
    """Depth 1 repeats depth 0, and depth 0 counts on from position to position: 2 bits for the first code, 0 for all others."""
    torch.manual_seed(0)
    case = Case("rq", ((4, (4,)), (4, (4,))), config={"width": 32})
    prior = build(case)
    for parameter in prior.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    codes = (torch.arange(32)[:, None] + torch.arange(4)) % 4
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(80):
        loss, stats = prior([codes, codes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = prior.nll([codes, codes]).mean(0) / torch.tensor(2.0).log()
    assert 1.9 < bits[0] < 2.3 and (bits[1:] < 0.15).all()
    assert set(stats) == {"bits", "bits/level0", "bits/level1"}


TWO = {"residual": ResidualConfig(stages=2, inner=INNER), "product": ProductConfig(groups=2, inner=INNER)}


@pytest.mark.parametrize("quantizer", TWO.values(), ids=TWO)
def test_depths_and_groups_go_the_whole_way_by_the_ordinary_scripts(tmp_path: Path, quantizer: QuantizerConfig) -> None:
    names = ("tokenizer", "codes", "prior", "pipeline")
    tokenizer, codes, run, pipeline = (str(tmp_path / name) for name in names)
    run_training(tiny(tokenizer, steps=6, tokenizer=TOKENIZER.replace(quantizer=quantizer)))
    encode.main(["--tokenizer", tokenizer, "--out", codes])
    small = ["--prior.type", "rq", "--prior.width", "16", "--prior.depth", "1", "--prior.heads", "2", "--steps", "4", "--batch_size", "8"]
    train_prior.main(["--codes", codes, "--run", run, *small, "--log.pictures_every", "0", "--device", "cpu"])
    assemble.main(["--tokenizer", tokenizer, "--priors", run, "--out", pipeline])
    sample.main(["--pipeline", pipeline, "--n", "6", "--seed", "2", "--out", str(tmp_path / "samples.npz"), "--device", "cpu"])
    saved = TwoStagePipeline.from_pretrained(pipeline)
    assert [level.vocab for level in saved.spec.levels] == [12, 12] and saved.priors[0].type_name == "rq"
    drawn = np.load(tmp_path / "samples.npz")
    assert np.array_equal(drawn["images"], (saved.sample(6, seed=2) * 255).round().to(torch.uint8).movedim(1, -1).numpy())
