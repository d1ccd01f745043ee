"""The data sets of torchvision, from tiny files of their own layouts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from intarsia.config import ConfigError
from intarsia.distributed import comm
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import DataError, SourceConfig
from stage1_tokenizer.data.decoded import DecodedSplit
from stage1_tokenizer.data.torchvision import TorchvisionConfig, TorchvisionSource, labels_of, open_sets
from stage1_tokenizer.data.transform import TransformConfig


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def mnist_files(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10
    for stem, part in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(idx(images[part]))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
    return images, labels


def test_a_class_with_its_images_in_one_array(tmp_path: Path) -> None:
    images, _ = mnist_files(tmp_path, "FashionMNIST")
    source = TorchvisionSource(TorchvisionConfig(name="FashionMNIST", root=str(tmp_path), holdout=5))
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 15), ("validation", 5), ("test", 10)]
    split = source.split("train")
    assert isinstance(split, ArraySplit) and source.classes[7] == "Sneaker"
    batch = split.batch(torch.arange(15))
    assert np.array_equal(((batch["x"][:, 0] + 1) * 127.5).round().numpy(), images[split.origin])
    assert batch["label"].tolist() == (split.origin % 10).tolist()
    assert str(tmp_path) not in json.dumps(source.describe())


def eurosat_files(root: Path) -> None:
    for k, name in enumerate(("AnnualCrop", "Forest", "Pasture")):
        folder = root / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(4):
            x = np.random.default_rng(10 * k + i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(x).save(folder / f"{name}_{i}.png")


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_class_that_decodes_files_without_splits(memory: int, tmp_path: Path) -> None:
    eurosat_files(tmp_path)
    source = TorchvisionSource(TorchvisionConfig(name="EuroSAT", root=str(tmp_path), memory=memory, holdout=0))
    split = source.split("train")
    assert isinstance(split, DecodedSplit) and source.splits == ("train",) and source.classes == ("AnnualCrop", "Forest", "Pasture")
    batch = split.batch(torch.tensor([11, 4]))
    assert batch["label"].tolist() == [2, 1]
    oracle = np.random.default_rng(23).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    assert np.array_equal(((batch["x"][0] + 1) * 127.5).round().numpy(), oracle.transpose(2, 0, 1))


def test_a_class_with_a_split_argument_is_asked_for_the_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Toy(torchvision.datasets.VisionDataset):
        def __init__(self, root: str, split: str = "trainval", transform: object = None) -> None:
            if split not in ("trainval", "val", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split")
            self.count = {"trainval": 8, "val": 3, "test": 2}[split]
            self._labels = [i % 2 for i in range(self.count)]

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.new("L", (8, 8), i), self._labels[i]

    monkeypatch.setattr(torchvision.datasets, "STL10", Toy)
    source = TorchvisionSource(TorchvisionConfig(name="STL10", root=str(tmp_path)))
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 7), ("validation", 1), ("test", 2)]
    held = torch.cat([source.split(n).origin for n in ("train", "validation")])
    assert sorted(held.tolist()) == list(range(8)), "trainval holds the images of val: validation is taken from it"
    assert source.classes == ("0", "1")
    chosen = TorchvisionConfig(name="STL10", root=str(tmp_path), splits={"train": "test", "validation": "val"}, labels=False)
    source = TorchvisionSource(chosen)
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 2), ("validation", 3)] and source.classes == ()
    with pytest.raises(DataError, match=r"data\.splits: STL10 has no split 'extra': Unknown value 'extra'"):
        TorchvisionSource(chosen.replace(splits={"train": "extra"}))


def test_other_arguments_of_a_class_are_passed_on_and_checked() -> None:
    config = TorchvisionConfig(name="FakeData", options={"size": 6, "num_classes": 3}, transform=TransformConfig(size=16), holdout=0)
    with pytest.raises(ConfigError, match=r"data\.options: FakeData has no argument 'sise'; it has .*size"):
        TorchvisionSource(config.replace(options={"sise": 6}))
    source = TorchvisionSource(config)
    assert source.signal.shape == (16, 16) and source.signal.channels == 3 and len(source.split("train")) == 6


def test_wrong_names_and_missing_files_are_refused_by_field(tmp_path: Path) -> None:
    for name in ("CIFAR", "", "VisionDataset2", "wrap_dataset_for_transforms_v2", "utils"):
        with pytest.raises(ConfigError, match=r"data\.name: .* is no data set of torchvision"):
            TorchvisionSource(TorchvisionConfig(name=name, root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.root: the folder of the files of CIFAR10"):
        TorchvisionSource(TorchvisionConfig(name="CIFAR10"))
    with pytest.raises(DataError, match=r"data\.root: CIFAR10 in .*: .*; download: true lets torchvision fetch it"):
        TorchvisionSource(TorchvisionConfig(name="CIFAR10", root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.splits: CIFAR10 has no argument split"):
        TorchvisionSource(TorchvisionConfig(name="CIFAR10", root=str(tmp_path), splits={"train": "a"}))
    with pytest.raises(ConfigError, match=r"options: x must be a number") as error:
        SourceConfig.from_dict({"type": "torchvision", "name": "CIFAR10", "options": {"x": [1]}})
    assert len(error.value.errors) == 1


def test_labels_must_be_one_number_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attributes(torchvision.datasets.FakeData):
        @property
        def targets(self) -> list[list[int]]:
            return [[0, 1]] * len(self)

    monkeypatch.setattr(torchvision.datasets, "FakeData", Attributes)
    with pytest.raises(DataError, match=r"FakeData \[train\]: labels of .*; expected one whole number each; labels: false takes none"):
        TorchvisionSource(TorchvisionConfig(name="FakeData", options={"size": 3}))
    source = TorchvisionSource(TorchvisionConfig(name="FakeData", options={"size": 3}, labels=False, holdout=0))
    assert "label" not in source.split("train").batch(torch.tensor([0]))


def test_labels_that_are_rows_of_particulars_come_from_the_samples() -> None:
    class Rows(torchvision.datasets.FakeData):
        @property
        def targets(self) -> torch.Tensor:
            return torch.arange(8 * len(self)).view(-1, 8)

    data = Rows(size=5, image_size=(1, 8, 8), num_classes=3)
    assert labels_of(data, "QMNIST").tolist() == [data[i][1] for i in range(5)]


def test_labels_that_are_no_numbers_are_refused_by_the_first_sample() -> None:
    class Words(torchvision.datasets.FakeData):
        def __getitem__(self, i: int) -> tuple[Image.Image, str]:
            assert i == 0
            return Image.new("L", (8, 8)), "cat"

    with pytest.raises(DataError, match="words: its labels are no numbers; set labels to false"):
        labels_of(Words(size=5), "words")


def test_what_is_downloaded_is_fetched_by_one_rank_before_the_others_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Callable[..., list[Any]]
) -> None:
    class Toy(torchvision.datasets.FakeData):
        def __init__(self, root: str, download: bool = False) -> None:
            super().__init__(size=4)
            if not (path := tmp_path / "whole").exists():
                assert comm.rank == 0
                time.sleep(0.2)
                path.touch()

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Toy)
    config = TorchvisionConfig(name="CIFAR100", root=str(tmp_path), download=True)
    assert ranks(lambda rank: len(open_sets(config)["train"])) == [4, 4]


def test_the_others_wait_for_a_download_that_takes_longer_than_the_groups_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Callable[..., list[Any]]
) -> None:
    class Slow(torchvision.datasets.FakeData):
        def __init__(self, root: str, download: bool = False) -> None:
            super().__init__(size=4)
            if not (path := tmp_path / "whole").exists():
                time.sleep(2.5)
                path.touch()

    def opened(rank: int) -> int:
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), torch.distributed.group.WORLD)
        return len(open_sets(config)["train"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Slow)
    config = TorchvisionConfig(name="CIFAR100", root=str(tmp_path), download=True)
    assert ranks(opened) == [4, 4]
