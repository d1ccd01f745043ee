"""Captions: read by the sources that have them, kept through holding out and selecting, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import DataError, Source, SourceConfig
from stage1_tokenizer.data.folder import FolderConfig, FolderSource
from stage1_tokenizer.data.hub import HubConfig, HubSource


def grey(i: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), i, np.uint8))


def folder(root: Path, n: int = 12) -> Path:
    for i in range(n):
        place = root / ("cats" if i % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        grey(i).save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(f" grey {i}\n", encoding="utf-8")
    return root


def check(source: Source, prefix: str = "grey") -> None:
    """Each caption names the grey value of its image."""
    total = 0
    for name in source.splits:
        split = source.split(name)
        assert split.captions is not None
        values = ((split.batch(torch.arange(len(split)))["x"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert list(split.captions) == [f"{prefix} {v}" for v in values]
        total += len(values)
    assert total == 12


def parquet(path: Path, column: str, values: list[Any]) -> Path:
    rows = {"image": [grey(i) for i in range(12)], "label": [0, 1] * 6, column: values}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(path))
    return path


def hub(path: Path, **options: Any) -> HubSource:
    return HubSource(HubConfig(path=str(path), cache=str(path.parent / "cache"), **options))


def test_a_folder_reads_the_text_beside_each_image_and_holding_out_keeps_the_pairs(tmp_path):
    source = FolderSource(FolderConfig(root=str(folder(tmp_path / "data")), captions=True, holdout=4))
    assert source.splits == ("train", "validation")
    check(source)


def test_skipping_a_bad_image_keeps_the_pairs(tmp_path):
    root = folder(tmp_path / "data")
    (root / "cats" / "00.png").write_bytes(b"no image")
    (root / "cats" / "00.txt").write_text("of the bad one")
    check(FolderSource(FolderConfig(root=str(root), captions=True, skip_bad=True, holdout=0)))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, r"data\.captions: '.*03\.txt', the caption of 'cats/03\.png': No such file"), (b" \n", "is empty"), (b"\xff\xfe", "no UTF-8")],
)
def test_a_missing_or_unreadable_text_is_named(tmp_path, content, words):
    text = folder(tmp_path / "data") / "cats" / "03.txt"
    text.unlink() if content is None else text.write_bytes(content)
    with pytest.raises(DataError, match=words):
        FolderSource(FolderConfig(root=str(tmp_path / "data"), captions=True))
    assert FolderSource(FolderConfig(root=str(tmp_path / "data"))).split("train").captions is None


def test_a_column_of_a_data_set_is_read_beside_images_and_arrays(tmp_path):
    texts = [f"grey {i}" for i in range(12)]
    check(hub(parquet(tmp_path / "a.parquet", "text", texts), caption="text", holdout=3))
    arrays = datasets.Dataset.from_dict({"image": [np.full((8, 8), i).tolist() for i in range(12)], "text": texts})
    arrays.to_parquet(str(tmp_path / "b.parquet"))
    check(hub(tmp_path / "b.parquet", label="", caption="text", holdout=3))


def test_wrong_columns_are_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", "text", ["x"] * 11 + [None])
    with pytest.raises(DataError, match="data.caption: split 'train', row 11: None; expected a text"):
        hub(path, caption="text")
    with pytest.raises(DataError, match="data.caption: no column 'txet' in split 'train'; it has image, label, text"):
        hub(path, caption="txet")


def test_captions_belong_to_the_identity_of_the_data():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    digests = {ArraySplit(x, captions=c).digest() for c in (None, ["a", "b", "c"], ["a", "b", "d"])}
    assert len(digests) == 3


def test_another_number_of_captions_and_captions_of_one_split_alone_are_refused():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="data: 2 captions of 3 samples"):
        ArraySplit(x, captions=["a", "b"])

    class Half(Source):
        type_name = "half"

        def __init__(self) -> None:
            super().__init__(SourceConfig.model_construct(holdout=None))
            self._finish({"train": ArraySplit(x, captions="abc"), "test": ArraySplit(x)}, ())

    with pytest.raises(DataError, match="of the splits train and test, one has captions and the other has none"):
        Half()
