"""pipelines.judge_completions: figures against plain code, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from intarsia.cli import UserError
from pipelines import judge_completions
from pipelines.evaluation.baseline import IndependentCodes
from pipelines.judge_completions import JudgeConfig, main, measure_completions, part_mask
from pipelines.masks import kept_cells
from pipelines.sampling_config import SamplingConfig
from stage1_tokenizer.metrics import unit
from tests import tiny_pipelines as tiny
from tests.test_evaluation_pipeline import Blobs

ladders = tiny.ladders  # a fixture


@pytest.mark.parametrize("kind", ["maskgit", "parallel"])
def test_the_figures_are_those_of_plain_code(kind: str) -> None:
    pipeline, judge = tiny.pipeline(kind, micro_batch=16), tiny.pipeline("gpt" if kind == "maskgit" else "ladder", micro_batch=16)
    source, options = Blobs(), SamplingConfig(temperature=0.7)
    tree, pictures = measure_completions(pipeline, judge, source, JudgeConfig(part="right", n=30, seed=3, sampling=options, bootstrap=20))
    held, train = (source.split(name).batch(torch.arange(n)) for name, n in (("validation", 30), ("train", 120)))
    codes, mask = pipeline.encode(unit(held["x"])), torch.zeros(30, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    keep = [kept_cells(mask, level.shape) for level in pipeline.spec.levels]
    drawn = sum(level.positions for level in pipeline.spec.levels) // 2
    border = unit(held["x"])[..., :4]
    told = pipeline.encode(torch.cat([border, border[..., -1:].expand(-1, -1, -1, 4)], -1))
    completed = pipeline.complete_codes(told, keep, label=held["label"], seed=3, temperature=0.7)
    baseline = IndependentCodes(pipeline.spec.levels, pipeline.encode(unit(train["x"])), train["label"], 4)
    marginal = baseline.sample(torch.arange(30), held["label"], 3)
    independent = [torch.where(k, c, m) for k, c, m in zip(keep, told, marginal, strict=True)]
    real = [torch.where(k, t, c) for k, t, c in zip(keep, told, codes, strict=True)]
    bits = {
        name: judge.nll(found, held["label"]).mean().item() / math.log(2) / drawn
        for name, found in (("real", real), ("completed", completed), ("independent", independent))
    }
    found = tree["bits_per_drawn_code"]
    assert tree["drawn_codes"] == drawn and tree["images"] == 30 and bits["completed"] != bits["independent"]
    assert found["completed_above_real"]["value"] == pytest.approx(bits["completed"] - bits["real"])
    assert found["independent_above_real"]["value"] == pytest.approx(bits["independent"] - bits["real"])
    last = found["independent_above_completed"]
    assert last["value"] == pytest.approx(bits["independent"] - bits["completed"]) and last["low"] < last["value"] < last["high"]
    assert torch.equal(pictures["completed"], pipeline.decode([c[:10] for c in completed]))
    json.dumps(tree, allow_nan=False)


def test_nothing_of_what_is_hidden_reaches_what_is_drawn(monkeypatch: Any) -> None:
    pipeline, few = tiny.pipeline("maskgit", micro_batch=16), JudgeConfig(part="right", n=12, bootstrap=2)
    before = measure_completions(pipeline, pipeline, Blobs(), few)[1]
    source, mask = Blobs(), part_mask("right", 1, (8, 8))
    held = source.split("validation")
    real = held.batch
    monkeypatch.setattr(held, "batch", lambda *a, **k: (found := real(*a, **k)) | {"x": torch.where(mask, -found["x"], found["x"])})
    after = measure_completions(pipeline, pipeline, source, few)[1]
    assert torch.equal(before["completed"], after["completed"]) and torch.equal(before["independent"], after["independent"])
    assert not torch.equal(before["real"], after["real"])


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (28, 28)])
def test_halves_make_a_whole_and_the_centre_has_a_border(shape: tuple[int, int]) -> None:
    masks = {part: part_mask(part, 1, shape)[0, 0] for part in ("upper", "lower", "left", "right", "centre")}
    assert torch.equal(masks["upper"], ~masks["lower"]) and torch.equal(masks["left"], ~masks["right"])
    centre = masks["centre"]
    assert centre.any() and not (centre[0].any() or centre[-1].any() or centre[:, 0].any() or centre[:, -1].any())
    assert torch.equal(centre, centre.flip(0, 1))


def test_what_cannot_be_judged_or_completed_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(judge_completions, "encoded", lambda *a: pytest.fail("images were encoded"))
    one, source, few = tiny.pipeline("gpt"), Blobs(), JudgeConfig(part="right", n=4, bootstrap=2)
    with pytest.raises(ValueError, match="^part: the gpt prior of codes cannot complete it"):
        measure_completions(one, one, source, few)
    other = tiny.TwoStagePipeline(tiny.tokenizer(5), [tiny.prior("gpt", tiny.codes_spec(tiny.tokenizer(5)))])
    with pytest.raises(ValueError, match=r"judge: its tokenizer is \w{12}; the pipeline's is \w{12}"):
        measure_completions(one, other, source, few)


def test_a_judge_of_other_levels_is_refused(ladders: None) -> None:
    both = tiny.pipeline("parallel", micro_batch=16)
    top = tiny.TwoStagePipeline(both.tokenizer, [both.priors[0]])
    for pipeline, judge, said in ((both, top, "model 1 level.s. of codes; those of the pipeline 2"), (top, both, "model 2 level.s.")):
        with pytest.raises(ValueError, match=f"^judge: its priors {said}"):
            measure_completions(pipeline, judge, Blobs(), JudgeConfig(part="right", n=4, bootstrap=2))


@pytest.mark.parametrize("flag", [[], ["--check"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "test"),
        (["--part", "right"], "^part: the pixelcnn prior of codes cannot complete it"),
        (["--steps", "3"], "^steps: no prior of this pipeline has such a sampling option"),
        (["--out", "file/below"], "^out: file/below lies below a file"),
    ],
)
def test_check_says_what_the_run_refuses_before_an_image_is_encoded(
    tmp_path: Path, monkeypatch: Any, words: list[str], message: str, flag: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    tiny.pipeline("pixelcnn", micro_batch=16).save_pretrained("one")
    monkeypatch.setattr(judge_completions.SOURCES, "build", lambda config: Blobs())
    monkeypatch.setattr(judge_completions, "encoded", lambda *a: pytest.fail("images were encoded"))
    with pytest.raises((ValueError, KeyError, UserError), match=message):
        main(["--pipeline", "one", "--judge", "one", "--device", "cpu", "--out", "new", *words, *flag])


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for kind in ("maskgit", "pixelcnn"):
        tiny.pipeline(kind, micro_batch=16).save_pretrained(tmp_path / kind)
    monkeypatch.setattr(judge_completions.SOURCES, "build", lambda config: Blobs())
    words = ["--pipeline", str(tmp_path / "maskgit"), "--judge", str(tmp_path / "pixelcnn"), "--part", "centre", "--n", "500"]
    main([*words, "--out", str(tmp_path / "checked"), "--check"])
    assert not (tmp_path / "checked").exists()
    main([*words, "--out", str(tmp_path / "out"), "--bootstrap", "5", "--device", "cpu", "--steps", "3"])
    tree = json.loads((tmp_path / "out" / "completions.json").read_text())
    assert tree["images"] == 40 and tree["drawn_codes"] == 4 and tree["sampling"] == {"steps": 3}
    with Image.open(tmp_path / "out" / "completions.png") as picture:
        assert picture.width > picture.height > 100
    assert "drawn independently, above completed: " in capsys.readouterr().out


def test_a_row_of_tokens_over_an_image_is_drawn_as_a_whole() -> None:
    pipeline = tiny.tokens("gpt")
    tree, pictures = measure_completions(pipeline, pipeline, Blobs(), JudgeConfig(part="centre", n=12, bootstrap=2))
    assert tree["drawn_codes"] == 4 and pictures["completed"].shape == (10, 1, 8, 8)
