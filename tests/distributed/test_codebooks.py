"""Two processes hold the same bits of every quantiser, after k-means and after each of ten steps in which codes restart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import SignalSpec
from stage1_tokenizer.quantizers import vq
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.entropy import EntropyConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.gumbel import GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.search import kmeans
from stage1_tokenizer.quantizers.simvq import SimVQConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS
from stage1_tokenizer.tokenizers.vqvae2 import LevelConfig
from tests.training import HIERARCHY, TOKENIZER, run_training, tiny, together

pytestmark = pytest.mark.faults

STEPS = 10
VQ = VQConfig(codes=12, dim=4, decay=0.5, restart=0.8)  # dead below four fifths of the mean use: in every step some codes are
RESTARTING: dict[str, Any] = {
    "vq": VQ,
    "vq, gradient": VQ.replace(update="gradient"),
    "vq, cosine, entropy": VQ.replace(cosine=True, entropy=EntropyConfig(weight=0.1)),
    "vq, growing, rated": VQ.replace(codes=48, grow=(3, 6), rate=0.01),
    "residual": ResidualConfig(stages=3, dropout=0.5, inner=VQ),
    "residual, shared": ResidualConfig(stages=3, shared=True, inner=VQ),
    "product": ProductConfig(groups=2, inner=VQ),
    "product of residual": ProductConfig(groups=2, inner=ResidualConfig(stages=2, inner=VQ)),
}
OTHERS: dict[str, Any] = {  # nothing restarts
    "simvq": SimVQConfig(codes=12, dim=4),
    "gumbel": GumbelConfig(codes=12, dim=4),
    "fsq": FSQConfig(),
    "lfq": LFQConfig(bits=4),
    "bsq": BSQConfig(bits=4),
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"tokenizer": TOKENIZER.replace(quantizer=quantizer)} for name, quantizer in (RESTARTING | OTHERS).items()},
    "hierarchy": {"tokenizer": HIERARCHY.replace(levels=(LevelConfig(quantizer=VQ), LevelConfig(quantizer=RESTARTING["residual"])))},
    "vq, one sample on two ranks": {"tokenizer": TOKENIZER.replace(quantizer=VQ), "batch_size": 1},
}


def recorded(run: Path, changes: dict[str, Any]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Trains; the quantisers' tensors before and after initialisation and after each step, and the restarts of each step."""
    states: list[dict[str, Tensor]] = []
    restarts: list[float] = []
    config = tiny(run, steps=STEPS, **{"batch_size": 5} | changes)
    tokenizer = TOKENIZERS.get(str(config.tokenizer.type_name))
    initialize, update = tokenizer.initialize, tokenizer.update

    def keep(self: torch.nn.Module) -> None:
        states.append({name: tensor.clone() for name, tensor in self.state_dict().items() if name.startswith("quantizer")})

    def initialized(self: Any, *args: Any) -> None:
        keep(self)
        initialize(self, *args)
        keep(self)

    def updated(self: Any, *args: Any) -> Any:
        stats = update(self, *args)
        keep(self)
        restarts.append(sum(float(value) for name, value in stats.items() if name.startswith("restarts")))
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "initialize", initialized)
        patch.setattr(tokenizer, "update", updated)
        run_training(config)
    return states, restarts


@pytest.fixture(scope="module")
def both(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ``recorded`` gave on each rank, by case."""
    folder = tmp_path_factory.mktemp("runs")
    return together(ranks, lambda: {name: recorded(folder / name, changes) for name, changes in CASES.items()})


def test_every_registered_quantizer_has_a_case():
    assert {quantizer.type_name for quantizer in (RESTARTING | OTHERS).values()} == set(QUANTIZERS.names())


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_hold_the_same_bits_after_initialisation_and_every_step(case, both):
    (first, restarts), (second, others) = (rank[case] for rank in both)
    assert len(first) == len(second) == 2 + STEPS and restarts == others
    for at, (a, b) in enumerate(zip(first, second, strict=True)):
        assert [name for name in a if not torch.equal(a[name], b[name])] == [], f"state {at}"


@pytest.mark.parametrize("case", [name for name in CASES if name not in OTHERS])
def test_codebooks_came_from_kmeans_and_codes_restarted_in_every_step(case, both):
    states, restarts = both[0][case]
    flags = [name for name in states[0] if name.endswith("initialized")]
    assert flags and not any(states[0][name] for name in flags) and all(states[1][name] for name in flags)
    assert min(restarts) >= 1
    for name in (name for name in states[0] if name.endswith("codebook")):
        assert all(not torch.equal(before[name], after[name]) for before, after in pairwise(states)), name


@pytest.mark.parametrize("config", [TOKENIZER, HIERARCHY], ids=["one level", "two levels"])
def test_ranks_whose_kmeans_differs_in_the_last_bits_hold_one_codebook(config, ranks, monkeypatch):
    """As on CUDA, where sums of the same rows may be added up in another order on each card."""
    rank = 0
    monkeypatch.setattr(vq, "kmeans", lambda rows, k, rng: tuple(t * (1 + 1e-6 * rank) for t in kmeans(rows, k, rng)))

    def work(number: int) -> dict[str, torch.Tensor]:
        nonlocal rank
        rank = number
        torch.manual_seed(0)
        tokenizer = TOKENIZERS.build(config, SignalSpec("image", 1, (8, 8)))
        x = StepRng(0, 0, torch.arange(64)).uniform("x", 1, 8, 8) * 2 - 1
        tokenizer.initialize([x[number::2]], StepRng(0, 0, torch.arange(64)), comm)
        return {name: t.clone() for name, t in tokenizer.state_dict().items()}

    first, second = ranks(work)
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
