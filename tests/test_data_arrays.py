"""Signals held as arrays: what is accepted, exact conversion, and errors that name the index (gate D3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.specs import SignalSpec
from stage1_tokenizer.data.array_images import image_array
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import DataError
from stage1_tokenizer.data.transform import TransformConfig


def test_every_byte_has_its_exact_value_and_comes_back() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = ArraySplit(x).batch(torch.tensor([0]))["x"]
    assert out.dtype == torch.float32 and out.min() == -1 and out.max() == 1
    assert torch.equal(((out + 1) * 127.5).round().to(torch.uint8), x)


@pytest.mark.parametrize(("axes", "kind"), [((16,), "audio"), ((4, 6), "image"), ((3, 4, 6), "video")])
def test_one_class_serves_sound_images_and_video(axes: tuple[int, ...], kind: str) -> None:
    x = torch.rand(5, 2, *axes) * 2 - 1
    split = ArraySplit(x, labels=[0, 1, 2, 1, 0])
    assert split.signal == SignalSpec(kind, 2, axes)
    batch = split.batch(torch.tensor([4, 1]))
    assert torch.equal(batch["x"], x[[4, 1]])
    assert batch["label"].tolist() == [0, 1] and batch["index"].tolist() == [4, 1]
    moved = ArraySplit(x, transform=TransformConfig(shift=1)).batch(torch.arange(5), epochs=0)["x"]
    assert moved.shape == x.shape and not torch.equal(moved, x)


def test_unlabelled_batches_have_no_label() -> None:
    assert set(ArraySplit(torch.zeros(2, 1, 4, 4)).batch(torch.tensor([0]))) == {"x", "index"}


def test_select_keeps_order_labels_and_origin() -> None:
    x = torch.randint(0, 256, (9, 1, 6, 6), dtype=torch.uint8)
    split = ArraySplit(x, torch.arange(9), TransformConfig(size=4))
    part = split.select(torch.tensor([7, 2])).select(torch.tensor([1, 0]))
    assert part.origin.tolist() == [2, 7] and len(part) == 2
    batch = part.batch(torch.tensor([0, 1]))
    assert batch["label"].tolist() == [2, 7]
    assert torch.equal(batch["x"], split.batch(torch.tensor([2, 7]))["x"])
    assert part.digest() == ArraySplit(x[[2, 7]], torch.tensor([2, 7]), TransformConfig(size=4)).digest()
    assert part.digest() != split.digest()


def test_resizing_an_array_is_pils_lanczos() -> None:
    x = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    out = ArraySplit(x, transform=TransformConfig(size=8, resize="exact")).x
    for image, small in zip(x, out, strict=True):
        oracle = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(oracle), small.permute(1, 2, 0).numpy())


def test_channels_become_grey_as_pil_does_or_colour_by_repeating() -> None:
    x = torch.randint(0, 256, (3, 3, 5, 6), dtype=torch.uint8)
    grey = ArraySplit(x, transform=TransformConfig(channels=1)).x
    for image, flat in zip(x, grey, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")), flat[0].numpy())
    colour = ArraySplit(grey, transform=TransformConfig(channels=3)).x
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))


def floats(value: float) -> torch.Tensor:
    x = torch.zeros(7, 1, 4, 4)
    x[5, 0, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (floats(float("nan")), "sample 5 .*nan"),
        (floats(float("inf")), "sample 5 .*inf"),
        (floats(255.0), r"sample 5 .*255.*\[-1, 1\]"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int64), "int64.*uint8"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.bool), "bool.*uint8"),
        (torch.zeros(3, 4), r"\(3, 4\)"),
        (torch.zeros(0, 1, 4, 4), r"\(0, 1, 4, 4\)"),
    ],
)
def test_d3_bad_arrays_are_refused_by_index(x: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ArraySplit(x)


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0, 2.0], [[0], [1], [2]], [True, False, True]])
def test_labels_that_do_not_fit_are_refused(labels: list[object]) -> None:
    with pytest.raises(DataError, match="labels of .* 3 whole numbers"):
        ArraySplit(torch.zeros(3, 1, 4, 4), labels)


@pytest.mark.parametrize(("indices", "words"), [([0, 3], r"\[0, 3\].*\[0, 2\]"), ([-1], r"\[-1, -1\]")])
def test_indices_outside_the_split_are_refused(indices: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArraySplit(torch.zeros(3, 1, 4, 4)).batch(torch.tensor(indices))


def test_an_empty_batch_and_a_negative_view() -> None:
    split = ArraySplit(torch.zeros(3, 1, 4, 4), transform=TransformConfig(flip=True))
    assert split.batch(torch.zeros(0, dtype=torch.int64), epochs=0)["x"].shape == (0, 1, 4, 4)
    with pytest.raises(ValueError, match="view: -1"):
        split.batch(torch.tensor([0]), view=-1)


# Images that come as arrays of numbers -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6), (1, 5, 6)), ((5, 6, 3), (3, 5, 6)), ((5, 6, 1), (1, 5, 6)), ((3, 5, 6), (3, 5, 6)), ((1, 5, 6), (1, 5, 6))],
)
def test_every_layout_becomes_channels_first(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    x = image_array(images)
    assert x.shape == (4, *expected) and x.dtype == np.uint8
    assert sorted(x.ravel()) == sorted(images.ravel())
    assert np.array_equal(image_array(images.astype(np.int64)), x)


def test_float_images_from_zero_to_one_become_signals() -> None:
    images = np.random.default_rng(0).random((3, 4, 4))
    x = image_array(images)
    assert x.dtype == np.float32 and np.allclose(x[:, 0], images * 2 - 1)


def broken(value: float, dtype: type = np.float64) -> np.ndarray:
    x = np.zeros((7, 4, 4), dtype)
    x[5, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (broken(float("nan")), "image 5 .*nan"),
        (broken(float("inf")), "image 5 .*inf"),
        (broken(255.0), r"image 5 .*255.*\[0, 1\]"),
        (broken(256, np.int32), r"image 5 .*256.*\[0, 255\]"),
        (broken(-1, np.int16), r"image 5 .*-1"),
        (broken(1, np.bool_), "image 0 holds bool"),
        ([np.zeros((4, 4)), np.zeros((4, 5))], r"image 0 has shape \(4, 4\), image 1 has \(4, 5\)"),
        ([np.zeros((4, 4)), np.zeros((4, 4), np.float32)], "image 1 holds float32"),
        (np.zeros((2, 4, 4, 2)), r"\(4, 4, 2\).*1 or 3 channels"),
        (np.array([["a"], ["b"]]), "image 0 holds <U1"),
        ([], "no images"),
    ],
)
def test_d3_bad_image_arrays_are_refused_by_index(images: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        image_array(images)  # type: ignore[arg-type]
