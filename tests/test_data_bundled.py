"""The bundled set, and the interface that every source shares."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from intarsia.config import ConfigError, differences
from intarsia.specs import SignalSpec
from stage1_tokenizer.data import bundled
from stage1_tokenizer.data.base import SOURCES, DataError, SourceConfig
from stage1_tokenizer.data.bundled import BUNDLED, BundledConfig, BundledSource
from stage1_tokenizer.data.holdout import read_indices
from stage1_tokenizer.data.transform import TransformConfig

FOLDER = Path(str(resources.files("stage1_tokenizer.data") / "bundled"))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files


@pytest.fixture(scope="module")
def source() -> BundledSource:
    return BundledSource(BundledConfig())


def test_fashion_is_12000_images_balanced_over_ten_classes(source: BundledSource) -> None:
    assert source.signal == SignalSpec("image", 1, (28, 28)) and source.splits == ("train", "validation")
    assert len(source.classes) == 10 and source.classes[7] == "sneaker"
    for name, each in (("train", 1000), ("validation", 200)):
        labels = source.split(name).labels
        assert labels is not None and torch.bincount(labels).tolist() == [each] * 10


def test_no_image_stands_in_both_splits(source: BundledSource) -> None:
    train, validation = (source.split(n) for n in source.splits)
    assert len(set(train.origin.tolist()) | set(validation.origin.tolist())) == 12_000
    pixels = [s.batch(torch.arange(len(s)))["x"].flatten(1) for s in (train, validation)]
    rows = [set(map(bytes, p.to(torch.float32).numpy())) for p in pixels]
    assert not rows[0] & rows[1]


def test_the_held_out_list_has_the_validation_images_and_no_train_image(source: BundledSource) -> None:
    held = set(read_indices("fashion_mnist", 60_000).tolist())
    assert len(held) == 5_000
    assert set(source.split("validation").origin.tolist()) <= held
    assert not set(source.split("train").origin.tolist()) & held


def test_the_files_are_small_and_carry_the_licence() -> None:
    sizes = {p.name: p.stat().st_size for p in FOLDER.iterdir() if p.is_file()}
    assert sum(size for name, size in sizes.items() if "emoji" in name) <= 4_500_000
    assert sum(size for name, size in sizes.items() if "emoji" not in name) <= 7_000_000
    licence = (FOLDER / "LICENSE-fashion-mnist").read_text()
    assert "MIT" in licence and "Zalando" in licence and "WITHOUT WARRANTY" in licence
    licence = (FOLDER / "LICENSE-emoji").read_text()
    assert "Google" in licence and "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence and "Cal Henderson" in licence


PINNED = [("fashion", "sheet", "png"), ("fashion", "table", "npy")]
PINNED += [("emoji", "sheet", "webp"), ("emoji", "table", "npy"), ("emoji", "texts", "tsv")]


@pytest.mark.parametrize(("name", "field", "suffix"), PINNED)
def test_a_damaged_file_is_refused_by_name(name: str, field: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled.BUNDLED, name, dataclasses.replace(BUNDLED[name], **{f"{field}_sha256": "0" * 64}))
    with pytest.raises(DataError, match=rf"bundled/{name}\.{suffix}: sha256 .* damaged"):
        BundledSource(BundledConfig(name=name))


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_script_makes_the_very_files_that_ship(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[2])}
    script = [sys.executable, str(FOLDER / "make_fashion.py"), "--root", str(DEBIAN), "--out", str(tmp_path)]
    subprocess.run(script, check=True, env=environment, capture_output=True)
    for name in ("fashion.npy", "holdout-fashion_mnist.npy"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    sheets = [bundled.tiles_of(_picture(folder / "fashion.png"), (28, 28)) for folder in (tmp_path, FOLDER)]
    assert np.array_equal(*sheets)  # bytes depend on the zlib that PIL has


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_images_are_the_originals_and_the_full_set_holds_5000_out(source: BundledSource) -> None:
    full = SOURCES.build(SourceConfig.from_dict({"type": "idx", "root": str(DEBIAN), "holdout": "fashion_mnist"}))
    assert [len(full.split(n)) for n in ("train", "validation", "test")] == [55_000, 5_000, 10_000]
    train = full.split("train")
    place = {o: i for i, o in enumerate(train.origin.tolist())}
    mine = source.split("train")
    rows = torch.arange(0, 10_000, 37)
    there = torch.tensor([place[o] for o in mine.origin[rows].tolist()])
    for key in ("x", "label"):
        assert torch.equal(mine.batch(rows)[key], train.batch(there)[key])


# The glyphs --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def emoji() -> BundledSource:
    return BundledSource(BundledConfig(name="emoji"))


def test_emoji_are_1911_colour_glyphs_with_classes_and_captions(emoji: BundledSource) -> None:
    assert emoji.signal == SignalSpec("image", 3, (64, 64)) and len(emoji.classes) == 10
    assert {name: len(emoji.split(name)) for name in emoji.splits} == {"train": 1562, "validation": 182, "test": 167}
    found = {}
    for name in emoji.splits:
        split = emoji.split(name)
        assert split.captions is not None and split.labels is not None and len(split.captions) == len(split)
        found |= {split.captions[i]: emoji.classes[int(split.labels[i])] for i in range(len(split))}
    assert found["grinning face"] == "Smileys & Emotion" and found["hot beverage"] == "Food & Drink"
    origins = torch.cat([emoji.split(name).origin for name in emoji.splits])
    assert origins.sort().values.equal(torch.arange(1911)), "each glyph stands in one split"


def test_every_tile_is_a_glyph_on_white_without_a_frame(emoji: BundledSource) -> None:
    """Nine in ten of the pixels at the border are white, every tile holds something, and none past the last one is taken."""
    for name in emoji.splits:
        x = emoji.split(name).batch(torch.arange(len(emoji.split(name))))["x"]
        border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
        assert (border == 1).float().mean() > 0.9 and bool((x.flatten(1).amin(1) < 0.9).all())


def test_emoji_at_32_px_are_what_pil_makes_of_them_by_lanczos(emoji: BundledSource) -> None:
    from PIL import Image

    small = BundledSource(BundledConfig(name="emoji", transform=TransformConfig(size=32))).split("test")
    whole = emoji.split("test")
    rows = torch.arange(0, 167, 23)
    pixels = ((whole.batch(rows)["x"] + 1) * 127.5).round().to(torch.uint8).numpy()
    expected = [np.asarray(Image.fromarray(p.transpose(1, 2, 0)).resize((32, 32), Image.Resampling.LANCZOS)) for p in pixels]
    found = ((small.batch(rows)["x"] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(found, np.stack(expected).transpose(0, 3, 1, 2))
    assert small.captions == whole.captions


def test_the_script_packs_glyphs_without_loss_in_order_of_their_split(tmp_path: Path) -> None:
    """On 50 glyphs of its own, so that the sheet has two rows and a last one that is not full."""
    draw = np.random.default_rng(0)
    names = np.array([f"glyph {i}" for i in range(50)])
    glyphs = {
        "rgb": draw.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8),
        "split": np.array(["train", "test", "validation", "train", "train"] * 10),
        "category": np.array(["Flags", "Symbols"] * 25),
        "caption": names,
        "short_name": names,
        "subcategory": names,
    }
    np.savez(tmp_path / "glyphs.npz", **glyphs)
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[2])}
    script = [sys.executable, str(FOLDER / "make_emoji.py"), "--glyphs", str(tmp_path / "glyphs.npz"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, env=environment, capture_output=True)
    order = [i for name in ("train", "validation", "test") for i in range(50) if glyphs["split"][i] == name]
    tiles = bundled.tiles_of(_picture(tmp_path / "emoji.webp"), (64, 64))
    assert len(tiles) == 88 and np.array_equal(tiles[:50], glyphs["rgb"][order].transpose(0, 3, 1, 2))
    assert np.load(tmp_path / "emoji.npy").tolist() == [[9 if i % 2 == 0 else 8, i] for i in order]
    assert (tmp_path / "emoji.tsv").read_text().splitlines()[1:] == ["\t".join([f"glyph {i}"] * 3) for i in order]


# What every source shares ------------------------------------------------------------------------------------------
def test_a_description_holds_no_path_and_survives_json(source: BundledSource) -> None:
    facts = source.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert str(FOLDER) not in json.dumps(facts) and "/usr" not in json.dumps(facts)
    assert facts["splits"]["train"]["count"] == 10_000 and facts["splits"]["validation"]["class_counts"] == [200] * 10
    assert facts["transform"]["flip"] is False


def test_a_description_tells_other_data_and_other_transforms_apart(source: BundledSource) -> None:
    resized = BundledSource(BundledConfig(transform=TransformConfig(size=14)))
    assert resized.describe() != source.describe()
    assert resized.describe()["splits"] == source.describe()["splits"]


def test_a_summary_names_splits_and_classes(source: BundledSource) -> None:
    text = "\n".join(source.summary())
    assert "1 channels of 28x28" in text and "train: 10000 samples (t-shirt/top 1000, trouser 1000" in text


def test_a_split_that_is_not_there_is_refused_by_name(source: BundledSource) -> None:
    with pytest.raises(DataError, match=r"no split 'test'; this source has train, validation"):
        source.split("test")


def test_a_second_validation_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.holdout: 100, but the source has a validation split"):
        BundledSource(BundledConfig(holdout=100))


def test_sources_resize_and_change_channels() -> None:
    source = BundledSource(BundledConfig(transform=TransformConfig(size=32, channels=3, crop="random")))
    assert source.signal == SignalSpec("image", 3, (32, 32))
    assert source.split("train").batch(torch.tensor([0, 5]))["x"].shape == (2, 3, 32, 32)


def test_a_loader_is_a_split_under_one_seed(source: BundledSource) -> None:
    split = BundledSource(BundledConfig(transform=TransformConfig(shift=3))).split("validation")
    loader, rows, epochs = split.loader(seed=5), torch.arange(20), torch.arange(20)
    assert len(loader) == 2000
    assert torch.equal(loader.batch(rows, epochs)["x"], split.batch(rows, epochs, seed=5)["x"])
    assert not torch.equal(loader.batch(rows, epochs)["x"], split.batch(rows, epochs, seed=6)["x"])
    assert torch.equal(loader.batch(rows)["x"], split.batch(rows)["x"])


def test_paths_are_free_to_move_and_the_transform_is_not() -> None:
    a = SourceConfig.from_dict({"type": "idx", "root": "a"})
    assert differences(a, a.replace(root="b")) == []
    moved = a.replace(transform=TransformConfig(flip=True))
    assert [path for path, *_ in differences(a, moved)] == ["transform.flip"]


def test_the_known_types_are_listed_and_a_wrong_one_is_named() -> None:
    assert {"bundled", "folder", "hub", "idx", "torchvision"} <= set(SOURCES.names())
    with pytest.raises(ConfigError, match="unknown data source 'foldr'; did you mean 'folder'"):
        SourceConfig.from_dict({"type": "foldr"})


def test_discovery_imports_no_heavy_library() -> None:
    code = "import sys; from stage1_tokenizer.data.base import SOURCES; SOURCES.names()\n"
    code += "print({'PIL.Image', 'datasets', 'torchvision', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parents[2])
    assert done.stdout.strip() == "set()"
