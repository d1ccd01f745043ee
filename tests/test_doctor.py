"""The doctor: what it measures is right, what is planted it finds, and it changes nothing."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch

from stage1_tokenizer import doctor
from stage1_tokenizer.advice import LevelFacts, gradient_findings, level_findings
from stage1_tokenizer.checkup import Checkup, examine
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.objectives.reconstruction import Reconstruction, ReconstructionConfig
from stage1_tokenizer.probe import innermost
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantizer, QuantizerConfig
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from stage1_tokenizer.symptoms import code_vectors, entropy_bits, nearest_codes, nearest_pairs
from stage1_tokenizer.tokenizers.base import Tokenizer, TokenizerConfig
from tests.training import HIERARCHY, TOKENIZER, ToyConfig, bars, run_training, tiny

N = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "run"
    run_training(tiny(folder, steps=30))
    return folder


@pytest.fixture
def trained(run: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(run / "model")


def split() -> ArraySplit:
    return ArraySplit(bars(N), None, TransformConfig())


def examined(tokenizer: Tokenizer) -> Checkup:
    return examine(tokenizer, Reconstruction(ReconstructionConfig()), split(), samples=0)


def build(config: TokenizerConfig) -> Tokenizer:
    from stage1_tokenizer.tokenizers.base import TOKENIZERS

    torch.manual_seed(0)
    return TOKENIZERS.build(config, SOURCES.build(ToyConfig()).signal)


def whats(checkup: Checkup) -> str:
    return "\n".join(finding.what for finding in checkup.findings)


def test_figures_are_those_of_the_codes(trained: Tokenizer) -> None:
    checkup = examined(trained)
    codes = trained.encode(split().batch(torch.arange(N))["x"])[0]
    facts = checkup.levels[0]
    assert facts.used == len(codes.unique())
    place = codes.flatten(1)[:, 3]
    shares = torch.bincount(place).double() / N
    expected = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    assert checkup.position_bits[0][3].item() == pytest.approx(expected.item(), abs=1e-9)
    latents = trained.latents(split().batch(torch.arange(N))["x"]).detach()  # type: ignore[operator]
    rows = latents.movedim(1, -1).reshape(-1, 4)
    assert facts.variance == pytest.approx(rows.var(0, unbiased=False).mean().item(), rel=1e-4)
    nearest = torch.cdist(rows, trained.quantizer.codebook).amin(1)  # type: ignore[union-attr,arg-type]
    assert facts.error == pytest.approx((nearest.square().mean() / 4).item(), rel=1e-3)


def test_entropy_is_that_of_each_column() -> None:
    counts = torch.tensor([[4, 2, 0], [0, 1, 8], [0, 1, 8]])
    assert entropy_bits(counts).tolist() == pytest.approx([0.0, 1.5, 1.0])


def test_nearest_pairs_leave_out_unused_codes_and_the_code_itself() -> None:
    vectors = torch.tensor([[0.0], [1.0], [1.1], [5.0], [5.01]])
    pairs, distance = nearest_pairs(vectors, torch.tensor([True, True, True, True, False]))
    assert pairs.tolist()[:2] == [[1, 2], [2, 1]] and distance[0].item() == pytest.approx(0.1, abs=1e-6)
    assert sorted(p[0] for p in pairs.tolist()) == [0, 1, 2, 3]


def test_nearest_codes_are_so_far_from_the_origin_too() -> None:
    vectors = 300 + 0.1 * torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(vectors.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
    codes, among = nearest_codes(vectors, torch.arange(0, 512, 2))
    assert torch.equal(codes, distance[:, ::2].argmin(1)) and among.dtype == vectors.dtype
    torch.testing.assert_close(among, distance[:, ::2].amin(1).float(), rtol=1e-4, atol=1e-6)
    distance.fill_diagonal_(math.inf)
    pairs, found = nearest_pairs(vectors, torch.ones(512, dtype=torch.bool))
    assert torch.equal(pairs[:, 1], distance.argmin(1)[pairs[:, 0]])
    torch.testing.assert_close(found, distance.amin(1)[pairs[:, 0]].float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "config", [TOKENIZER, HIERARCHY, TOKENIZER.replace(quantizer=ResidualConfig(stages=3, inner=VQConfig(codes=8, dim=4)))]
)
def test_an_examination_changes_nothing_and_knows_every_level(config: TokenizerConfig) -> None:
    tokenizer = build(config).train()
    before = copy.deepcopy(tokenizer.state_dict())
    checkup = examined(tokenizer)
    assert [facts.name for facts in checkup.levels] == [level.name for level in tokenizer.level_specs()]
    assert all(torch.equal(before[name], tensor) for name, tensor in tokenizer.state_dict().items())
    assert tokenizer.training and all(p.grad is None for p in tokenizer.parameters())
    assert bool(tokenizer.finite())
    assert (checkup.levels[0].swap_cost is None) == (len(checkup.levels) == 1)


def test_fewer_codes_never_cost_more_bits(trained: Tokenizer) -> None:
    rows = examined(trained).curve
    assert rows[0]["kind"] == "all" and len(rows) > 2
    bits = [row["bits"] for row in rows]
    assert bits == sorted(bits, reverse=True) and rows[0]["psnr"] == max(row["psnr"] for row in rows)  # type: ignore[type-var]


def test_a_collapsed_codebook_is_found(trained: Tokenizer) -> None:
    assert isinstance(trained.quantizer, VQ)
    trained.quantizer.codebook[2:] = 100.0
    found = examined(trained).findings
    assert "level codes: collapse, " in found[0].what and " of 24 codes are used" in found[0].what
    assert found[0].try_.startswith("update: ema")


def test_codes_that_lie_elsewhere_are_found(trained: Tokenizer) -> None:
    assert isinstance(trained.quantizer, VQ)
    trained.quantizer.codebook += 50.0
    assert "times their own variance away from their codes" in whats(examined(trained))


def test_twins_are_found(trained: Tokenizer) -> None:
    assert isinstance(trained.quantizer, VQ)
    book = trained.quantizer.codebook
    healthy = examined(trained)
    use = torch.bincount(trained.encode(split().batch(torch.arange(N))["x"])[0].flatten(), minlength=24)
    first = int(use.argmax())
    codes = trained.latents(split().batch(torch.arange(N))["x"]).movedim(1, -1).reshape(-1, 4)  # type: ignore[operator]
    near = codes[torch.cdist(codes, book).argmin(1) == first]
    book[int(use.argmin())] = (book[first] + 1e-3 * (near[0] - book[first])).detach()
    twins = examined(trained).levels[0].twins
    assert twins is not None and healthy.levels[0].twins is not None and twins > healthy.levels[0].twins


def test_a_quantiser_that_pulls_too_hard_is_found(trained: Tokenizer) -> None:
    assert isinstance(trained.quantizer, VQ)
    assert not gradient_findings(examined(trained).gradients)
    trained.quantizer._beta = 100.0
    assert "the quantiser pulls at the latents" in whats(examined(trained))


def test_a_level_that_carries_nothing_is_found() -> None:
    tokenizer = build(HIERARCHY)
    for name, parameter in tokenizer.named_parameters():
        if "decoder" in name or "decode" in name:
            parameter.data.zero_()
    assert "level top: carries nothing" in whats(examined(tokenizer))


def facts(**changes: object) -> LevelFacts:
    healthy = {"seen": 10**5, "used": 512, "table_used": 512}
    healthy |= {"perplexity": 350.0, "entropy_bits": 8.4, "position_bits": (4.0, 7.0, 8.0), "variance": 1.0, "error": 0.1}
    healthy |= {"dim": 8, "advice": {**Quantizer.advice, "swap": "fewer levels"}}
    healthy |= {"vocab": 512, "in_use": 512}
    return LevelFacts(**({"name": "codes", "positions": 49, "twins": 0, "swap_cost": 12.0} | healthy | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_advice_names_only_settings_that_its_quantiser_has(kind: str) -> None:
    known = set(QUANTIZERS.config(kind).model_fields)
    named = {word for text in QUANTIZERS.get(kind).advice.values() for word in re.findall(r"(\w+):", text)}
    assert named <= known, f"{sorted(named - known)} is no setting of {kind}"


def test_of_a_growing_codebook_the_codes_in_use_are_what_is_judged() -> None:
    few = examined(build(TOKENIZER.replace(quantizer=VQConfig(codes=256, dim=4, init="normal", grow=(50, 60, 70, 80, 90, 95)))))
    assert (few.levels[0].vocab, few.levels[0].in_use) == (256, 4) and "collapse" not in whats(few)


def test_a_healthy_level_has_no_findings() -> None:
    assert level_findings(facts()) == []
    assert level_findings(facts(error=0.75, dim=32)) == []  # white noise of 32 dimensions: 512 codes leave 0.68 of it at least
    assert level_findings(facts(used=71, perplexity=60.0)) == []  # a stage that uses its part of a codebook that others share


@pytest.mark.parametrize(
    "quantizer", [VQConfig(codes=24, dim=4, cosine=True, init="normal"), FSQConfig(levels=(5, 4)), LFQConfig(bits=4), BSQConfig(bits=4)]
)
def test_the_quantisation_error_is_that_of_latents_where_they_are_compared(quantizer: QuantizerConfig) -> None:
    tokenizer = build(TOKENIZER.replace(quantizer=quantizer)).eval()
    x = split().batch(torch.arange(N))["x"]
    stats = tokenizer(x).stats
    found = examined(tokenizer).levels[0]
    assert found.error == pytest.approx(float(next(v for k, v in stats.items() if k.endswith("quantization_error"))), rel=1e-5)
    assert 0 < found.variance <= 1


def test_a_tokenizer_of_double_precision_and_a_huge_vocabulary() -> None:
    assert examined(build(TOKENIZER).double()).levels[0].seen > 0
    with pytest.raises(ValueError, match=r"level codes: 1073741824 codes at \d+ positions are more than"):
        examined(build(TOKENIZER.replace(quantizer=LFQConfig(bits=30))))


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_the_vectors_of_codes_lie_where_the_quantiser_does(kind: str) -> None:
    tokenizer = build(TOKENIZER.replace(quantizer=QUANTIZERS.config(kind)()))
    for quantizer in innermost(tokenizer.to("meta")):
        vectors = code_vectors(quantizer, quantizer.level_specs("codes", (1,))[0])
        assert vectors is not None and vectors.is_meta


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"used": 71, "table_used": 71, "perplexity": 60.0}, "collapse, 71 of 512"),
        ({"perplexity": 20.0}, "perplexity 20 of 512"),
        ({"error": 0.7}, "quantisation error is 70%"),
        ({"error": 0.9, "dim": 32}, "quantisation error is 90%"),
        ({"error": 30.0}, "30 times their own variance"),
        ({"twins": 4}, "4 used codes have another one next to them"),
        ({"swap_cost": 0.3}, "carries nothing; another sample's codes cost 0.3 dB"),
        ({"position_bits": (0.01, 6.0, 8.0)}, "a position says 0.01 bits"),
    ],
)
def test_each_symptom_alone_gives_one_finding(change: dict, what: str) -> None:
    found = level_findings(facts(**change))
    assert len(found) == 1 and what in found[0].what and found[0].try_


def test_the_command_writes_page_and_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--run", str(run), "--samples", "20"])
    out = capsys.readouterr().out
    assert "level codes: " in out and "rate and distortion, all: " in out and "gradients of quantizer: task" in out
    tree = json.loads((run / "doctor" / "doctor.json").read_text())
    assert tree["levels"][0]["vocab"] == 24 and math.isfinite(tree["rate_distortion"][0]["psnr"])
    assert (run / "doctor" / "doctor.png").read_bytes().startswith(b"\x89PNG")
