"""Folders of images: layouts, batches from memory and from disk, and bad input (gate D2)."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.config import ConfigError
from stage1_tokenizer.data import decoded, preflight
from stage1_tokenizer.data.base import DataError, SourceConfig
from stage1_tokenizer.data.decoded import DecodedSplit
from stage1_tokenizer.data.errors import BadFileError
from stage1_tokenizer.data.folder import FolderConfig, FolderSource
from stage1_tokenizer.data.transform import TransformConfig


def picture(seed: int, height: int = 16, width: int = 16, mode: str = "RGB") -> Image.Image:
    x = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(x).convert(mode)


def fill(folder: Path, count: int, start: int = 0, suffix: str = ".png", **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i, **options).save(folder / f"{i:03}{suffix}")  # type: ignore[arg-type]


def build(root: Path, **options: object) -> FolderSource:
    return FolderSource(FolderConfig(root=str(root), **options))  # type: ignore[arg-type]


# Layouts -----------------------------------------------------------------------------------------------------------
def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    fill(tmp_path / "dog", 3)
    fill(tmp_path / "cat" / "deep" / "er", 2, 10)
    fill(tmp_path / "cat", 1, 20)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = build(tmp_path, holdout=0)
    split = source.split("train")
    assert source.classes == ("cat", "dog") and len(split) == 6
    batch = split.batch(torch.arange(6))
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    seeds = [20, 10, 11, 0, 1, 2]
    oracle = np.stack([np.asarray(picture(s)).transpose(2, 0, 1) for s in seeds])
    assert np.array_equal(((batch["x"] + 1) * 127.5).round().numpy(), oracle)


def test_a_flat_folder_is_unlabelled_end_to_end(tmp_path: Path) -> None:
    fill(tmp_path, 20, mode="L")
    source = build(tmp_path)
    assert source.classes == () and source.signal.channels == 1 and source.splits == ("train", "validation")
    assert "label" not in source.split("train").batch(torch.tensor([0]))
    assert "class_counts" not in source.describe()["splits"]["train"]
    fill(tmp_path / "more", 3, 50, mode="L")
    assert len(build(tmp_path, layout="flat", holdout=0).split("train")) == 23


@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_folders_of_splits_are_found_by_their_names(validation: str, tmp_path: Path) -> None:
    for split, count in (("train", 4), (validation, 3), ("test", 2)):
        for k, name in enumerate(("a", "b")):
            fill(tmp_path / split / name, count, 100 * k)
    source = build(tmp_path)
    assert [(n, len(source.split(n))) for n in source.splits] == [("train", 8), ("validation", 6), ("test", 4)]
    assert source.split("test").batch(torch.arange(4))["label"].tolist() == [0, 0, 1, 1]


def test_classes_that_are_called_like_splits_need_a_word(tmp_path: Path) -> None:
    for name in ("train", "bus", "car"):
        fill(tmp_path / name, 2)
    with pytest.raises(DataError, match="holds 'train' and 'bus'; set splits"):
        build(tmp_path)
    assert build(tmp_path, splits="none").classes == ("bus", "car", "train")


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a"):
        fill(tmp_path / name, 4)
    first = build(tmp_path)
    entries = os.scandir

    def reversed_entries(path: str) -> object:
        found = sorted(entries(path), key=lambda e: e.name, reverse=True)

        class Listing(list):  # type: ignore[type-arg]
            def __enter__(self) -> Listing:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return Listing(found)

    monkeypatch.setattr(os, "scandir", reversed_entries)
    assert build(tmp_path).describe() == first.describe()


def test_a_description_moves_with_the_folder_and_notices_a_change_and_so_does_its_sketch(tmp_path: Path) -> None:
    fill(tmp_path / "one" / "a", 4)
    fill(tmp_path / "one" / "b", 4, 50)
    source = build(tmp_path / "one")
    first, sketch = source.describe(), source.split("train").sketch()
    (tmp_path / "one").rename(tmp_path / "two")
    second = build(tmp_path / "two", memory=0, workers=1)
    assert second.describe() == first and second.split("train").sketch() == sketch
    assert str(tmp_path) not in json.dumps(first)
    picture(99).save(tmp_path / "two" / "a" / "001.png")
    changed = build(tmp_path / "two")
    assert changed.describe() != first and changed.split("train").sketch() != sketch


# Batches -----------------------------------------------------------------------------------------------------------
TRANSFORMS = {
    "centre": TransformConfig(size=8),
    "random crop": TransformConfig(size=8, crop="random", flip=True),
    "margin and shift": TransformConfig(size=(8, 10), margin=3, crop="random", shift=2, channels=1),
    "exact": TransformConfig(size=(9, 7), resize="exact", shift=1),
    "crop only": TransformConfig(size=10, resize="none", crop="random"),
    "one size": TransformConfig(size=8, flip=True),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_memory_and_disk_and_any_number_of_workers_give_the_same_batches(case: str, tmp_path: Path) -> None:
    for k, (height, width) in enumerate(((20, 14), (12, 30), (16, 16))):
        fill(tmp_path, 4, 10 * k, height=height, width=width)
        fill(tmp_path, 2, 100 + 10 * k, ".jpg", height=height, width=width)
    variants = [{}, {"memory": 0}, {"memory": 0, "workers": 1}, {"workers": 3}]
    splits = [build(tmp_path, transform=TRANSFORMS[case], holdout=0, **v).split("train") for v in variants]
    assert isinstance(splits[0], DecodedSplit) and splits[0]._held is not None
    assert isinstance(splits[1], DecodedSplit) and splits[1]._held is None
    rows, epochs = torch.arange(18), torch.arange(18) % 4
    for arguments in ((), (epochs, 3), (None, 3, 1)):
        batches = [s.batch(rows, *arguments)["x"] for s in splits]
        assert batches[0].shape[2:] == splits[0].signal.shape
        for other in batches[1:]:
            assert torch.equal(batches[0], other)
        pick = torch.tensor([5, 17, 2])
        partial = (arguments[0][pick], *arguments[1:]) if arguments and arguments[0] is not None else arguments
        assert torch.equal(splits[1].batch(pick, *partial)["x"], batches[0][pick])


def test_the_centre_of_an_image_is_what_pil_crops(tmp_path: Path) -> None:
    fill(tmp_path, 3, height=20, width=31)
    out = build(tmp_path, transform=TransformConfig(size=10), holdout=0).split("train").batch(torch.arange(3))["x"]
    for i in range(3):
        scaled = picture(i, 20, 31).resize((16, 10), Image.Resampling.LANCZOS)
        oracle = np.asarray(scaled.crop((3, 0, 13, 10))).transpose(2, 0, 1)
        assert np.array_equal(((out[i] + 1) * 127.5).round().numpy(), oracle)


def test_a_hanging_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 6)
    split = build(tmp_path, memory=0, timeout=0.3, holdout=0).split("train")
    assert isinstance(split, DecodedSplit)
    release, whole = threading.Event(), split.decode
    monkeypatch.setattr(split, "decode", lambda i: release.wait(30) if i == 4 else whole(i))
    with pytest.raises(DataError, match=r"worker \d has held .*004\.png for"):
        split.batch(torch.arange(6))
    release.set()


def test_a_file_that_changes_under_way_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    split = build(tmp_path, memory=0, holdout=0).split("train")
    (tmp_path / "003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"003\.png: the file is empty"):
        split.batch(torch.arange(6))
    (tmp_path / "003.png").unlink()
    with pytest.raises(DataError, match=r"003\.png: No such file"):
        split.batch(torch.arange(6))


# Bad input (gate D2) -----------------------------------------------------------------------------------------------
def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height grey pixels and holds a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut_short(kind: str) -> bytes:
    data = encoded(picture(0), kind)
    return data[: len(data) * 9 // 10]


def flipped_bit() -> bytes:
    data = bytearray(encoded(picture(0), "PNG"))
    data[len(data) // 2] ^= 8
    return bytes(data)


def frames(kind: str) -> bytes:
    return encoded(picture(0), kind, save_all=True, append_images=[picture(1), picture(2)])


def bad_file(data: Callable[[], bytes], name: str = "bad.png") -> Callable[[Path], None]:
    return lambda root: (root / "b" / name).write_bytes(data())  # type: ignore[return-value]


def loop_of_files(root: Path) -> None:
    (root / "b" / "bad.png").symlink_to(root / "b" / "bad.png")


def dangling(root: Path) -> None:
    (root / "b" / "bad.png").symlink_to(root / "nowhere.png")


def loop_of_folders(root: Path) -> None:
    (root / "b" / "bad").symlink_to(root)


def not_utf8(root: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("macOS refuses such names itself")
    picture(0).save(root / "b" / "x.png")
    os.rename(root / "b" / "x.png", os.fsencode(root / "b") + b"/bad\xff.png")


def newline_in_name(root: Path) -> None:
    picture(0).save(root / "b" / "bad\n.png")


def one_class(root: Path) -> None:
    for path in (root / "a").iterdir():
        path.unlink()
    (root / "a").rmdir()


def empty_class(root: Path) -> None:
    (root / "bad").mkdir()


def nothing(root: Path) -> None:
    for name in ("a", "b"):
        for path in (root / name).iterdir():
            path.unlink()
        (root / name).rmdir()


def loose(root: Path) -> None:
    picture(0).save(root / "bad.png")


def other_size(root: Path) -> None:
    picture(0, 16, 17).save(root / "b" / "bad.png")


def other_channels(root: Path) -> None:
    picture(0, mode="L").save(root / "b" / "bad.png")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated PNG": (bad_file(lambda: cut_short("PNG")), r"b/bad\.png: .*truncated"),
    "truncated JPEG": (bad_file(lambda: cut_short("JPEG"), "bad.jpg"), r"b/bad\.jpg: .*truncated"),
    "JPEG cut in its header": (bad_file(lambda: cut_short("JPEG")[:300], "bad.jpg"), r"b/bad\.jpg: .*Truncated"),
    "flipped bit": (bad_file(flipped_bit), r"b/bad\.png: "),
    "empty file": (bad_file(lambda: b""), r"b/bad\.png: the file is empty"),
    "HTML": (bad_file(lambda: b"<!DOCTYPE html><html>404</html>"), r"b/bad\.png: an HTML page"),
    "git-lfs pointer": (bad_file(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), r"b/bad\.png: a git-lfs pointer"),
    "text": (bad_file(lambda: b"hello"), r"b/bad\.png: not an image that PIL reads \(it starts with 68656c6c6f\)"),
    "0x0": (bad_file(lambda: png_header(0, 0)), r"b/bad\.png: "),
    "1x1": (bad_file(lambda: encoded(picture(0, 1, 1), "PNG")), r"b/bad\.png: 1x1 pixels; each side needs at least 4"),
    "20000x20000": (bad_file(lambda: png_header(20_000, 20_000)), r"b/bad\.png: .*400000000 pixels|b/bad\.png: 20000x20000"),
    "13000x13000": (bad_file(lambda: png_header(13_000, 13_000)), r"b/bad\.png: .*169000000 pixels|b/bad\.png: 13000x13000"),
    "9000x9000": (bad_file(lambda: png_header(9_000, 9_000)), r"b/bad\.png: 9000x9000 pixels; at most 80000000"),
    "I;16": (bad_file(lambda: encoded(Image.new("I;16", (16, 16)), "PNG")), r"b/bad\.png: mode I;16; expected"),
    "float": (bad_file(lambda: encoded(Image.new("F", (16, 16)), "TIFF"), "bad.tif"), r"b/bad\.tif: mode F; expected"),
    "CMYK": (bad_file(lambda: encoded(picture(0, mode="CMYK"), "JPEG"), "bad.jpg"), r"b/bad\.jpg: mode CMYK; expected"),
    "animated GIF": (bad_file(lambda: frames("GIF"), "bad.gif"), r"b/bad\.gif: 3 frames; expected a still image"),
    "animated PNG": (bad_file(lambda: frames("PNG")), r"b/bad\.png: 3 frames"),
    "animated WebP": (bad_file(lambda: frames("WEBP"), "bad.webp"), r"b/bad\.webp: 3 frames"),
    "pages of a TIFF": (bad_file(lambda: frames("TIFF"), "bad.tif"), r"b/bad\.tif: 3 frames"),
    "name that is not UTF-8": (not_utf8, r"b/bad\\udcff\.png: the name of the file is not UTF-8"),
    "name with a newline": (newline_in_name, r"b/bad\\n\.png: the name of the file is not UTF-8, or holds a control character"),
    "symlink to itself": (loop_of_files, r"b/bad\.png: Too many levels of symbolic links"),
    "dangling symlink": (dangling, r"b/bad\.png: No such file"),
    "symlink to a folder above": (loop_of_folders, r"data\.root: .*b/bad.* loop"),
    "empty folder": (nothing, r"data\.root: .* holds no images"),
    "empty class folder": (empty_class, r"data\.root: the class folder .*bad.* holds no images"),
    "one class": (one_class, r"data\.root: .* one class folder only, 'b'; set layout to flat"),
    "images beside class folders": (loose, r"data\.root: .* holds images \('bad\.png'\) beside folders"),
    "mixed sizes": (other_size, r"a/000\.png is 16x16, .*b/bad\.png is 17x16; set transform\.size"),
    "mixed channels": (other_channels, r"a/000\.png has 3 channels, .*b/bad\.png has 1; set transform\.channels"),
}


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    fill(tmp_path / "a", 3)
    fill(tmp_path / "b", 3, 10)
    return tmp_path


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # as the library sets it, before pytest resets it
@pytest.mark.parametrize("case", BAD)
def test_d2_bad_images_and_folders_are_named_before_training(case: str, two_classes: Path) -> None:
    spoil, words = BAD[case]
    spoil(two_classes)
    with pytest.raises(DataError, match=words) as error:
        build(two_classes)
    assert "\n" not in str(error.value)


NAMES = ["Screenshot 9.41.00\u202fAM", "family \U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0627\u200c\u0628", "full\u3000width"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_may_hold_any_letters_joiners_and_spaces(name: str, tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "001.png").rename(tmp_path / f"{name}.png")
    split = build(tmp_path, holdout=0, memory=0).split("train")
    assert len(split) == 3 and split.batch(torch.arange(3))["x"].shape == (3, 3, 16, 16) and split.digest()
    (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.png: the file is empty") as error:
        split.batch(torch.arange(3))
    assert str(error.value).isprintable()


# What is left out ----------------------------------------------------------------------------------------------------
def test_files_that_are_not_taken_are_counted_by_their_suffixes(tmp_path: Path) -> None:
    root = tmp_path / "classes"
    for name in ("a", "b"):
        fill(root / name / "deep", 2)
        (root / name / "x.HEIC").touch()
    (root / "a" / "notes").touch()
    (root / "a" / ".hidden").touch()
    fill(root, 3)
    (root / "list.csv").touch()
    source = build(root, layout="classes", holdout=0)
    assert source.summary()[-1] == "no images by their names or places, left out: 1 .csv, 2 .heic, 3 .png, 1 no suffix"
    assert not any("left out" in line for line in build(root / "a" / "deep", holdout=0).summary())
    for split in ("train", "test"):
        fill(tmp_path / "set" / split, 2)
        (tmp_path / "set" / split / "000.txt").write_text("a caption")
        (tmp_path / "set" / split / "001.txt").write_text("a caption")
    (tmp_path / "set" / "README.md").touch()
    (tmp_path / "set" / "test" / "list.txt").touch()
    left = [build(tmp_path / "set", captions=captions, holdout=0).summary()[-1].split(": ")[1] for captions in (False, True)]
    assert left == ["1 .md, 5 .txt", "1 .md, 1 .txt"]


def test_a_file_that_cannot_be_decoded_may_be_replaced_unless_the_run_knows_its_data_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 6)
    monkeypatch.setattr(decoded, "DIGEST_SAMPLES", 2)  # the first and the last
    split = build(tmp_path, memory=0, holdout=0).split("train")
    before = split.sketch()
    for name, replaceable in (("000.png", False), ("003.png", True)):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(good[:-60])
        with pytest.raises(BadFileError, match=name) as error:
            split.batch(torch.arange(6))
        assert error.value.replaceable == replaceable
        picture(77).save(tmp_path / name)
        assert (build(tmp_path, memory=0, holdout=0).split("train").sketch() == before) == replaceable
        (tmp_path / name).write_bytes(good)


def test_one_class_folder_is_a_class_where_that_is_said(two_classes: Path) -> None:
    one_class(two_classes)
    source = build(two_classes, layout="classes")
    assert source.classes == ("b",) and source.split("train").labels.unique().tolist() == [0]


SKIPPED = [case for case, (_, words) in BAD.items() if words.startswith("b/")]


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", SKIPPED)
def test_d2_bad_images_are_skipped_only_if_asked_and_counted(case: str, two_classes: Path) -> None:
    BAD[case][0](two_classes)
    source = build(two_classes, skip_bad=True, holdout=0)
    assert len(source.split("train")) == 6 and len(source.skipped) == 1 and source.describe()["skipped"] == 1
    assert "bad" in source.skipped[0] and any("skipped 1" in line for line in source.summary())
    assert source.split("train").batch(torch.arange(6))["label"].tolist() == [0, 0, 0, 1, 1, 1]


def test_positions_of_what_is_kept_are_recorded(two_classes: Path) -> None:
    (two_classes / "a" / "001.png").write_bytes(b"")
    split = build(two_classes, skip_bad=True, holdout=0).split("train")
    assert split.origin.tolist() == [0, 2, 3, 4, 5]
    seeds = [0, 2, 10, 11, 12]
    oracle = np.stack([np.asarray(picture(s)).transpose(2, 0, 1) for s in seeds])
    assert np.array_equal(((split.batch(torch.arange(5))["x"] + 1) * 127.5).round().numpy(), oracle)


def test_a_folder_of_bad_images_alone_is_an_error_even_if_they_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 1 images can be used; .*x\.png: the file is empty"):
        build(tmp_path, skip_bad=True)


def test_the_number_of_further_bad_files_is_said(two_classes: Path) -> None:
    for name in ("001.png", "002.png"):
        (two_classes / "a" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a/001\.png: the file is empty \(and 1 more files\); skip_bad: true"):
        build(two_classes)


def test_damaged_pixels_are_found_by_the_sample(two_classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(two_classes / "a", 1, 7, height=64, width=64)
    fill(two_classes / "a", 20, 30, height=64, width=64)
    data = (two_classes / "a" / "007.png").read_bytes()
    (two_classes / "a" / "007.png").write_bytes(data[: len(data) // 2])
    config = {"transform": TransformConfig(size=16), "memory": 0}
    with pytest.raises(DataError, match=r"007\.png"):
        build(two_classes, **config)
    monkeypatch.setattr(preflight, "SAMPLES", 2)  # the header alone looks well
    assert len(build(two_classes, holdout=0, **config).split("train")) == 27


@pytest.mark.parametrize("transform", [{"size": 256}, {"size": 256, "crop": "random", "margin": 8}, {"size": 256, "shift": 4}])
def test_a_strip_that_would_become_gigabytes_is_named_or_skipped(transform: dict[str, object], two_classes: Path) -> None:
    Image.new("RGB", (4000, 4)).save(two_classes / "b" / "bad.png")
    config = TransformConfig(**transform)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"b/bad\.png: 4000x4 becomes 2\d{5}x2\d\d for the size 256x256; at most 16777216 pixels"):
        build(two_classes, transform=config)
    source = build(two_classes, transform=config, skip_bad=True, holdout=0)
    assert len(source.split("train")) == 6 and len(source.skipped) == 1


def test_a_shift_beyond_the_images_is_refused(two_classes: Path) -> None:
    with pytest.raises(DataError, match=r"data\.transform\.shift: 16; expected less than 16"):
        build(two_classes, transform=TransformConfig(shift=16))


@pytest.mark.parametrize("case", ["too small", "no class folders", "unknown class", "no train", "two validations", "one flat split"])
def test_other_impossible_folders_are_refused_by_name(case: str, two_classes: Path) -> None:
    root, options, words = two_classes, {}, ""
    if case == "too small":
        options, words = {"transform": TransformConfig(size=17, resize="none")}, r"a/000\.png is 16x16, smaller than transform\.size 17x17"
    elif case == "no class folders":
        root, options, words = root / "a", {"layout": "classes"}, "no class folders; set layout to flat"
    else:
        for split in ("train", "val"):
            for name in ("x", "y"):
                fill(root / "set" / split / name, 2)
        root = root / "set"
        if case == "unknown class":
            fill(root / "val" / "z", 1)
            words = "has the class folder 'z', which the train split lacks"
        elif case == "no train":
            (root / "train").rename(root / "test")
            options, words = {"splits": "folders"}, "holds no folder train"
        elif case == "two validations":
            fill(root / "validation", 1)
            words = "two folders for the split 'validation'"
        else:
            fill(root / "test", 2)
            words = r"test' has no class folders, the other splits have; set layout"
    with pytest.raises(DataError, match=words):
        build(root, **options)


def test_a_missing_folder_and_wrong_fields_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        FolderSource(FolderConfig())
    with pytest.raises(DataError, match=r"data\.root: .*nowhere.* is no folder"):
        build(tmp_path / "nowhere")
    for field, value in (("timeout", 0.0), ("memory", -1), ("workers", -1), ("layout", "x")):
        with pytest.raises(ConfigError) as error:
            SourceConfig.from_dict({"type": "folder", "root": "x", field: value})
        assert str(error.value).startswith(field)
