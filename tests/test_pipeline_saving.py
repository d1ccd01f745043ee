"""Pipelines in folders and on the Hub: exact, whole or refused, each part alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines.two_stage
from intarsia.hub_files import HubError
from pipelines import TwoStagePipeline, load_prior, load_tokenizer
from stage2_prior.priors.base import Prior
from tests import tiny_pipelines as tiny
from tests.hub_server import HubServer

ladders = tiny.ladders  # a fixture

FILES = ["README.md", "pipeline.json"] + [
    f"{part}/{name}" for part in ("priors/0", "priors/1", "tokenizer") for name in ("README.md", "config.json", "model.safetensors")
]


@pytest.fixture(scope="module")
def ladder(ladders: None) -> TwoStagePipeline:
    return tiny.pipeline("ladder", micro_batch=8, defaults={"temperature": 0.9, "top_k": 4})


@pytest.fixture(scope="module")
def kept(ladder: TwoStagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "pipeline"
    ladder.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(kept: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(kept, tmp_path / "pipeline"))


@pytest.fixture
def hub(monkeypatch: Any, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.redirect(monkeypatch, tmp_path / "cache")
        yield server


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def same(a: TwoStagePipeline, b: TwoStagePipeline) -> bool:
    return torch.equal(a.sample(20, seed=3), b.sample(20, seed=3))


# Folders ---------------------------------------------------------------------------------------------------------------
def test_a_saved_pipeline_loads_with_the_same_samples_settings_and_likelihoods(ladder: TwoStagePipeline, kept: Path) -> None:
    assert files(kept) == sorted(FILES)
    loaded = TwoStagePipeline.from_pretrained(kept)
    assert same(ladder, loaded) and loaded.micro_batch == 8 and loaded.defaults == {"temperature": 0.9, "top_k": 4}
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.nll(x, "bag"), ladder.nll(x, "bag")) and torch.equal(loaded.reconstruct(x), ladder.reconstruct(x))
    assert json.loads((kept / "pipeline.json").read_text())["format"] == "pipeline/1"


def test_defaults_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    defaults = {"temperature": np.float32(0.5), "top_k": {"codes": np.int64(5)}, "guidance": {"start": np.float64(1), "stop": 2}}
    tiny.pipeline("gpt", defaults=defaults).save_pretrained(tmp_path)
    loaded = TwoStagePipeline.from_pretrained(tmp_path)
    assert loaded.defaults == {"temperature": 0.5, "top_k": {"codes": 5}, "guidance": {"start": 1.0, "stop": 2}}
    assert same(loaded, tiny.pipeline("gpt", defaults=defaults))


def test_each_part_loads_alone(ladder: TwoStagePipeline, kept: Path) -> None:
    bottom = load_prior(kept, subfolder="priors/1")
    assert bottom.levels == range(1, 2) and bottom.weights_sha256 == ladder.priors[1].weights_sha256
    assert load_tokenizer(kept / "tokenizer").fingerprint == ladder.tokenizer.fingerprint


def test_two_savings_of_one_pipeline_are_the_same_bytes(ladder: TwoStagePipeline, kept: Path, tmp_path: Path) -> None:
    ladder.save_pretrained(tmp_path / "pipeline")
    assert {f: (tmp_path / "pipeline" / f).read_bytes() for f in files(kept)} == {f: (kept / f).read_bytes() for f in files(kept)}


def test_saving_replaces_a_pipeline_and_touches_nothing_else(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    single = tiny.pipeline("gpt")
    single.save_pretrained(saved, samples=5)
    assert [f for f in files(saved) if f.startswith("priors")] == [f for f in FILES if f.startswith("priors/0")]
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "samples.png").exists()
    assert same(TwoStagePipeline.from_pretrained(saved), single)
    single.save_pretrained(saved)
    assert not (saved / "samples.png").exists(), "a picture of other weights does not stay"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["pipeline"], "no temporary folders"


@pytest.mark.parametrize("name", ["priors", "tokenizer", "README.md", "samples.png"])
def test_saving_into_a_folder_of_other_things_is_refused(ladder: TwoStagePipeline, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=rf"holds '{name}', but no pipeline.json"):
        ladder.save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file: is a file; expected a folder"):
        ladder.save_pretrained(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "file"])


def test_a_folder_that_is_a_disk_of_its_own_is_written_to(monkeypatch: Any, ladder: TwoStagePipeline, tmp_path: Path) -> None:
    disk, real = tmp_path / "disk", os.replace
    disk.mkdir()

    def replace(source: Any, target: Any) -> None:
        if not Path(source).is_relative_to(disk) or not Path(target).is_relative_to(disk) or Path(target) == disk:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        ladder.save_pretrained(disk)
        assert files(disk) == sorted(FILES) and sorted(p.name for p in tmp_path.iterdir()) == ["disk"]
        assert [p.name for p in disk.iterdir() if p.name.startswith(".")] == []
    assert same(TwoStagePipeline.from_pretrained(disk), ladder)


def test_a_failed_saving_leaves_the_old_pipeline_whole(monkeypatch: Any, ladder: TwoStagePipeline, saved: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Prior, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.pipeline("gpt").save_pretrained(saved)
    assert same(TwoStagePipeline.from_pretrained(saved), ladder) and sorted(p.name for p in saved.parent.iterdir()) == ["pipeline"]


def test_a_pipeline_that_was_cast_is_refused_since_its_codes_have_changed(tmp_path: Path) -> None:
    cast = tiny.pipeline("gpt").to(torch.bfloat16)
    with pytest.raises(HubError, match=r"tokenizer: its fingerprint is .*cast or changed \(it is torch.bfloat16\).*save before"):
        cast.save_pretrained(tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_a_card_shows_the_samples_the_classes_in_turn(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    ladder.last_seed = 77
    ladder.save_pretrained(tmp_path / "pipeline", samples=6, metrics={"psnr": 26.5}, license="mit")
    assert ladder.last_seed == 77, "drawing the picture is no call of the user's"
    card = (tmp_path / "pipeline" / "README.md").read_text()
    for text in ("(samples.png)", "license: mit", "26.5", "shoe, bag, Shirt, dress", "top: 2 x 2 codes of 5", ladder.spec.fingerprint):
        assert text in card
    with Image.open(tmp_path / "pipeline" / "samples.png") as picture:
        assert picture.width > picture.height > 56


# What is refused -------------------------------------------------------------------------------------------------------
def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "pipeline.json").read_text())
        change(tree)
        (folder / "pipeline.json").write_text(json.dumps(tree))

    return apply


def other_prior(folder: Path) -> None:
    other = tiny.prior("pixelcnn", tiny.codes_spec(load_tokenizer(folder / "tokenizer")), "1:2")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(folder / "priors" / "1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pipeline.json").unlink(), "pipeline.json: there is no such file; expected the folder of a saved pipeline"),
        (lambda f: (f / "pipeline.json").write_text("{"), "pipeline.json: no valid JSON"),
        (lambda f: (f / "pipeline.json").write_text("[]"), "pipeline.json: format 'list'"),
        (edit(lambda t: t.update(format="pipeline/2")), "pipeline.json: format 'pipeline/2'; this version of intarsia reads 'pipeline/1'"),
        (edit(lambda t: t.update(code="x")), "pipeline.json: code: unknown key"),
        (edit(lambda t: t.pop("priors")), "pipeline.json: priors: "),
        (edit(lambda t: t.update(priors=[])), "pipeline.json: priors: "),
        (edit(lambda t: t.update(micro_batch=0)), "pipeline.json: micro_batch: "),
        (edit(lambda t: t["priors"].append(t["priors"][0])), "priors/2/config.json: there is no such file"),
        (edit(lambda t: t["priors"].reverse()), r"priors/0/config.json: holds gpt [0-9a-f]{64}; pipeline.json says pixelcnn"),
        (edit(lambda t: t["sampling"].update(temperature=-1)), "temperature: -1"),
        (edit(lambda t: t["sampling"].update(heat=1)), "heat: "),
        (lambda f: (f / "tokenizer" / "model.safetensors").unlink(), "tokenizer/model.safetensors: there is no such file"),
        (lambda f: shutil.rmtree(f / "priors" / "1"), "priors/1/config.json: there is no such file"),
        (other_prior, r"priors/1/config.json: holds pixelcnn [0-9a-f]{64}; pipeline.json says pixelcnn [0-9a-f]{64}"),
    ],
)
def test_a_damaged_or_mixed_pipeline_is_refused_by_name(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message):
        TwoStagePipeline.from_pretrained(saved)


def test_the_memory_budget_is_one_for_all_parts(kept: Path, ladder: TwoStagePipeline) -> None:
    parts: tuple[torch.nn.Module, ...] = (ladder.tokenizer, *ladder.priors)
    sizes = [sum(t.nbytes for t in part.state_dict().values()) for part in parts]
    assert TwoStagePipeline.from_pretrained(kept, max_bytes=sum(sizes)).micro_batch == 8
    with pytest.raises(HubError, match=f"priors/1/config.json: .*max_bytes is {sizes[2] - 1}"):
        TwoStagePipeline.from_pretrained(kept, max_bytes=sum(sizes) - 1)


# Runs ------------------------------------------------------------------------------------------------------------------
def test_from_runs_reads_the_releases_of_run_folders(ladder: TwoStagePipeline, tmp_path: Path) -> None:
    for name, part in zip(("tok", "top", "bottom"), (ladder.tokenizer, *ladder.priors), strict=True):
        part.save_pretrained(tmp_path / name / "model")
        (tmp_path / name / "config.yaml").write_text("not: read")
        (tmp_path / name / "checkpoints").mkdir()
    built = TwoStagePipeline.from_runs(
        tmp_path / "tok", [str(tmp_path / "top"), tmp_path / "bottom"], micro_batch=8, defaults=ladder.defaults
    )
    assert same(built, ladder)
    assert len(TwoStagePipeline.from_runs(tmp_path / "tok", str(tmp_path / "top")).priors) == 1, "one run need not be a list"
    shutil.rmtree(tmp_path / "bottom" / "model")
    with pytest.raises(HubError, match="bottom/model: there is no such folder; the run has not released a model yet"):
        TwoStagePipeline.from_runs(tmp_path / "tok", [tmp_path / "top", tmp_path / "bottom"])


def test_the_bundled_pipeline_lies_in_the_package_or_is_clearly_absent(monkeypatch: Any, saved: Path, ladder: TwoStagePipeline) -> None:
    monkeypatch.setattr(pipelines.two_stage.resources, "files", lambda package: saved.parent)
    with pytest.raises(FileNotFoundError, match="bundled: this copy of intarsia holds no trained pipeline"):
        TwoStagePipeline.bundled()
    saved.rename(saved.parent / "bundled")
    assert same(TwoStagePipeline.bundled(), ladder)


# The Hub ---------------------------------------------------------------------------------------------------------------
def test_a_pipeline_is_published_in_one_commit_and_comes_back_exactly(hub: HubServer, ladder: TwoStagePipeline) -> None:
    commit = ladder.push_to_hub("someone/ladder", samples=4, license="mit", commit_message="two levels")
    repo = hub.repos["someone/ladder"]
    assert [c.message for c in repo.commits] == ["initial commit", "two levels"] and repo.commits[-1].oid == commit
    assert sorted(repo.commits[-1].files) == sorted([".gitattributes", "samples.png", *FILES])
    assert "from_pretrained('someone/ladder')" in repo.commits[-1].files["README.md"].decode()
    assert same(TwoStagePipeline.from_pretrained("someone/ladder"), ladder)
    assert load_prior("someone/ladder", subfolder="priors/1").weights_sha256 == ladder.priors[1].weights_sha256


def test_all_parts_come_from_one_commit_even_if_the_branch_moves_on(monkeypatch: Any, hub: HubServer, ladder: TwoStagePipeline) -> None:
    first = ladder.push_to_hub("someone/ladder", samples=0)
    newer = tiny.pipeline("ladder", micro_batch=8)
    with torch.no_grad():
        next(newer.priors[1].parameters()).add_(1)
    original = pipelines.saving._read_index

    def publish_in_between(path: Path) -> Any:
        monkeypatch.setattr(pipelines.saving, "_read_index", original)
        newer.push_to_hub("someone/ladder", samples=0)
        return original(path)

    monkeypatch.setattr(pipelines.saving, "_read_index", publish_in_between)
    assert same(TwoStagePipeline.from_pretrained("someone/ladder"), ladder)
    assert same(TwoStagePipeline.from_pretrained("someone/ladder"), newer)
    assert same(TwoStagePipeline.from_pretrained("someone/ladder", revision=first), ladder)
    assert same(TwoStagePipeline.from_pretrained("someone/ladder", revision=first, local_files_only=True), ladder)


def test_what_is_no_pipeline_on_the_hub_is_refused_by_name(hub: HubServer, ladder: TwoStagePipeline) -> None:
    ladder.tokenizer.push_to_hub("someone/tokenizer")
    with pytest.raises(HubError, match="someone/tokenizer: there is no pipeline.json"):
        TwoStagePipeline.from_pretrained("someone/tokenizer")
    with pytest.raises(HubError, match="no/such: there is no such folder, and no such repository"):
        TwoStagePipeline.from_pretrained("no/such")
