"""The examples run as they stand."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from pipelines import TwoStagePipeline
from tests import tiny_pipelines as tiny


def example(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_example_ends_with_a_pipeline_and_a_row_per_class(root: Path, tmp_path: Path) -> None:
    example(root, "train_and_sample").main(str(tmp_path), images=700, tokenizer_steps=2, prior_steps=2)
    assert TwoStagePipeline.from_pretrained(tmp_path / "pipeline").classes[7] == "sneaker"
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height > picture.width > 8 * 28


@pytest.mark.parametrize("labelled", [True, False])
def test_the_example_of_use_runs_with_and_without_classes(root: Path, tmp_path: Path, capsys: Any, labelled: bool) -> None:
    tiny.pipeline("gpt", labelled=labelled).save_pretrained(tmp_path / "pipeline")
    example(root, "use_a_pipeline").main(str(tmp_path / "pipeline"), str(tmp_path / "samples"))
    said = capsys.readouterr().out
    assert "always the same: True" in said and "bits per image [" in said
    assert len(list((tmp_path / "samples").glob("*.png"))) == (8 if labelled else 0)


def test_the_example_of_completion_draws_a_row_for_each_completion(root: Path, tmp_path: Path, capsys: Any) -> None:
    complete = example(root, "complete_images")
    complete.main(str(tmp_path / "lower.png"), n=2)
    assert "20 completions" in capsys.readouterr().out
    with Image.open(tmp_path / "lower.png") as picture:
        assert picture.width > 10 * 28 and picture.height > 4 * 28
    with pytest.raises(ValueError, match="mask: the pixelcnn prior of codes cannot complete it"):
        complete.main(str(tmp_path / "centre.png"), part="centre")
