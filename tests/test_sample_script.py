"""python -m pipelines.sample: files of samples, and one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.cli import run_main
from intarsia.pictures import mosaic
from intarsia.specs import SignalSpec
from pipelines import TwoStagePipeline, sample
from pipelines.outputs import to_uint8
from tests import tiny_pipelines as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "pipeline"
    tiny.pipeline("gpt", micro_batch=8).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TwoStagePipeline:
    return TwoStagePipeline.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _here(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_png_holds_the_grid_of_the_samples(folder: Path, pipeline: TwoStagePipeline, tmp_path: Path, capsys: Any) -> None:
    sample.main(["--pipeline", str(folder), "--n", "6", "--seed", "4", "--columns", "3", "--label", "bag", "--out", "new/grid.png"])
    expected = mosaic(pipeline.sample(6, seed=4, label="bag"), 3)
    assert np.array_equal(pixels("new/grid.png"), np.asarray(expected))
    assert capsys.readouterr().out == "6 samples of seed 4: new/grid.png\n"


def test_an_npz_holds_bytes_labels_and_indices(folder: Path, pipeline: TwoStagePipeline) -> None:
    sample.main(["--pipeline", str(folder), "--n", "5", "--first", "20", "--seed", "4", "--out", "part.npz", "--batch_size", "2"])
    with np.load("part.npz") as arrays:
        assert np.array_equal(arrays["images"], to_uint8(pipeline.sample(25, seed=4)[20:])) and arrays["images"].shape == (5, 8, 8, 1)
        assert arrays["index"].tolist() == [20, 21, 22, 23, 24]
        assert arrays["label"].tolist() == pipeline.labels(5, first=20, seed=4).tolist()


def test_a_folder_holds_a_picture_per_sample_and_what_they_are(folder: Path, pipeline: TwoStagePipeline) -> None:
    sample.main(["--pipeline", str(folder), "--n", "4", "--first", "3", "--label", "all", "--temperature", "0.5", "--out", "set"])
    facts = json.loads(Path("set/samples.json").read_text())
    assert sorted(p.name for p in Path("set").iterdir()) == [f"{i:06d}.png" for i in (3, 4, 5, 6)] + ["plan.json", "samples.json"]
    assert facts["label"] == [3, 0, 1, 2] and facts["sampling"] == [{"temperature": {"codes": 0.5}}]
    assert facts["classes"] == list(tiny.CLASSES) and facts["priors"] == [pipeline.priors[0].weights_sha256]
    rows = torch.stack([x for _, x in pipeline.stream(4, first=3, label=[3, 0, 1, 2], temperature=0.5, seed=facts["seed"])])
    assert np.array_equal(np.stack([pixels(f"set/{i:06d}.png") for i in (3, 4, 5, 6)]), to_uint8(rows)[..., 0])


def test_the_class_of_a_sample_does_not_depend_on_where_a_set_begins(folder: Path) -> None:
    for name, first, n in (("whole", "0", "7"), ("end", "4", "3")):
        sample.main(["--pipeline", str(folder), "--n", n, "--first", first, "--label", "bag,dress,shoe", "--seed", "2", "--out", name])
    whole, end = (json.loads(Path(f"{name}/samples.json").read_text())["label"] for name in ("whole", "end"))
    assert whole == [1, 3, 0, 1, 3, 0, 1] and end == whole[4:]
    assert all(Path(f"end/{i:06d}.png").read_bytes() == Path(f"whole/{i:06d}.png").read_bytes() for i in (4, 5, 6))


def test_what_a_writer_left_that_was_killed_before_its_plan_is_in_nobodys_way(folder: Path) -> None:
    Path("torn").mkdir()
    Path("torn/.tmp-7-plan.json").write_text("{")
    sample.main(["--pipeline", str(folder), "--n", "1", "--seed", "2", "--out", "torn"])
    assert sorted(p.name for p in Path("torn").iterdir()) == ["000000.png", "plan.json", "samples.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("2", [2]), ("shirt", [2]), ("all", [0, 1, 2, 3]), ("bag, 3", [1, 3])],
)
def test_labels_are_dealt_in_turn(text: str, expected: list[int] | None) -> None:
    assert sample.turns(text, tiny.CLASSES) == expected


def test_a_class_name_comes_before_an_index_a_list_or_all() -> None:
    assert sample.turns("7", ("3", "7", "a,b", "all")) == [1]
    assert sample.turns("a,b", ("3", "7", "a,b", "all")) == [2]
    assert sample.turns("all", ("3", "7", "a,b", "all")) == [3]


@pytest.mark.parametrize("classes", [("10", "2", "3"), ("a", "2", "-1.5"), ("1.5", "b", "c")])
def test_where_a_class_has_a_number_for_a_name_every_word_is_a_name(classes: tuple[str, ...]) -> None:
    assert sample.turns(f"{classes[1]}, {classes[0]}", classes) == [1, 0]
    for text in ("1", "0,1,2", f"{classes[0]},0", "-1"):
        with pytest.raises(ValueError, match=rf"^label: unknown class '-?[01]'.* known: {', '.join(classes)}$"):
            sample.turns(text, classes)
    assert sample.turns("all", classes) == [0, 1, 2]


def test_without_a_pipeline_the_bundled_one_is_asked_for(monkeypatch: Any, pipeline: TwoStagePipeline) -> None:
    monkeypatch.setattr(TwoStagePipeline, "bundled", classmethod(lambda cls: pipeline))
    sample.main(["--n", "1"])
    assert Path("grid.png").is_file()


def test_check_looks_at_everything_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    sample.main(["--pipeline", str(folder), "--check"])
    assert list(tmp_path.iterdir()) == []


def test_check_compares_with_the_plan_that_is_there_and_one_rank_tells(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    words = ["--pipeline", str(folder), "--n", "2", "--seed", "1", "--out", "set"]
    sample.main(words)
    sample.main([*words, "--check"])
    with pytest.raises(sample.UserError, match=r"^out: set/plan.json is the plan of other samples: n 2 there, 3 now"):
        sample.main([*words, "--n", "3", "--check"])
    capsys.readouterr()
    monkeypatch.setattr(sample, "comm", SimpleNamespace(rank=1))
    sample.main([*words, "--check"])
    assert capsys.readouterr().out == ""


def test_a_batch_below_the_micro_batch_is_told_that_it_saves_no_memory(folder: Path, capsys: Any) -> None:
    for size, told in (("7", True), ("8", False)):
        sample.main(["--pipeline", str(folder), "--n", "2", "--batch_size", size, "--check"])
        shown = capsys.readouterr().out
        assert ("batch_size: 7 is below the pipeline's micro_batch, 8" in shown) is told


def files(folder: Path) -> None:
    Path("full").mkdir()
    Path("full/x").write_text("")
    Path("dir.png").mkdir()
    Path("file").write_text("")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "n: "),
        (["--n", "2.5"], "n: "),
        (["--m", "2"], "--m: unknown key"),
        (["--temperature", "-1"], "temperature: -1"),
        (["--top_k", "17"], "top_k: 17; expected at most the vocabulary of level 'codes', 16"),
        (["--top_p", "0"], "top_p: 0"),
        (["--temperature.top", "0.5"], "temperature.top: unknown level; the levels are codes"),
        (["--steps", "3"], "steps: no prior of this pipeline has such a sampling option; the gpt prior of codes has temperature"),
        (["--temperature", "warm"], "sampling.temperature: expected a number, or a mapping from names of levels to such; got 'warm'"),
        (["--seed", "-1"], "seed: "),
        (["--label", "sho"], "label: unknown class 'sho'; did you mean 'shoe'?"),
        (["--label", "bag,9"], "label: 9 is out of range; expected 0 to 3"),
        (["--label", "-1"], "label: -1 is out of range"),
        (["--out", "x.jpg"], "out: 'x.jpg' ends with '.jpg'; expected .png, .npz, or a folder (x.jpg/)"),
        (["--out", "full"], "out: full holds 'x', but no plan.json; expected a new or empty folder, or one that"),
        (["--out", "file"], "out: file is a file; expected a folder"),
        (["--out", "dir.png"], "out: dir.png is a folder"),
        (["--out", "file/x.png"], "out: file is a file; expected a folder"),
        (["--device", "gpu"], "device: 'gpu' cannot be used: "),
        (["--columns", "3", "--out", "new"], "columns: new is a folder; only a grid has it"),
        (["--columns", "3", "--out", "x.npz"], "columns: x.npz is a file of arrays; only a grid has it"),
        (["--format", "png"], "format: grid.png is a grid; only a folder has it"),
        (["--shard", "1000", "--out", "x.npz"], "shard: x.npz is a file of arrays; only a folder has it"),
        (["--max_steps", "3"], "--max_steps: pipelines.sample has no use for it"),
        (["--dry_run"], "--dry_run: pipelines.sample has no use for it"),
        (["--pipeline", "nowhere"], "'nowhere' is neither a folder nor a Hub id"),
        (["--pipeline", "full"], "full/pipeline.json: there is no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, capsys: Any, monkeypatch: Any, arguments: list[str], message: str) -> None:
    files(folder)
    monkeypatch.setattr(TwoStagePipeline, "_draw", lambda *a: pytest.fail("a sample was drawn"))
    before = sorted(Path.cwd().rglob("*"))
    given = arguments if "--pipeline" in arguments else ["--pipeline", str(folder), *arguments]
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: sample.main(given))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_named(folder: Path, monkeypatch: Any) -> None:
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    with pytest.raises(sample.UserError, match="^out: locked cannot be written to: Permission denied"):
        sample.main(["--pipeline", str(folder), "--out", "locked/x.png"])


@pytest.mark.parametrize("out", ["grid.png", "part.npz"])
def test_several_processes_need_a_folder(folder: Path, monkeypatch: Any, out: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sample.UserError, match=f"out: {out} is one file, which 2 processes cannot write together; give a folder"):
        sample.main(["--pipeline", str(folder), "--out", out])


HEAVY = "transformers datasets wandb matplotlib torchvision accelerate sklearn scipy"
CODE = """
import runpy, sys
sys.argv = ["pipelines.sample", *sys.argv[1:]]
runpy.run_module("pipelines.sample", run_name="__main__", alter_sys=True)
found = sorted(set({heavy!r}.split()) & set(sys.modules))
assert not found, found
"""


def test_the_script_samples_without_a_heavy_import(folder: Path, root: Path) -> None:
    code = CODE.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code, "--pipeline", str(folder), "--n", "4", "--out", str(Path.cwd() / "grid.png")],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pixels("grid.png").shape[2] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.png"], "out: x.png: PNG files hold images of 1 or 3 channels; these are audio of 2; expected a .npz file"),
        (["--out", "new"], "format: png: PNG files hold images of 1 or 3 channels; these are audio of 2; expected --format npz"),
        (["--out", "new", "--format", "png"], "format: png: PNG files hold images"),
        (["--out", "x.npz"], None),
        (["--out", "new", "--format", "npz"], None),
    ],
)
def test_what_is_no_picture_wants_arrays_and_the_flag_for_them_is_named(
    folder: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str | None
) -> None:
    monkeypatch.setattr(TwoStagePipeline, "signal", property(lambda self: SignalSpec("audio", 2, (8,))))
    if message is None:
        sample.main(["--pipeline", str(folder), "--check", *arguments])
        return
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: sample.main(["--pipeline", str(folder), *arguments]))
    assert exit.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")
