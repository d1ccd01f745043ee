"""pipelines.evaluate as a command: its pictures, what it says before the work, and where its temporary files lie."""

import shutil
import tempfile

import pytest
import torch

from intarsia.cli import UserError
from intarsia.config import ConfigError
from intarsia.specs import SignalSpec
from pipelines import evaluate
from pipelines.evaluate import main
from pipelines.evaluation.sets import ImageSet, balanced_labels
from tests import tiny_pipelines as tiny
from tests.test_evaluation_pipeline import Blobs, feature_model


@pytest.mark.parametrize(
    ("n", "classes", "columns"), [(25, 10, 2), (10, 10, 1), (200, 10, 10), (300, 100, 3), (9, 10, None), (400, 350, None)]
)
def test_samples_are_drawn_with_a_row_per_class_where_each_has_one(tmp_path, monkeypatch, n, classes, columns):
    drawn = {}
    monkeypatch.setattr(evaluate, "save_grid", lambda path, x, **settings: drawn.update(settings, images=len(x)))
    names, images = [f"class {c}" for c in range(classes)], torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    labels = balanced_labels(n, classes)
    evaluate._draw_rows(ImageSet("samples", torch.zeros(n, 2), labels, labels, images=images), names, tmp_path / "x.png", "Samples")
    if columns is None:
        assert drawn["columns"] == 10 and "row_labels" not in drawn, "a plain grid"
    else:
        assert (drawn["columns"], drawn["row_labels"], drawn["images"]) == (columns, names, columns * classes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "60", "--k", "60"], "^k: 60; expected fewer"),
        (["--n", "100", "--reference", "validation", "--balanced", "true", "--k", "3"], None),
        (["--n", "30", "--top_k", "99", "--k", "3"], "^top_k: 99; expected at most the vocabulary"),
        (["--n", "30", "--split", "test"], "test"),
        (["--n", "30", "--split", "train"], "^split: .*'validation' or 'test'"),
        (["--n", "30", "--k", "3", "--out", "/dev/null/x"], "^out: /dev/null/x lies below a file; expected a folder"),
    ],
)
def test_check_says_what_the_work_would_stumble_over(tmp_path, monkeypatch, words, message):
    tiny.pipeline("gpt", micro_batch=16).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(evaluate.SOURCES, "build", lambda config: Blobs())
    monkeypatch.setattr(evaluate, "load_features", lambda *a: feature_model())
    words = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--device", "cpu", "--check", *words]
    if message is None:
        main(words)
    else:
        with pytest.raises((ConfigError, ValueError, UserError), match=message):
            main(words)
    assert not (tmp_path / "out").exists()


def test_images_lie_in_the_folder_that_is_written_to_and_a_full_disk_is_said_before(tmp_path, monkeypatch):
    tiny.pipeline("gpt", micro_batch=16).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(evaluate.SOURCES, "build", lambda config: Blobs())
    monkeypatch.setattr(evaluate, "load_features", lambda *a: feature_model())
    used, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: used.append(k.get("dir")) or real(*a, **k))
    words = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--device", "cpu", "--n", "20", "--k", "2"]
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(UserError, match=r"^out: .*out: \d+ bytes are needed for 320 images, 1000 are free; --allow_low_space"):
            main(words)
    used.clear()
    main([*words, "--bootstrap", "3"])
    assert {str(folder) for folder in used if folder is not None} == {str(tmp_path / "out")}
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".json", ".png")] == []


def test_images_that_no_picture_holds_are_measured_all_the_same(tmp_path, monkeypatch, capsys):
    tiny.pipeline("gpt", micro_batch=16).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(evaluate.SOURCES, "build", lambda config: Blobs())
    monkeypatch.setattr(evaluate, "load_features", lambda *a: feature_model())
    monkeypatch.setattr(SignalSpec, "drawable", property(lambda self: False))
    words = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--device", "cpu", "--n", "20", "--k", "2"]
    main([*words, "--bootstrap", "3"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "timing.json"]
    assert "no pictures: images of 1 channels" in capsys.readouterr().out
