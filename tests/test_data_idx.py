"""MNIST-format files, and what is held out of a train split."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from intarsia.config import ConfigError
from stage1_tokenizer.data.base import DataError, SourceConfig
from stage1_tokenizer.data.holdout import held_out
from stage1_tokenizer.data.idx import IdxConfig, IdxSource, read_idx

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, CODES[array.dtype.name], array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5), dtype=np.uint8)


def labels(n: int) -> np.ndarray:
    return (np.arange(n) % 4).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images(40)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels(40))))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images(12, 1))))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels(12)))
    return tmp_path


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_type_is_read_back_gzipped_or_not(dtype: str, packed: bool, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float64) * 50
    data = idx_bytes(array.astype(dtype))
    (tmp_path / "x").write_bytes(gzip.compress(data) if packed else data)
    found = read_idx(tmp_path / "x")
    assert found.dtype == np.dtype(dtype) and np.array_equal(found, array.astype(dtype))


def test_the_four_files_become_three_splits(folder: Path) -> None:
    source = IdxSource(IdxConfig(root=str(folder), holdout=10, classes=("a", "b", "c", "d")))
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 30), ("validation", 10), ("test", 12)]
    assert source.classes == ("a", "b", "c", "d") and source.signal.shape == (6, 5)
    for name, original in (("train", images(40)), ("validation", images(40)), ("test", images(12, 1))):
        split = source.split(name)
        batch = split.batch(torch.arange(len(split)))
        assert np.array_equal(((batch["x"] + 1) * 127.5).round().numpy()[:, 0], original[split.origin])
        assert batch["label"].tolist() == (split.origin % 4).tolist()
    both = torch.cat([source.split("train").origin, source.split("validation").origin])
    assert sorted(both.tolist()) == list(range(40))


def test_explicit_paths_need_no_folder_and_labels_are_optional(folder: Path) -> None:
    source = IdxSource(IdxConfig(train_images=str(folder / "train-images-idx3-ubyte"), train_labels="", test_images="", holdout=0))
    assert source.splits == ("train",) and source.classes == () and "label" not in source.split("train").batch(torch.tensor([0]))
    gzipped = folder / "only.gz"
    gzipped.write_bytes(gzip.compress((folder / "train-images-idx3-ubyte").read_bytes()))
    again = IdxSource(IdxConfig(train_images=str(folder / "only"), train_labels="", test_images="", holdout=0))
    assert len(again.split("train")) == len(source.split("train"))


def test_without_names_classes_are_numbers(folder: Path) -> None:
    assert IdxSource(IdxConfig(root=str(folder))).classes == ("0", "1", "2", "3")


def _short(data: bytes) -> bytes:
    return data[:-1]


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated": ("train-images-idx3-ubyte", _short, "1199 bytes of values; its header promises 1200"),
    "too long": ("train-images-idx3-ubyte", lambda d: d + b"x", "more of values"),
    "empty": ("train-images-idx3-ubyte", lambda d: b"", "no idx file; it starts with nothing"),
    "other file": ("train-images-idx3-ubyte", lambda d: b"\x89PNG" + d, "no idx file; it starts with 89504e47"),
    "short header": ("train-images-idx3-ubyte", lambda d: d[:9], "truncated in its header"),
    "forged header": ("train-images-idx3-ubyte", lambda d: d[:4] + b"\xff" * 12 + d[16:], "promises .* at most"),
    "truncated gzip": ("train-labels-idx1-ubyte.gz", _short, "end-of-stream"),
    "damaged gzip": ("train-labels-idx1-ubyte.gz", lambda d: d[:-6] + b"xx" + d[-4:], "CRC"),
    "other count": ("t10k-labels-idx1-ubyte", lambda d: idx_bytes(labels(11)), r"shape \(11,\).*12 images"),
    "floats": ("train-images-idx3-ubyte", lambda d: idx_bytes(images(40).astype(np.float32)), "float32 .*expected uint8"),
    "two axes": ("train-images-idx3-ubyte", lambda d: idx_bytes(images(40)[:, 0]), r"uint8 of shape \(40, 5\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line(case: str, folder: Path) -> None:
    name, change, words = BROKEN[case]
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=words) as error:
        IdxSource(IdxConfig(root=str(folder)))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_wrong_labels_sizes_and_places_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"split 'train', sample 3: label 3; expected \[0, 2\]"):
        IdxSource(IdxConfig(root=str(folder), classes=("a", "b", "c")))
    with pytest.raises(ConfigError, match=r"data\.root"):
        IdxSource(IdxConfig())
    with pytest.raises(DataError, match=r"data\.train_images: neither .*nowhere.*nor"):
        IdxSource(IdxConfig(root="nowhere"))
    with pytest.raises(DataError, match="of the splits train and test, one has labels"):
        IdxSource(IdxConfig(root=str(folder), test_labels=""))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(images(12)[:, :5]))
    with pytest.raises(DataError, match=r"train has 1 channels of \(6, 5\), test has 1 of \(5, 5\); set transform.size"):
        IdxSource(IdxConfig(root=str(folder)))


# Holding out -------------------------------------------------------------------------------------------------------
def test_a_share_takes_about_that_share_and_growing_data_move_no_sample() -> None:
    small, large = held_out(0.1, 10_000, False), held_out(0.1, 20_000, False)
    assert small is not None and large is not None
    assert 900 < small.sum() < 1100
    assert torch.equal(large[:10_000], small)


def test_a_count_takes_exactly_that_many_and_default_is_5_percent() -> None:
    for n, count in ((100, 1), (100, 99), (5000, 777)):
        mask = held_out(count, n, False)
        assert mask is not None and mask.sum() == count
    default = held_out(None, 20_000, False)
    assert default is not None and 900 < default.sum() < 1100
    tiny = held_out(None, 3, False)
    assert tiny is not None and tiny.sum() == 1


def test_zero_and_an_own_validation_split_hold_out_nothing() -> None:
    assert held_out(0, 100, False) is None and held_out(None, 100, True) is None and held_out(0, 100, True) is None


def test_a_file_of_indices_is_read_as_text_or_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([3, 1], np.uint16))
    (tmp_path / "a.txt").write_text("3\n1\n")
    for name in ("a.npy", "a.txt"):
        mask = held_out(str(tmp_path / name), 5, False)
        assert mask is not None and mask.nonzero()[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.array([1, 5]), r"indices in \[1, 5\]; the train split has \[0, 4\]"),
        (np.array([-1]), r"indices in \[-1, -1\]"),
        (np.array([1, 1]), "an index twice"),
        (np.array([0.5]), "float64"),
        (np.array([[1]]), r"shape \(1, 1\)"),
        (np.arange(5), "holds out all 5"),
        (np.array([{}], object), "pickle"),
        (b"", "No data left in file"),
        ("3 x", "invalid literal"),
        ("", "whole numbers"),
    ],
)
def test_a_wrong_list_of_indices_is_refused(content: np.ndarray | str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / ("list.txt" if isinstance(content, str) else "list.npy")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=rf"data\.holdout: .*{words}"):
        held_out(str(path), 5, False)


def test_wrong_holdouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of the shipped fashion_mnist"):
        held_out("fashion-mnist", 5, False)
    with pytest.raises(ConfigError, match="holds out all 5"):
        held_out(5, 5, False)
    for value in (-1, 1.5, 0.0, True, "", [1]):
        with pytest.raises(ConfigError, match="holdout: expected a count") as error:
            SourceConfig.from_dict({"type": "idx", "holdout": value})
        assert len(error.value.errors) == 1
