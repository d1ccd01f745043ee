"""pipelines.compare, pipelines.guidance and pipelines.report: figures of several pipelines that compare, or are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from intarsia.cli import UserError
from intarsia.config import ConfigError
from pipelines import TwoStagePipeline, guidance, report
from pipelines import compare as script
from pipelines.compare import CompareConfig, compare, named
from pipelines.evaluate import EvaluateConfig, evaluate_pipeline
from pipelines.evaluation.distances import FeatureSet, fit_gaussian, frechet, frechet_table, interval
from pipelines.evaluation.settings import MeasureConfig, choose_reference, measure_samples
from pipelines.evaluation.timing import Timing
from pipelines.guidance import GuidanceConfig, sweep
from pipelines.report import markdown, read_row
from pipelines.sampling_config import SamplingConfig
from stage1_tokenizer.metrics import unit
from tests import tiny_pipelines as tiny
from tests.test_evaluation_pipeline import Blobs, feature_model, plain_precision_recall

ladders = tiny.ladders  # a fixture
SMALL: dict[str, Any] = {"n": 60, "bootstrap": 20, "k": 3}


# The difference --------------------------------------------------------------------------------------------------------
def normal(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_a_difference_is_that_of_the_distances_with_a_paired_interval() -> None:
    reference = FeatureSet("r", normal(150, 0))
    near, far, same = (FeatureSet(name, normal(150, seed, shift)) for name, seed, shift in (("a", 1, 0.1), ("b", 2, 0.8), ("c", 1, 0.1)))
    table = frechet_table(reference, [near, far, same], 100, 0)
    found = table.difference("b", "a")
    assert found.value == table.values["b"] - table.values["a"] and found.low > 0
    assert table.difference("a", "b").value == -found.value and table.difference("a", "b").high < 0
    pairs = interval(table.values["b"] - table.values["a"], table.replicates["b"] - table.replicates["a"])
    assert found == pairs and pairs != interval(found.value, table.replicates["b"])
    alike = table.difference("c", "a")
    assert alike.value == 0 and alike.low < 0 < alike.high


def test_the_interval_of_a_difference_covers_its_expectation_and_pairing_narrows_it() -> None:
    """95 % intervals over 60 experiments of a small reference; the expectation is taken over 300 others."""

    def sets(seed: int) -> tuple[FeatureSet, FeatureSet, FeatureSet]:
        a, b = normal(200, 3 * seed + 1, 0.5), normal(200, 3 * seed + 2, 0.6)
        return FeatureSet("r", normal(60, 3 * seed)), FeatureSet("a", a), FeatureSet("b", b)

    def difference(seed: int) -> float:
        r, a, b = (fit_gaussian(s.features) for s in sets(seed))
        return frechet(r, b) - frechet(r, a)

    expected = sum(difference(1000 + i) for i in range(300)) / 300
    covered, narrower = 0, 0
    for i in range(60):
        reference, a, b = sets(i)
        table = frechet_table(reference, [a, b], 30, i)
        found = table.difference("b", "a")
        covered += found.low <= expected <= found.high
        width = {name: table.estimate(name).high - table.estimate(name).low for name in ("a", "b")}
        narrower += found.high - found.low < (width["a"] ** 2 + width["b"] ** 2) ** 0.5
    assert binomtest(covered, 60, 0.95).pvalue > 1e-3, covered
    assert narrower > 50


# pipelines.compare -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair(ladders: None) -> dict[str, TwoStagePipeline]:
    return {"one": tiny.pipeline("gpt", micro_batch=16), "two": tiny.pipeline("parallel", micro_batch=16)}


def test_pipelines_are_compared_on_the_same_classes_and_reference(pair: dict[str, TwoStagePipeline], capsys: Any) -> None:
    source, model, config = Blobs(), feature_model(), CompareConfig(pipelines="one,two", **SMALL)
    tree = compare(pair, source, model, config)
    chosen = choose_reference(source, config, True)
    split = source.split("train").batch(chosen.rows)
    real = fit_gaussian(model(unit(split["x"]))[0])
    assert torch.equal(split["label"], torch.arange(60) % 4)
    for name, pipeline in pair.items():
        drawn = fit_gaussian(model(pipeline.sample(60, label=torch.arange(60) % 4, seed=0))[0])
        assert tree["pipelines"][name]["frechet"]["value"] == pytest.approx(frechet(real, drawn), rel=1e-6)
        expected = plain_precision_recall(model(unit(split["x"]))[0], model(pipeline.sample(60, label=torch.arange(60) % 4, seed=0))[0], 3)
        measured = tuple(tree["pipelines"][name][figure]["value"] for figure in ("precision", "recall"))
        assert measured == pytest.approx(expected) and "agreement" in tree["pipelines"][name]
    values = {name: found["frechet"]["value"] for name, found in tree["pipelines"].items()}
    assert tree["differences"] == {"two": tree["differences"]["two"]}
    assert tree["differences"]["two"]["value"] == pytest.approx(values["two"] - values["one"])
    text = script.table_text(tree)
    assert "FD (tiny 0000) of 60 samples to 60 train images" in text and "two - one: " in text
    assert compare(pair, source, model, config) == tree
    json.dumps(tree, allow_nan=False)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: Any, monkeypatch: Any, pair: dict[str, TwoStagePipeline]) -> None:
    for name, pipeline in pair.items():
        pipeline.save_pretrained(tmp_path / name)
    monkeypatch.setattr(script.SOURCES, "build", lambda config: Blobs())
    monkeypatch.setattr(script, "load_features", lambda *a: feature_model())
    words = ["--pipelines", f"{tmp_path / 'one'},{tmp_path / 'two'}", "--n", "40", "--bootstrap", "5", "--k", "2", "--device", "cpu"]
    script.main([*words, "--out", str(tmp_path / "out"), "--temperature", "0.8"])
    tree = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert tree["n"] == 40 and tree["sampling"] == {"temperature": 0.8} and script.table_text(tree) in capsys.readouterr().out


def test_pipelines_that_do_not_compare_are_refused(pair: dict[str, TwoStagePipeline]) -> None:
    for text in ("one", "one,one", "one,"):
        with pytest.raises(ConfigError, match="pipelines: .*expected at least two different ones, joined by commas"):
            named(text)
    plain = tiny.pipeline("gpt", labelled=False)
    with pytest.raises(ValueError, match="pipelines: some take labels and some do not"):
        compare({"one": pair["one"], "plain": plain}, Blobs(), feature_model(), CompareConfig(pipelines="a,b", **SMALL))
    with pytest.raises(ConfigError, match="pipelines: 'reference' is what the real images are called"):
        named("reference,one")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: Any, pair: dict[str, TwoStagePipeline]) -> Path:
    """The pair, one without labels, one whose classes were never seen and one without a null, in folders; nothing may be drawn."""
    monkeypatch.chdir(tmp_path)
    unseen = tiny.pipeline("gpt", micro_batch=16)
    spec = dataclasses.replace(unseen.priors[0].spec, class_counts=(0, 0, 0, 0))
    pipelines = pair | {"plain": tiny.pipeline("gpt", labelled=False)}
    pipelines["unseen"] = TwoStagePipeline(unseen.tokenizer, [tiny.prior("gpt", spec)])
    pipelines["sure"] = TwoStagePipeline(unseen.tokenizer, [tiny.prior("gpt", unseen.priors[0].spec, cond_dropout=0.0)])
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(name)
    Path("file").write_text("mine")
    for module in (script, guidance):
        monkeypatch.setattr(module.SOURCES, "build", lambda config: Blobs())
        monkeypatch.setattr(module, "load_features", lambda *a: feature_model())
        monkeypatch.setattr(module, "measure_samples", lambda *a, **k: pytest.fail("samples were drawn"))
        monkeypatch.setattr(module, "measure_reference", lambda *a, **k: pytest.fail("images were measured"))
    return tmp_path


@pytest.mark.parametrize("flag", [[], ["--check"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipelines", "one,plain"], "^pipelines: some take labels and some do not"),
        (["--pipelines", "one,unseen", "--balanced", "false"], "^label: the training frequencies of the classes are all 0"),
        (["--pipelines", "one,two", "--k", "40"], "^k: 40; expected fewer than"),
        (["--pipelines", "one,two", "--reference", "test"], "test"),
        (["--pipelines", "one,two", "--out", "file"], "^out: file is a file; expected a folder"),
    ],
)
def test_compare_says_what_it_refuses_before_any_draw_and_under_check(saved: Path, words: list[str], message: str, flag: list[str]) -> None:
    with pytest.raises((ValueError, KeyError, UserError), match=message):
        script.main(["--n", "40", "--k", "2", "--device", "cpu", *words, *flag])


@pytest.mark.parametrize("flag", [[], ["--check"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline", "plain"], "^guidance: no prior of this pipeline takes labels"),
        (["--pipeline", "sure"], "^guidance: 1.5; this prior was trained with cond_dropout 0"),
        (["--pipeline", "one", "--top_k", "99"], "^top_k: 99; expected at most the vocabulary"),
        (["--pipeline", "one", "--k", "40"], "^k: 40; expected fewer than"),
        (["--pipeline", "one", "--n", "4000", "--balanced", "true", "--reference", "test"], "test"),
        (["--pipeline", "one", "--out", "done"], "^out: done/guidance.json was measured with another pipeline, "),
        (["--pipeline", "one", "--out", "file/x"], "^out: file/x lies below a file; expected a folder"),
    ],
)
def test_guidance_says_what_it_refuses_before_any_draw_and_under_check(
    saved: Path, words: list[str], message: str, flag: list[str]
) -> None:
    Path("done").mkdir()
    Path("done/guidance.json").write_text('{"points": []}')
    with pytest.raises((ValueError, KeyError, UserError), match=message):
        guidance.main(["--n", "40", "--k", "2", "--device", "cpu", *words, *flag])


def test_an_option_that_one_pipeline_lacks_is_refused_before_any_draw(pair: dict[str, TwoStagePipeline], monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "measure_samples", lambda *a, **k: pytest.fail("samples were drawn"))
    config = CompareConfig(pipelines="two,one", sampling=SamplingConfig(steps=2), **SMALL)
    with pytest.raises(ValueError, match="steps: no prior of this pipeline has such a sampling option"):
        compare({"two": pair["two"], "one": pair["one"]}, Blobs(), feature_model(), config)


# Balance ---------------------------------------------------------------------------------------------------------------
def test_classes_are_balanced_where_the_reference_has_enough_of_each_and_else_follow_the_data() -> None:
    def chosen(n: int, balanced: bool | None = None, **source: Any) -> Any:
        config = CompareConfig(pipelines="a,b", n=n, k=2, balanced=balanced)
        return choose_reference(Blobs(**source), config, True)

    assert chosen(60).balanced and chosen(120).balanced and chosen(500).balanced and not chosen(60, False).balanced
    uneven = {"train": 121, "validation": 40}  # class 0 has one more: still balanced to one row
    assert chosen(500, **uneven).balanced
    assert chosen(40).balanced and not chosen(39).balanced and chosen(39, True).balanced  # 10 of each, or 9
    assert not chosen(500, train=39).balanced and chosen(8, True).balanced
    for n, source in ((7, {}), (500, {"train": 7})):
        with pytest.raises(ConfigError, match="^balanced: True, but 7 train images of 4 classes are 1 of each: intervals need 2"):
            chosen(n, True, **source)
    few = chosen(60, labels=[0] * 100 + [1] * 10 + [2] * 5 + [3] * 5)
    assert not few.balanced and len(few.rows) == 60
    with pytest.raises(ValueError, match="reference: 60 balanced images need 15 of class 1, there are 10"):
        chosen(60, True, labels=[0] * 100 + [1] * 10 + [2] * 5 + [3] * 5)
    with pytest.raises(ValueError, match="reference: 120 images with 5 to 100 per class are not balanced"):
        chosen(500, True, labels=[0] * 100 + [1] * 10 + [2] * 5 + [3] * 5)


# Samples as the configuration says -------------------------------------------------------------------------------------
def test_samples_are_those_of_the_options_the_seed_and_the_balance_that_the_configuration_says(pair: dict[str, TwoStagePipeline]) -> None:
    pipeline, source, model = pair["one"], Blobs(), feature_model()
    for balanced in (False, True):
        config = MeasureConfig(n=40, k=3, seed=5, sampling=SamplingConfig(temperature=0.3), balanced=balanced)
        found, _ = measure_samples(pipeline, config, choose_reference(source, config, True), model)
        asked = torch.arange(40) % 4 if balanced else pipeline.labels(40, seed=5)
        assert found.labels is not None and torch.equal(found.labels, asked)
        assert torch.equal(found.features, model(pipeline.sample(40, label=asked, seed=5, temperature=0.3))[0])
        assert (found.feature_set().labels is None) is not balanced  # resampling keeps the counts of classes that were fixed


# pipelines.guidance ----------------------------------------------------------------------------------------------------
def test_the_curve_over_guidance_is_that_of_the_samples_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: Any, pair: dict[str, TwoStagePipeline]
) -> None:
    source, model = Blobs(), feature_model()
    config = GuidanceConfig(values=(2.0, 1.0), out=str(tmp_path), sampling=SamplingConfig(temperature=0.5), **SMALL)
    tree = sweep(pair["two"], source, model, config)
    assert [one["guidance"] for one in tree["points"]] == [1.0, 2.0]
    chosen = choose_reference(source, config, True)
    strong, _ = measure_samples(pair["two"], config, chosen, model, options={"temperature": 0.5, "guidance": 2.0})
    assert tree["points"][1]["agreement"]["value"] == pytest.approx(strong.right().double().mean().item())
    real = model(unit(source.split("train").batch(chosen.rows)["x"]))[0]
    measured = tuple(tree["points"][1][figure]["value"] for figure in ("precision", "recall"))
    assert measured == pytest.approx(plain_precision_recall(real, strong.features, 3))
    drawn: list[Any] = []
    measure = guidance.measure_samples
    monkeypatch.setattr(guidance, "measure_samples", lambda *a, **k: drawn.append(k["options"]) or measure(*a, **k))
    more = sweep(pair["two"], source, model, config.replace(values=(1.0, 1.5, 2.0)))
    assert drawn == [{"temperature": 0.5, "guidance": 1.5}] and [one["guidance"] for one in more["points"]] == [1.0, 1.5, 2.0]
    assert more["points"][::2] == tree["points"] and json.loads((tmp_path / "guidance.json").read_text()) == more
    guidance.save_picture(tmp_path / "guidance.png", more)
    assert Image.open(tmp_path / "guidance.png").width > 1000
    assert "guidance 1.5: Frechet distance" in guidance.table_text(more)
    with pytest.raises(UserError, match="guidance.json was measured with another seed; expected the same, or another folder"):
        sweep(pair["two"], source, model, config.replace(seed=1))


def test_guidance_that_a_prior_does_not_have_is_refused_before_any_draw(tmp_path: Path, monkeypatch: Any) -> None:
    config = GuidanceConfig(out=str(tmp_path), **SMALL)
    with pytest.raises(ValueError, match="guidance: no prior of this pipeline takes labels"):
        sweep(tiny.pipeline("gpt", labelled=False), Blobs(), feature_model(), config)
    tok = tiny.tokenizer()
    sure = TwoStagePipeline(tok, [tiny.prior("gpt", tiny.codes_spec(tok), cond_dropout=0.0)])
    monkeypatch.setattr(type(sure.priors[0]), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    with pytest.raises(ValueError, match="guidance: 1.5; this prior was trained with cond_dropout 0"):
        sweep(sure, Blobs(), feature_model(), config)
    with pytest.raises(ConfigError, match="sampling.guidance: --values says which strengths"):
        guidance.main(["--guidance", "2"])


# pipelines.report ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def evaluations(pair: dict[str, TwoStagePipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    for name, pipeline in pair.items():
        found = evaluate_pipeline(pipeline, Blobs(), feature_model(), EvaluateConfig(**SMALL))
        assert found.seconds > 0
        (folder / name).mkdir()
        (folder / name / "evaluation.json").write_text(json.dumps(found.tree))
    (folder / "two" / "timing.json").write_text(json.dumps(Timing(3.0, 60, "cpu", 1).to_dict()))
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_table_has_a_row_per_pipeline_and_marks_bounds(evaluations: Path, capsys: Any) -> None:
    out = evaluations / "tables" / "table.md"
    words = ["--evaluations", f"{evaluations / 'one'},{evaluations / 'two'}", "--out", str(out)]
    report.main([*words, "--check"])
    shown = capsys.readouterr().out
    assert not out.exists()
    report.main(words)
    text = out.read_text()
    assert capsys.readouterr().out == text == shown
    head, rule, one, two, _, note = text.splitlines()
    assert set(cells(rule)) == {"---"} and len(cells(head)) == len(cells(one)) == len(cells(two))
    first, second = dict(zip(cells(head), cells(one), strict=True)), dict(zip(cells(head), cells(two), strict=True))
    assert first["tokenizer"] == "vqvae, 4x4 of 16" and second["tokenizer"] == "ladder, 2x2 of 5 + 4x4 of 7"
    assert first["prior"] == "gpt (codes)" and second["prior"] == "maskgit (top) + maskgit (bottom)"
    tree = json.loads((evaluations / "two" / "evaluation.json").read_text())
    bits = tree["bits"]["total"]["bits_per_image"]
    assert second["bits per image"] == f"<= {bits:.1f} (bound)" and float(first["bits per image"]) > 0
    assert first["s per 1,000 samples"] == "" and second["s per 1,000 samples"] == "50 (cpu, 1)"
    assert second["recall"] == f"{tree['samples']['precision_recall']['samples']['recall']['value']:.3f}"
    train = tree["data"]["splits"]["train"]["sha256"][:8]
    assert f"features: tiny 0000; n: 60; reference: 60 train {train}; classes: balanced; k: 3; split: validation" in note


def test_a_table_names_the_grids_that_the_priors_model(evaluations: Path) -> None:
    tree = json.loads((evaluations / "two" / "evaluation.json").read_text())
    tree["pipeline"]["priors"].pop()
    (evaluations / "top").mkdir()
    (evaluations / "top" / "evaluation.json").write_text(json.dumps(tree))
    assert read_row(str(evaluations / "top")).cells["tokenizer"] == "ladder, 2x2 of 5"


def test_the_printed_figures_of_one_pipeline_mark_bounds(evaluations: Path) -> None:
    from pipelines.evaluation.report import table

    exact, bound = (table(json.loads((evaluations / name / "evaluation.json").read_text())) for name in ("one", "two"))
    assert "<=" not in exact and "bound" not in exact
    lines = [line for line in bound.splitlines() if "bits per code" in line]
    assert len(lines) == 3 and all(line.count("<= ") == 2 and line.count("(bound)") == 2 for line in lines)


def test_figures_that_do_not_compare_are_refused_or_named(evaluations: Path, tmp_path: Path) -> None:
    tree = json.loads((evaluations / "one" / "evaluation.json").read_text())
    tree["samples"]["features"]["name"] = "other 1111"
    (tmp_path / "evaluation.json").write_text(json.dumps(tree))
    rows = [read_row(str(evaluations / "one")), read_row(str(tmp_path))]
    with pytest.raises(UserError, match="has features 'other 1111', .* 'tiny 0000': the figures do not compare; --mixed true"):
        markdown(rows)
    tree["samples"]["features"]["name"], tree["samples"]["precision_recall"]["k"] = "tiny 0000", 7
    (tmp_path / "evaluation.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="has k '7', .* '3': the figures do not compare"):
        markdown([rows[0], read_row(str(tmp_path))])
    text = markdown(rows, mixed=True)
    assert "| other 1111 |" in text and "features: " not in text.splitlines()[-1]
    with pytest.raises(UserError, match="nowhere/evaluation.json: there is no such file"):
        read_row("nowhere")
    (tmp_path / "evaluation.json").write_text(json.dumps({"samples": {}}))
    with pytest.raises(UserError, match="no evaluation of this version: 'counts' is missing; run pipelines.evaluate again"):
        read_row(str(tmp_path))
