"""Local data sets as ``datasets`` reads them: columns, labels, splits, arrays, and errors by field and row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from intarsia import yaml_io
from intarsia.config import ConfigError
from stage1_tokenizer.data import hub
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import DataError, SourceConfig
from stage1_tokenizer.data.hub import HubConfig, HubSource
from stage1_tokenizer.data.transform import TransformConfig


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def build(path: Path, tmp_path: Path, **options: object) -> HubSource:
    return HubSource(HubConfig(path=str(path), cache=str(tmp_path / "cache"), holdout=options.pop("holdout", 0), **options))  # type: ignore[arg-type]


def pixels(source: HubSource, split: str = "train") -> np.ndarray:
    part = source.split(split)
    return ((part.batch(torch.arange(len(part)))["x"] + 1) * 127.5).round().numpy().astype(np.uint8)


def oracle(seeds: range) -> np.ndarray:
    return np.stack([np.asarray(picture(i)).transpose(2, 0, 1) for i in seeds])


def labelled(n: int, start: int = 0, **columns: list[object]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    data = {"image": [{"bytes": png(start + i), "path": None} for i in range(n)], "label": [i % 3 for i in range(n)]}
    return datasets.Dataset.from_dict(data | columns, features)


@pytest.mark.parametrize("column", ["image", "bytes"])
def test_a_parquet_file_of_images_or_bytes(column: str, tmp_path: Path) -> None:
    if column == "image":
        data, names = labelled(7), ("cat", "dog", "owl")
    else:
        data, names = datasets.Dataset.from_dict({"image": [png(i) for i in range(7)], "label": [i % 3 for i in range(7)]}), ("0", "1", "2")
    data.to_parquet(tmp_path / "x.parquet")
    for memory in (0, 1 << 20):
        source = build(tmp_path / "x.parquet", tmp_path, memory=memory)
        assert source.classes == names and source.splits == ("train",)
        assert np.array_equal(pixels(source), oracle(range(7)))
        assert source.split("train").batch(torch.tensor([5, 1]))["label"].tolist() == [2, 1]


def test_a_folder_saved_to_disk_keeps_its_splits(tmp_path: Path) -> None:
    parts = {"train": labelled(6), "valid": labelled(4, 50), "test": labelled(3, 80)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = build(tmp_path / "saved", tmp_path, holdout=None)
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 6), ("validation", 4), ("test", 3)]
    assert np.array_equal(pixels(source, "validation"), oracle(range(50, 54)))
    chosen = build(tmp_path / "saved", tmp_path, splits={"train": "test", "test": "valid"})
    assert [(n, len(chosen.split(n))) for n in chosen.splits] == [("train", 3), ("test", 4)]
    with pytest.raises(DataError, match=r"data\.path: .*no split 'dev'; it has train, valid, test"):
        build(tmp_path / "saved", tmp_path, splits={"train": "dev"})


def test_a_csv_file_of_paths_and_named_labels(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "animal"])
        for i in range(6):
            picture(i).save(tmp_path / "pictures" / f"{i}.png")
            writer.writerow([f"pictures/{i}.png", ["dog", "cat"][i % 2]])
    source = build(tmp_path / "x.csv", tmp_path, image="file", label="animal")
    assert source.classes == ("cat", "dog") and np.array_equal(pixels(source), oracle(range(6)))
    assert source.split("train").batch(torch.arange(3))["label"].tolist() == [1, 0, 1]
    (tmp_path / "pictures" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"row 3 \(pictures/3\.png\): the file is empty"):
        build(tmp_path / "x.csv", tmp_path, image="file", label="animal")
    source = build(tmp_path / "x.csv", tmp_path, image="file", label="animal", skip_bad=True)
    assert len(source.split("train")) == 5 and len(source.skipped) == 1


def test_an_image_folder_and_slices_of_a_split(tmp_path: Path) -> None:
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for i in range(5):
            picture(10 * k + i).save(tmp_path / "set" / "train" / name / f"{i}.png")
    source = build(tmp_path / "set", tmp_path, splits={"train": "train[:80%]", "validation": "train[80%:]"}, holdout=None)
    assert source.classes == ("cat", "dog") and [len(source.split(n)) for n in source.splits] == [8, 2]
    assert np.array_equal(pixels(source, "validation"), oracle(range(13, 15)))


def test_unlabelled_data_and_held_out_rows(tmp_path: Path) -> None:
    labelled(9).to_parquet(tmp_path / "x.parquet")
    source = build(tmp_path / "x.parquet", tmp_path, label="", holdout=3, transform=TransformConfig(size=4, channels=1))
    assert source.classes == () and source.signal.shape == (4, 4) and source.signal.channels == 1
    assert [len(source.split(n)) for n in source.splits] == [6, 3]
    assert "label" not in source.split("train").batch(torch.tensor([0]))


def test_a_description_holds_no_path_and_does_not_depend_on_memory(tmp_path: Path) -> None:
    labelled(6).to_parquet(tmp_path / "x.parquet")
    facts = build(tmp_path / "x.parquet", tmp_path).describe()
    (tmp_path / "x.parquet").rename(tmp_path / "y.parquet")
    assert build(tmp_path / "y.parquet", tmp_path, memory=0).describe() == facts
    assert str(tmp_path) not in json.dumps(facts)
    labelled(6, 1).to_parquet(tmp_path / "z.parquet")
    assert build(tmp_path / "z.parquet", tmp_path).describe() != facts


# Arrays of numbers -------------------------------------------------------------------------------------------------
def arrays(values: list[object], feature: object | None = None) -> datasets.Dataset:
    features = None if feature is None else datasets.Features({"image": feature, "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": values, "label": [i % 2 for i in range(len(values))]}, features)


@pytest.mark.parametrize("kind", ["Array2D", "Array3D", "lists"])
def test_columns_of_numbers_become_images(kind: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 6, 4) if kind != "Array3D" else (5, 6, 4, 3), dtype=np.uint8)
    feature = {"Array2D": datasets.Array2D((6, 4), "uint8"), "Array3D": datasets.Array3D((6, 4, 3), "uint8"), "lists": None}[kind]
    arrays(x.tolist(), feature).to_parquet(tmp_path / "x.parquet")
    source = build(tmp_path / "x.parquet", tmp_path)
    assert isinstance(source.split("train"), ArraySplit) and source.classes == ("0", "1")
    assert np.array_equal(pixels(source), x[:, None] if kind != "Array3D" else x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[3][1].__setitem__(2, float("nan")), r"split 'train', row 3 .*nan"),
        (lambda x: x[3][1].__setitem__(2, 200.0), r"split 'train', row 3 .*200.*\[0, 1\]"),
        (lambda x: x[3].pop(), r"split 'train', row 3 has \(5, 4\)|row 0 has shape \(6, 4\)"),
    ],
)
def test_d3_bad_numbers_are_named_by_row(change: object, words: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((5, 6, 4)).tolist()
    change(x)  # type: ignore[operator]
    arrays(x).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=words):
        build(tmp_path / "x.parquet", tmp_path)


# Errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "img"}, r"data\.image: no column 'img' in split 'train'; it has image, label, note"),
        ({"label": "class"}, r"data\.label: no column 'class' .*; empty for unlabelled"),
        ({"image": "label", "label": ""}, r"data\.image: a column of"),
        ({"image": "note", "label": ""}, r"row 0 \(n0\): No such file"),
        ({"label": "note", "splits": {"train": "train[:4]", "test": "train[4:]"}}, r"split 'test', row 0: the label 'n4' is none of"),
    ],
)
def test_wrong_columns_are_named(options: dict[str, object], words: str, tmp_path: Path) -> None:
    data = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "label": [0.5] * 6, "note": [f"n{i}" for i in range(6)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float32"), "note": datasets.Value("string")})
    datasets.Dataset.from_dict(data, features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=words) as error:
        build(tmp_path / "x.parquet", tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, -1, 1], r"sample 2: label -1; expected \[0, 1\]"),
        ([0, 1, None, 1], "row 2: None"),
        ([True] * 4, "row 0: True"),
        ([0, 30_000_000, 1, 1], "30000000; expected class numbers below 65536"),
    ],
)
def test_wrong_labels_are_named(labels: list[object], words: str, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"image": [png(i) for i in range(4)], "label": labels})
    data.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=words):
        build(tmp_path / "x.parquet", tmp_path)


@pytest.mark.parametrize("saved", ["on disk", "parquet"])
def test_a_split_whose_labels_are_all_kept_back_is_named_with_the_ways_out(saved: str, tmp_path: Path) -> None:
    parts = {"train": labelled(6), "valid": labelled(4, 50), "test": labelled(3, 80, label=[-1] * 3)}
    if saved == "on disk":
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        for name, part in parts.items():
            part.to_parquet(tmp_path / "set" / f"{name}.parquet")
    with pytest.raises(DataError, match="data.label: split 'test' is unlabelled: all its labels are -1; .* leaves it out, ") as error:
        build(tmp_path / "set", tmp_path, holdout=None)
    flag = re.search(r'--data\.splits "(.*)" leaves', str(error.value))
    assert flag is not None
    source = build(tmp_path / "set", tmp_path, holdout=None, splits=yaml_io.load(flag[1]))
    assert {name: len(source.split(name)) for name in source.splits} == {"train": 6, "validation": 4}
    assert build(tmp_path / "set", tmp_path, holdout=None, label="").splits == ("train", "validation", "test")


def test_a_train_split_without_labels_has_one_way_out(tmp_path: Path) -> None:
    labelled(3, label=[-1] * 3).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="split 'train' is unlabelled: all its labels are -1; data.label: '' takes no labels$"):
        build(tmp_path / "x.parquet", tmp_path)


def test_a_null_image_is_named(tmp_path: Path) -> None:
    images = [None if b is None else {"bytes": b, "path": None} for b in (png(0), None, png(1), b"<html>")]
    labelled(4, image=images).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"row 1: the value is null \(and 1 more files\)"):
        build(tmp_path / "x.parquet", tmp_path)
    assert len(build(tmp_path / "x.parquet", tmp_path, skip_bad=True).split("train")) == 2


def test_paths_in_a_data_set_from_the_hub_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"image": ["/etc/passwd"], "label": [0]})
    monkeypatch.setattr(hub, "load", lambda config: {"train": rows})
    with pytest.raises(DataError, match=r"data\.image: the column 'image' of 'some/set' holds paths, which only local data may"):
        HubSource(HubConfig(path="some/set"))


def test_places_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        HubSource(HubConfig())
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.path: .*x\.npz' cannot be loaded: a file with the suffix '\.npz'"):
        build(tmp_path / "x.npz", tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data\.path: .*x\.parquet' cannot be loaded: ") as error:
        build(tmp_path / "x.parquet", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="splits: expected the keys train"):
        SourceConfig.from_dict({"type": "hub", "splits": {"dev": "x"}})
