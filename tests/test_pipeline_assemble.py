"""python -m pipelines.assemble: runs to one folder, with what is told it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.cli import UserError
from intarsia.config import ConfigError
from pipelines import TwoStagePipeline, assemble
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture


@pytest.fixture(scope="module")
def ladder(ladders: None) -> TwoStagePipeline:
    return tiny.pipeline("ladder", micro_batch=8, defaults={"temperature": 0.9, "top_k": 4})


def test_assembling_keeps_the_sampling_options_that_it_is_given(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    for name, part in zip(("tok", "top", "bottom"), (ladder.tokenizer, *ladder.priors), strict=True):
        part.save_pretrained(tmp_path / name)
    words = [
        "--tokenizer",
        str(tmp_path / "tok"),
        "--priors",
        f"{tmp_path / 'top'}, {tmp_path / 'bottom'}",
        "--out",
        str(tmp_path / "made"),
    ]
    words += ["--temperature.top", "0.5", "--min_p", "0.1", "--guidance.start", "1", "--guidance.stop", "3"]
    assemble.main([*words, "--check"])
    assert not (tmp_path / "made").exists()
    assemble.main(words)
    options = {"temperature": {"top": 0.5}, "min_p": 0.1, "guidance": {"start": 1, "stop": 3}}
    loaded = TwoStagePipeline.from_pretrained(tmp_path / "made")
    assert loaded.defaults == options
    plain = TwoStagePipeline(ladder.tokenizer, ladder.priors, micro_batch=32)
    assert torch.equal(loaded.sample(8, seed=0, label=1), plain.sample(8, seed=0, label=1, **options))
    with pytest.raises(ValueError, match="temperature.middle: unknown level"):
        assemble.main([*words, "--temperature.middle", "1"])


def test_assembling_keeps_a_micro_batch_and_takes_a_path_with_a_comma(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    tokenizer, prior = tmp_path / "lr=1,wd=2" / "tok", tmp_path / "lr=1,wd=2" / "top"
    ladder.tokenizer.save_pretrained(tokenizer)
    ladder.priors[0].save_pretrained(prior)
    words = ["--tokenizer", str(tokenizer), "--priors", str(prior), "--out"]
    assemble.main([*words, str(tmp_path / "plain")])
    assemble.main([*words, str(tmp_path / "small"), "--micro_batch", "4"])
    sizes = {name: TwoStagePipeline.from_pretrained(tmp_path / name).micro_batch for name in ("plain", "small")}
    assert sizes == {"plain": 32, "small": 4}


@pytest.mark.parametrize("flag", [[], ["--check"]])
def test_a_place_that_will_not_be_written_to_is_said_before_the_parts_are_read(tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "release" / "tokenizer").mkdir(parents=True)
    words = ["--tokenizer", "nowhere", "--priors", "nowhere", "--out"]
    for out, message in (("file", "is a file"), ("file/x", "lies below a file"), ("release", "holds 'tokenizer', but no pipeline.json")):
        with pytest.raises(UserError, match=f"^out: {tmp_path / out}:? {message}"):
            assemble.main([*words, str(tmp_path / out), *flag])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "release"]


def test_another_pipeline_is_replaced_only_where_that_is_said(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    for name, part in zip(("tok", "top", "bottom"), (ladder.tokenizer, *ladder.priors), strict=True):
        part.save_pretrained(tmp_path / name)
    out, both = str(tmp_path / "made"), f"{tmp_path / 'top'},{tmp_path / 'bottom'}"
    words = ["--tokenizer", str(tmp_path / "tok"), "--out", out, "--priors"]
    assemble.main([*words, both])
    assemble.main([*words, both, "--micro_batch", "4"])  # the same parts
    sha = ladder.priors[1].weights_sha256[:12]
    for flag in ([], ["--check"]):
        with pytest.raises(UserError, match=f"^out: {out} holds another pipeline: priors/1 is pixelcnn {sha} there, none here; --over"):
            assemble.main([*words, str(tmp_path / "top"), *flag])
    assert len(TwoStagePipeline.from_pretrained(out).priors) == 2
    assemble.main([*words, str(tmp_path / "top"), "--overwrite=true"])
    assert len(TwoStagePipeline.from_pretrained(out).priors) == 1


@pytest.mark.parametrize("priors", [",", "a,", " "])
def test_an_empty_path_is_said_of_priors(tmp_path: Path, priors: str) -> None:
    with pytest.raises(ConfigError, match=f"^priors: '{priors}' holds an empty path"):
        assemble.main(["--tokenizer", "x", "--priors", priors, "--out", str(tmp_path / "made")])


def test_a_pipeline_is_saved_into_a_clone_and_not_among_images(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    for name in ("LICENSE", ".gitattributes"):
        (tmp_path / "clone" / name).write_text("theirs")
    ladder.save_pretrained(tmp_path / "clone")
    ladder.save_pretrained(tmp_path / "clone")
    assert len(TwoStagePipeline.from_pretrained(tmp_path / "clone").priors) == 2
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").touch()
    for saved in (ladder, ladder.tokenizer, ladder.priors[0]):
        with pytest.raises(FileExistsError, match=r"photos: holds images in 'cats', but no (pipeline|config)\.json"):
            saved.save_pretrained(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cats"]
