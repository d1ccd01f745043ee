"""The wheel holds exactly what it should, and works from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("intarsia", "stage1_tokenizer", "stage2_prior", "pipelines", "configs")


def expected_files() -> set[str]:
    """Every file of the four packages and configs, without what Python itself writes."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in SHIPPED
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    return target


def run(python: str, code: str, folder: Path, path: Path | None) -> str:
    """The output of ``code`` in an empty folder, without the current folder on the path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([python, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_exactly_the_packages_the_configurations_and_the_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = {name for name in names if ".dist-info/" in name}
        metadata = archive.read(next(name for name in about if name.endswith("/METADATA"))).decode()
    assert names - about == expected_files()
    assert {name.split("/", 1)[1] for name in about} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "licenses/LICENSE",
        "licenses/stage1_tokenizer/data/bundled/LICENSE-fashion-mnist",
        "licenses/stage1_tokenizer/data/bundled/LICENSE-emoji",
    }
    kinds = {Path(name).suffix or Path(name).name for name in names - about}
    allowed = {".py", ".typed", ".yaml", ".md", ".json", ".safetensors", ".png", ".npy", ".webp", ".tsv"}
    allowed |= {"LICENSE-fashion-mnist", "LICENSE-emoji"}
    assert kinds <= allowed, kinds - allowed
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


def test_the_wheel_is_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    assert sum(size for name, size in sizes.items() if name.startswith("stage1_tokenizer/data/bundled/")) <= 11_500_000
    assert sum(size for name, size in sizes.items() if name.startswith("pipelines/bundled/")) <= 6_000_000
    assert wheel.stat().st_size <= 20_000_000


IMPORTS = """
import intarsia, stage1_tokenizer, stage2_prior, pipelines, configs, sys
for module in (intarsia, stage1_tokenizer, stage2_prior, pipelines, configs):
    assert module.__file__.startswith({site!r}), module.__file__
from pipelines import TwoStagePipeline, load_tokenizer, load_prior
from intarsia.cli import find_config, load_tree, shipped_configs
names = shipped_configs()
assert names and all(load_tree(name) for name in names)
print(len(names))
"""
DATA = """
import torch
from stage1_tokenizer import SOURCES
source = SOURCES.build(SOURCES.config("bundled")(name="fashion"))
train, validation = source.split("train"), source.split("validation")
print(len(train), len(validation), len(source.classes), tuple(train.batch(torch.tensor([0, 1]))["x"].shape))
"""
PIPELINE = """
from pipelines import TwoStagePipeline
print(tuple(TwoStagePipeline.bundled().sample(2, seed=0).shape))
"""


def check_installation(python: str, folder: Path, site: Path | None, prefix: Path) -> None:
    assert int(run(python, IMPORTS.format(site=str(prefix)), folder, site)) == len(list((ROOT / "configs").rglob("*.yaml")))
    assert run(python, DATA, folder, site).split(maxsplit=3) == ["10000", "2000", "10", "(2, 1, 28, 28)\n"]
    assert run(python, PIPELINE, folder, site) == "(2, 1, 28, 28)\n"


def test_the_wheel_works_from_an_empty_folder(installed, tmp_path):
    check_installation(sys.executable, tmp_path, installed, installed)
    assert list(tmp_path.iterdir()) == [], "nothing is written where nothing was asked for"


def test_the_installed_scripts_answer(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for module in ("stage1_tokenizer.train", "stage2_prior.train", "pipelines.sample"):
        command = [sys.executable, "-P", "-m", module, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(command, check=True, timeout=3000)
    folder = tmp_path / "empty"
    folder.mkdir()
    check_installation(python, folder, None, tmp_path / "venv")
