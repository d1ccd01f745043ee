"""The watch over the codes in training: figures, the alarm, remedies that apply themselves, and exact resumption with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intarsia.cli import RunError
from intarsia.config import ConfigError
from intarsia.distributed import Comm, comm
from intarsia.rng import StepRng
from intarsia.specs import SignalSpec
from stage1_tokenizer.checkup import examine
from stage1_tokenizer.health import Health, HealthConfig
from stage1_tokenizer.objectives.base import OBJECTIVES
from stage1_tokenizer.objectives.reconstruction import Reconstruction, ReconstructionConfig
from stage1_tokenizer.quantizers.base import QUANTIZERS
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.gumbel import GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.simvq import SimVQConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from stage1_tokenizer.tokenizers.base import TokenizerOutput
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from stage1_tokenizer.train import TokenizerTrainConfig
from tests.training import NET, TOKENIZER, Left, Toy, ToyConfig, run_training, tiny

SIGNAL = SignalSpec("image", 1, (8, 8))


class Twice(Comm):
    """Two ranks of the same values."""

    def all_reduce_sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


def tokenizer(quantizer: object = None) -> VQVAE:
    return VQVAE(VQVAEConfig(net=NET, quantizer=quantizer or VQConfig(codes=8, dim=4, init="normal")), SIGNAL)  # type: ignore[arg-type]


def never() -> None:
    raise AssertionError("no codebook was to be set anew")


class Rounding(VQVAE):
    """Codes that no Quantizer of the library makes."""

    def forward(self, x: torch.Tensor, cond: object = None, rng: object = None) -> TokenizerOutput:
        codes = (x[:, 0, ::4, ::4] > 0).long()
        return TokenizerOutput(x, (codes,), x.new_zeros(()))


def test_a_tokenizer_without_a_quantizer_is_watched_by_its_codes_alone() -> None:
    model = Rounding(VQVAEConfig(net=NET, quantizer=VQConfig(codes=8, dim=4, init="normal")), SIGNAL)
    for collapse, words in (("warn", "1 of 8 codes used"), ("auto", "there is none for it")):
        health, said = Health(HealthConfig(usage=0.5, collapse=collapse), model), []
        for _ in range(2):
            health.count([torch.zeros(8, 2, 2, dtype=torch.int64)])
            figures = health.look(model, comm, never, said.append, left=500)
        assert figures["health/usage"] == 1 / 8 and "health/drift" not in figures and len(said) == 2 and words in said[0]
        health.restore(model)
    with pytest.raises(ValueError, match="does not call one Quantizer for each level"):
        examine(model, Reconstruction(ReconstructionConfig()), Toy(ToyConfig()).split("train"), samples=8)


def test_an_objective_with_something_to_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Critic(Reconstruction):
        def __init__(self, config: ReconstructionConfig) -> None:
            super().__init__(config)
            self.critic = torch.nn.Linear(2, 1)

    monkeypatch.setattr(OBJECTIVES, "build", Critic)
    with pytest.raises(ConfigError, match="objective: a reconstruction has parameters to train; no critic is trained yet"):
        run_training(tiny(tmp_path, steps=2))


def test_figures_are_those_of_all_codes_since_the_last_look() -> None:
    model = tokenizer()
    health, said = Health(HealthConfig(usage=0.5), model), []
    health.count([torch.tensor([[[0, 1], [1, 1]]])])
    health.count([torch.tensor([[[5, 6], [7, 7]]])])
    figures = health.look(model, comm, never, said.append, left=500)
    assert figures["health/usage"] == 5 / 8 and figures["health/dead"] == 3 and not said
    p = torch.tensor([1, 3, 1, 1, 2]) / 8
    assert figures["health/perplexity"].item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-6)
    health.count([torch.tensor([[[0, 1], [2, 3]]])])
    assert health.look(model, comm, never, said.append, left=500)["health/usage"] == 4 / 8


def test_drift_is_the_way_of_the_vectors_since_the_last_look() -> None:
    model = tokenizer()
    health = Health(HealthConfig(usage=0), model)
    assert isinstance(model.quantizer, VQ)
    for factor, expected in ((1.0, None), (1.5, 0.5), (1.0, 0.0)):
        model.quantizer.codebook.mul_(factor)
        health.count([torch.zeros(1, 2, 2, dtype=torch.int64)])
        drift = health.look(model, comm, never, print, left=500).get("health/drift")
        assert (drift is None) == (expected is None)
        assert drift is None or drift.item() == pytest.approx(expected, abs=1e-6)


def test_counts_add_up_over_ranks_once_however_often_they_are_folded() -> None:
    model = tokenizer()
    health = Health(HealthConfig(), model)
    for _ in range(3):
        health.count([torch.zeros(1, 2, 2, dtype=torch.int64)])
        health.fold(Twice())
    assert health._buffer("counts", 0).tolist() == [24] + [0] * 7


def test_a_collapse_warns_with_the_level_and_both_numbers() -> None:
    model = tokenizer(ResidualConfig(stages=2, inner=VQConfig(codes=8, dim=4, init="normal")))
    health, said = Health(HealthConfig(), model), []
    many = torch.arange(8).view(1, 2, 4)
    health.count([many, torch.zeros_like(many)])
    health.look(model, comm, never, said.append, left=500)
    assert len(said) == 1 and "level codes/1: 1 of 8 codes used in the last 500 steps; in a new run try: " in said[0]


def test_a_collapse_says_how_many_steps_it_looked_at_also_after_a_resumption() -> None:
    model = tokenizer()
    health, said = Health(HealthConfig(every=5), model), []

    def at(one: Health, step: int) -> str:
        one.count([torch.zeros(1, 2, 4, dtype=torch.int64)])
        one.look(model, comm, never, said.append, left=0, step=step)
        return said[-1]

    assert "used in the last 5 steps" in at(health, 5) and "used in the last 3 steps" in at(health, 8)
    resumed, older = Health(HealthConfig(every=5), model), Health(HealthConfig(every=5), model)
    resumed.load_state_dict(health.state_dict())
    assert "used in the last 2 steps" in at(resumed, 10)
    older.load_state_dict({name: value for name, value in health.state_dict().items() if name != "looked"})
    assert "used in the last 5 steps" in at(older, 10)


def test_of_a_growing_codebook_only_the_codes_in_use_are_counted() -> None:
    model = tokenizer(VQConfig(codes=8, dim=4, init="normal", grow=(99,)))
    health, said = Health(HealthConfig(usage=0.5), model), []
    health.count([torch.tensor([[[0, 1], [2, 2]]] * 5)])
    figures = health.look(model, comm, never, said.append, left=500)
    assert figures["health/usage"] == 3 / 4 and figures["health/dead"] == 1 and not said


def grown_within_a_window(health_of: Callable[[VQVAE], Health], after: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """4 codes at first, of which ``after`` are in use, then 8, of which a batch uses the first 4 and one new one."""
    model, said = tokenizer(VQConfig(codes=8, dim=4, init="normal", grow=(1,))), []
    health = health_of(model)
    health.count([torch.tensor([[[int(c) for c in after]] * 9])])
    model.quantizer.used.fill_(8)  # type: ignore[union-attr, operator]
    health.count([torch.tensor([[[0, 5]]])])
    return health.look(model, comm, never, said.append, left=500), said


def test_a_codebook_that_grows_within_a_window_is_judged_by_the_codes_that_were_there_all_the_time() -> None:
    def begun(model: VQVAE) -> Health:
        health = Health(HealthConfig(usage=0.75), model)
        health.begin(model)
        return health

    figures, said = grown_within_a_window(begun, "0123")
    assert figures["health/usage"] == 1 and figures["health/dead"] == 0 and not said
    figures, said = grown_within_a_window(begun, "01")
    assert figures["health/usage"] == 0.5 and figures["health/dead"] == 2 and "2 of 4 codes" in said[0]


def test_the_codes_that_were_there_are_part_of_checkpoints_and_older_ones_load() -> None:
    def loaded(model: VQVAE, known: bool) -> Health:
        before, after = (Health(HealthConfig(usage=0.75), model) for _ in range(2))
        before.begin(model)
        after.load_state_dict({name: t for name, t in before.state_dict().items() if known or name != "open"})
        assert after.open.tolist() == [4 if known else 0]
        if not known:
            after.restore(model)
        return after

    for known in (True, False):
        figures, said = grown_within_a_window(lambda model, known=known: loaded(model, known), "0123")  # type: ignore[misc]
        assert figures["health/usage"] == 1 and not said


def test_collapse_stop_ends_the_run_naming_it() -> None:
    model = tokenizer()
    health = Health(HealthConfig(collapse="stop"), model)
    health.count([torch.zeros(1, 4, 4, dtype=torch.int64)])
    with pytest.raises(RunError, match="collapse: level codes: 1 of 8 codes"):
        health.look(model, comm, never, print, left=500)


def test_stages_that_share_a_codebook_are_judged_together() -> None:
    shared = ResidualConfig(stages=2, shared=True, inner=VQConfig(codes=8, dim=4, init="normal"))
    for second, said in (([4, 5], 0), ([0, 1], 1)):  # 4 of 8 codes and 2 of 8
        model = tokenizer(shared)
        health, lines = Health(HealthConfig(), model), []
        health.count([torch.tensor([[[0, 1], [0, 1]]] * 9), torch.tensor([[second, second]] * 9)])
        figures = health.look(model, comm, never, lines.append, left=500)
        assert {figures[f"health/usage/codes/{i}"].item() for i in (0, 1)} == {0.25}
        assert len(lines) == said and all("2 of 8 codes" in line for line in lines)


def test_a_vocabulary_beyond_any_table_is_not_watched() -> None:
    model = tokenizer(LFQConfig(bits=30))
    health = Health(HealthConfig(every=1), model)
    health.count([torch.full((1, 4, 4), 2**30 - 1)])
    assert health.look(model, comm, never, print, left=500) == {} and sum(t.numel() for t in health.state_dict().values()) < 10


def test_at_the_end_nothing_is_set_anew_and_nothing_is_stopped() -> None:
    """Codes set anew in the last steps would be released as they are, with a decoder that never saw them."""
    for collapse, left, words in (("auto", 3, "too late for a remedy, 3 steps before the end"), ("stop", 0, "in a new run try")):
        model = tokenizer()
        health, said = Health(HealthConfig(collapse=collapse, every=4), model), []
        health.count([torch.zeros(1, 4, 4, dtype=torch.int64)])
        health.look(model, comm, never, said.append, left=left)
        assert len(said) == 1 and "1 of 8 codes" in said[0] and words in said[0] and not health.stage.any()
    assert [step for step in range(10) if health.due(step, 10)] == [3, 7, 9]


def test_few_samples_are_no_collapse() -> None:
    model = tokenizer(VQConfig(codes=512, dim=4, init="normal"))
    health, said = Health(HealthConfig(), model), []
    health.count([torch.tensor([[[0, 1], [2, 3]]])])
    health.look(model, comm, never, said.append, left=500)
    assert not said


def test_auto_applies_one_remedy_after_the_other_and_says_so() -> None:
    model = tokenizer(VQConfig(codes=8, dim=4, beta=5.0, restart=0.0, init="normal"))
    health, said, anew = Health(HealthConfig(collapse="auto"), model), [], []
    for _ in range(3):
        health.count([torch.zeros(1, 4, 4, dtype=torch.int64)])
        health.look(model, comm, lambda: anew.append(bool(model.quantizer.initialized)), said.append, left=500)  # type: ignore[arg-type]
    assert "applied: k-means of the latents as they are, and restart 0.05" in said[0]
    assert "applied: beta 0.1" in said[1]
    assert "all remedies are applied" in said[2]
    assert anew == [False, False]  # this test never sets it
    quantizer = model.quantizer.train()
    z = torch.randn(4, 4, 2, 2)
    error = quantizer(z, StepRng(0, 0, torch.arange(4))).stats["quantization_error"]
    loss = quantizer(z, StepRng(0, 0, torch.arange(4))).loss
    assert loss.item() == pytest.approx(0.1 * error.item(), rel=1e-5)


KINDS = {
    "vq": VQConfig(codes=32, dim=4, init="normal", beta=1.0),
    "gumbel": GumbelConfig(codes=32, dim=4, init="normal", scale=1.0),
    "simvq": SimVQConfig(codes=32, dim=4, init="identity", beta=1.0),
    "lfq": LFQConfig(bits=5, entropy=0.0, diversity=0.5),
    "bsq": BSQConfig(bits=5, entropy=0.0),
    "fsq": FSQConfig(levels=(4, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_remedies_of_every_kind_hold_again_after_a_resumption_and_change_no_state(kind: str) -> None:
    q, z, rng = QUANTIZERS.build(KINDS[kind]), torch.randn(6, 5, 4), StepRng(0, 0, torch.arange(6))
    z = z[:, : q.dim]
    before = {name: t.clone() for name, t in q.state_dict().items()}
    loss, kinds = q(z, rng).loss.item(), q.remedies()
    for name in kinds:
        q.remedy(name, again=True)
    assert all(torch.equal(before[name], t) for name, t in q.state_dict().items())
    assert (q(z, rng).loss.item() != loss) == (kind != "fsq")  # beta, the sharpness of logits, or the entropy term
    with pytest.raises(ValueError, match=f"remedy: 'x'; {kind} has {', '.join(kinds) or 'none'}".replace("(", ".")):
        q.remedy("x")
    assert q.advice["collapse"] != "" and len(kinds) == (0 if kind == "fsq" else 1 if kind == "bsq" else 2)


@pytest.mark.parametrize("kind", ["vq", "gumbel", "simvq"])
def test_the_first_remedy_brings_codes_to_latents_that_are_far_away(kind: str) -> None:
    q, z = QUANTIZERS.build(KINDS[kind]).eval(), 0.1 * torch.randn(50, 4, 20) + torch.tensor([5.0, -3.0, 2.0, 8.0])[:, None]
    assert q(z).codes[0].unique().numel() < 4
    q.remedy(q.remedies()[0])
    q.initialize(z.movedim(1, -1).flatten(0, 1), StepRng(0, 0, torch.arange(50)))
    assert q(z).codes[0].unique().numel() > 24


def test_a_sharper_scale_lets_noise_decide_less() -> None:
    q, z = QUANTIZERS.build(KINDS["gumbel"].replace(scale=0.5)), torch.randn(50, 4, 20, requires_grad=True)
    rng = StepRng(0, 0, torch.arange(50))
    nearest = q.eval()(z).codes[0]

    def agreed() -> float:
        return float((q.train()(z, rng).codes[0] == nearest).double().mean())

    before = agreed()
    q.remedy("scale 16")
    assert before < 0.3 and agreed() > 0.6


def test_the_remedies_of_signs_are_the_entropy_term_with_its_default_weights() -> None:
    for config in (LFQConfig(bits=5, entropy=0.0, diversity=0.0), BSQConfig(bits=5, entropy=0.1)):
        q, usual = QUANTIZERS.build(config), QUANTIZERS.build(type(config)(bits=5))
        z, rng = torch.randn(6, 5, 4), StepRng(0, 0, torch.arange(6))
        for name in q.remedies():
            q.remedy(name)
        for _ in range(3):  # the running mean as well
            assert torch.equal(q(z, rng).loss, usual(z, rng).loss)
            q.update(rng, comm), usual.update(rng, comm)


def test_advice_is_of_the_kind_and_names_auto_where_it_helps() -> None:
    for config, words, auto in ((LFQConfig(bits=4), "fewer bits", False), (SimVQConfig(codes=8, dim=4), "init: moments", True)):
        model = tokenizer(config)
        health, said = Health(HealthConfig(), model), []
        health.count([torch.zeros(1, 4, 4, dtype=torch.int64)])
        health.look(model, comm, never, said.append, left=500)
        assert words in said[0] and "ema" not in said[0] and ("health.collapse: auto" in said[0]) == auto


def test_codes_that_go_out_of_use_by_intention_are_not_set_anew() -> None:
    model = tokenizer(VQConfig(codes=8, dim=4, rate=0.1, init="normal"))
    health, said = Health(HealthConfig(collapse="auto"), model), []
    health.count([torch.zeros(1, 4, 4, dtype=torch.int64)])
    health.look(model, comm, never, said.append, left=500)
    assert "there is none for it" in said[0] and "a smaller rate" in said[0] and not health.stage.any()


@pytest.mark.parametrize("kind", ["gumbel", "residual", "product"])
def test_what_is_watched_are_the_codes_that_encode_gives_not_those_that_noise_draws(kind: str) -> None:
    noisy = GumbelConfig(codes=8, dim=4, scale=0.01, init="normal")
    configs = {"gumbel": noisy, "residual": ResidualConfig(stages=2, inner=noisy), "product": ProductConfig(groups=2, inner=noisy)}
    model = VQVAE(VQVAEConfig(net=NET, quantizer=configs[kind]), SIGNAL).train()
    x = torch.rand(16, 1, 8, 8) * 2 - 1
    out = model(x, rng=StepRng(0, 0, torch.arange(16)))
    assert out.likely is not None and torch.equal(out.likely[0], model.encode(x)[0])
    assert not torch.equal(out.codes[0], out.likely[0]) and len(out.likely) == len(out.codes)


def test_the_remedy_turns_restarts_on_that_were_off() -> None:
    q = VQ(VQConfig(codes=8, dim=4, restart=0.0, decay=0.1, init="normal")).train()
    q.remedy(q.remedies()[0], again=True)  # the codebook stays: codes from 1 on are far away
    with torch.no_grad():
        q.codebook[1:] += 100
        q.sums.copy_(q.codebook * q.counts[:, None])
    q(torch.randn(8, 4, 5), StepRng(0, 0, torch.arange(8)))
    assert q.update(StepRng(0, 0, torch.arange(0)), comm)["restarts"] > 0


def collapsing(folder: Path, collapse: str) -> TokenizerTrainConfig:
    """A gradient codebook far from the latents, beta 5, no restarts."""
    far = VQConfig(codes=48, dim=4, update="gradient", init="normal", restart=0.0, beta=5.0)
    health = HealthConfig(every=20, usage=0.7, collapse=collapse)  # type: ignore[arg-type]
    return tiny(folder, steps=60, tokenizer=TOKENIZER.replace(quantizer=far), health=health, log={"every": 5})


def usage(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["health/usage"] for line in lines if "health/usage" in line]


def test_auto_rescues_a_run_that_is_made_to_collapse(tmp_path: Path) -> None:
    for collapse in ("warn", "auto"):
        run_training(collapsing(tmp_path / collapse, collapse))
    assert usage(tmp_path / "warn")[-1] < 0.7
    assert usage(tmp_path / "auto")[0] < 0.7 and usage(tmp_path / "auto")[-1] > 0.9


def test_an_interrupted_run_with_remedies_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_training(collapsing(whole, "auto"))
    for stop in (25, 50, None):
        run_training(collapsing(broken, "auto"), max_steps=stop)
    assert not Left.of(whole).differences(Left.of(broken))
