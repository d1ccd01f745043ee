"""Every shipped configuration loads through the script that its folder's README names, builds, and takes two steps.

The reductions are those of ``REDUCED``: two samples a step, and tiny data of the same geometry in place of what is not
bundled, of 64 px where it is more. Networks keep their full size, but for configurations marked as large: those step with the
widths, depths and batches of ``SMALL``, their grids and all else as they are.
"""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import table
from intarsia.cli import Flags, load_tree, parse, shipped_configs
from intarsia.codes import write_codes
from intarsia.meta import build_on_meta
from intarsia.specs import SignalSpec
from stage1_tokenizer.data.folder import FolderConfig

ROOT = Path(__file__).resolve().parent.parent / "configs"
OTHERS = ("accelerate", "compare_quantizers")  # of the launcher and of other scripts, with tests of their own
NAMES = [name for name in shipped_configs() if Path(name).parts[0] not in OTHERS]
SCRIPTS = {"tokenizer": "stage1_tokenizer.train", "prior": "stage2_prior.train"}
REDUCED = {"batch_size": 2, "accumulate": 1, "workers": 0, "device": "cpu", "validation_samples": 8}
SMALL = {"width": 32, "depth": 2, "codes": 64, "samples": 2}  # heads keep their width of at least 4: 8 of them
LOG = {"every": 1, "validate_every": 0, "pictures_every": 0, "trackers": ()}


def kind_of(name: str) -> str:
    (kind,) = SCRIPTS.keys() & load_tree(name).keys()
    return kind


def load(name: str, run: Path, *flags: str) -> Any:
    script = importlib.import_module(SCRIPTS[kind_of(name)])
    cls = script.TokenizerTrainConfig if kind_of(name) == "tokenizer" else script.PriorTrainConfig
    return parse(cls, ["--config", name, "--run", str(run), *flags])[0]


def tiny_data(config: Any, folder: Path) -> Any:
    """The data configuration with 24 random samples of the same kind where the data are not bundled."""
    draw = np.random.default_rng(0)
    if config.type_name == "idx":
        for stem, n in (("train", 24), ("t10k", 8)):
            for kind, values in (("images-idx3", draw.integers(0, 256, (n, 28, 28))), ("labels-idx1", np.arange(n) % 10)):
                head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
                (folder / f"{stem}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
        return config.replace(root=str(folder), holdout=8)
    if config.type_name == "torchvision":
        config = FolderConfig(transform=config.transform.replace(size=config.transform.size or 32))
    if config.type_name == "folder":
        from PIL import Image

        size = config.transform.size or 32
        height, width = size if isinstance(size, tuple) else (size, size)
        for i in range(24):
            path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (height + 9, width + 5, 3), np.uint8)).save(path)
        return config.replace(root=str(folder), holdout=8)
    assert config.type_name == "bundled", f"no tiny data for a source of type {config.type_name!r}"
    return config


def smaller(data: Any) -> Any:
    """Images above 64 px as 64 px: the nets take any size, and a step at 1024 px takes a minute."""
    size = data.transform.size if "transform" in type(data).model_fields else None
    return data.replace(transform=data.transform.replace(size=64)) if isinstance(size, int) and size > 64 else data


def tiny_codes(name: str, folder: Path) -> Path:
    """Random codes of the geometry that the tokenizer configuration ``name`` gives."""
    config = load(name, folder / "none")
    raw = folder / "data"
    raw.mkdir()
    train = importlib.import_module(SCRIPTS["tokenizer"])
    source = train.SOURCES.build(tiny_data(config.data, raw))
    levels = train.on_meta(config, source).level_specs()
    draw = torch.Generator().manual_seed(0)
    splits = {
        split: ([torch.randint(level.vocab, (n, *level.shape), generator=draw) for level in levels], torch.arange(n) % 10)
        for split, n in (("train", 24), ("validation", 8))
    }
    made_by = {"type": str(config.tokenizer.type_name), "fingerprint": "0" * 64}
    write_codes(folder / "codes", splits, levels, signal=source.signal, tokenizer=made_by, classes=[str(i) for i in range(10)])
    return folder / "codes"


def test_there_are_configurations():
    folders = {"fashion", "fashion_mnist", "emoji", "imagefolder", "cifar10", "celeba64", "imagenet256"}
    assert {Path(name).parts[0] for name in NAMES} == folders
    assert {Path(name).parts[0] for name in table.large()} == {"cifar10", "celeba64", "imagenet256"}
    assert {kind_of(name) for name in NAMES} == SCRIPTS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_of_its_folder_names_the_command(name):
    text = (ROOT / name).parent.joinpath("README.md").read_text(encoding="utf-8")
    commands, script = [], ""
    for found in re.finditer(r"-m\s+([\w.]+)|--config[ =]([\w/]+)", text):  # "the same with --config" is of the command before
        script = found[1] or script
        commands += [(script, found[2])] if found[2] else []
    assert (SCRIPTS[kind_of(name)], name) in commands, f"{name}: not in the commands {commands}"
    assert f"{Path(name).name}.yaml" in text


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_tree_that_it_describes(name, tmp_path):
    """What is written is read: no value is only a default's accident, no key another spelling."""
    config = load(name, tmp_path / "run", *(["--codes", "c"] if kind_of(name) == "prior" else []))
    tree = config.to_dict()
    for key, value in load_tree(name).items():
        assert _within(value, tree[key]), f"{key}: {value} is not in {tree[key]}"
    assert type(config).from_dict(tree) == config


def _within(given: Any, whole: Any) -> bool:
    if isinstance(given, dict):
        return all(_within(value, whole[key]) for key, value in given.items())
    if isinstance(given, list) and isinstance(whole, list):
        return len(given) == len(whole) and all(_within(a, b) for a, b in zip(given, whole, strict=True))
    return bool(given == whole)


def reduced(config: Any) -> Any:
    """A large configuration that steps in a second on one core: see SMALL."""
    config = config.replace(batch_size=SMALL["samples"], validation_samples=2)
    if "prior" in type(config).model_fields:
        prior = config.prior
        changes = {"width": SMALL["width"], "depth": SMALL["depth"], "heads": 8}
        if "attention" in type(prior).model_fields:
            changes["attention"] = min(prior.attention, 1)
        return config.replace(prior=prior.replace(**changes))
    net = config.tokenizer.net
    ones = (1,) * len(net.widths)
    tokenizer = config.tokenizer.replace(net=net.replace(widths=tuple(8 * n for n in ones), blocks=ones, encoder_blocks=ones))
    if "ladder" in type(tokenizer).model_fields:
        tokenizer = tokenizer.replace(ladder=tuple(grid.replace(width=8, blocks=1) for grid in tokenizer.ladder))
    else:
        tokenizer = tokenizer.replace(quantizer=tokenizer.quantizer.replace(codes=SMALL["codes"]))
    return config.replace(tokenizer=tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_takes_two_steps(name, tmp_path):
    run, made = tmp_path / "run", tmp_path / "made"
    made.mkdir()
    script = importlib.import_module(SCRIPTS[kind_of(name)])
    if kind_of(name) == "tokenizer":
        config = load(name, run)
        config = config.replace(data=tiny_data(smaller(config.data), made), init_samples=16, log=config.log.replace(**LOG), **REDUCED)
    else:
        config = load(name, run, "--codes", str(tiny_codes(table.tokenizer_of(name), made)))
        config = config.replace(log=config.log.replace(**LOG), **REDUCED)
    if name in table.large():
        config = reduced(config)
    if kind_of(name) == "tokenizer":
        shown = list(script.describe(config, script.SOURCES.build(config.data)))
        assert any(line.startswith("activations: ") for line in shown)
    script.train(config, Flags(max_steps=2, allow_low_space=True))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 2 and (run / "model/config.json").is_file()


LEVELS = {
    "fashion/vqvae": [(512, (7, 7))],
    "fashion_mnist/vqvae": [(512, (7, 7))],
    "fashion_mnist/rqvae": [(512, (7, 7))] * 4,
    "fashion_mnist/product": [(256, (7, 7))] * 4,
    "fashion_mnist/fsq": [(512, (7, 7))],
    "fashion_mnist/lfq": [(512, (7, 7))],
    "fashion_mnist/vqvae2": [(512, (7, 7)), (512, (14, 14))],
    "fashion_mnist/vqvae2_unconditioned": [(512, (7, 7)), (512, (14, 14))],
    "fashion_mnist/three_levels": [(512, (7, 7)), (512, (14, 14)), (16, (28, 28))],
}


def test_the_geometries_are_those_that_the_names_promise(tmp_path):
    for name in NAMES:
        if name in LEVELS:
            config = load(name, tmp_path / "run")
            from stage1_tokenizer.tokenizers.base import TOKENIZERS

            module: Any = build_on_meta(TOKENIZERS.get(config.tokenizer.type_name), config.tokenizer, SignalSpec("image", 1, (28, 28)))
            assert [(level.vocab, level.shape) for level in module.level_specs()] == LEVELS[name]
    assert set(NAMES) >= LEVELS.keys()


def test_a_template_of_own_images_steps_on_folders_of_splits_as_its_readme_promises(tmp_path):
    root, sizes = tmp_path / "images", {"train": 24, "validation": 6, "test": 4}
    for split, n in sizes.items():
        (root / split).mkdir(parents=True)
        tiny_data(FolderConfig(), root / split)  # 24 images of 2 classes
        for folder in (root / split).iterdir():
            for path in sorted(folder.iterdir())[n // 2 :]:
                path.unlink()
    script = importlib.import_module(SCRIPTS["tokenizer"])
    config = load("imagefolder/vqvae", tmp_path / "run", "--data.root", str(root), "--data.transform.size", "32")
    source = script.SOURCES.build(config.data)
    assert {name: len(source.split(name)) for name in source.splits} == sizes
    config = config.replace(init_samples=16, log=config.log.replace(**LOG | {"validate_every": 1}), **REDUCED)
    script.train(config, Flags(max_steps=1, allow_low_space=True))
    assert "validation/psnr" in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagefolder/v")])
def test_templates_of_own_images_hold_out_nothing_where_there_is_a_validation_folder(name, tmp_path):
    assert load(name, tmp_path / "run").data.holdout is None
