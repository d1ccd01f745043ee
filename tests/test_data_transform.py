"""Augmentation is a function of (seed, epoch or view, index), and cuts the same pixels as a plain loop would."""

from __future__ import annotations

import pytest
import torch

from intarsia.config import ConfigError
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import DataError
from stage1_tokenizer.data.transform import TransformConfig, cut, windows


def images(n: int = 50, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ALL = TransformConfig(size=(6, 5), resize="none", crop="random", flip=True, shift=2)


@pytest.mark.parametrize("axes", [(11,), (9, 7), (4, 6, 5)])
def test_a_cut_takes_the_pixels_that_a_loop_takes(axes: tuple[int, ...]) -> None:
    x = torch.arange(6 * 2 * torch.tensor(axes).prod()).view(6, 2, *axes)
    rows, out = torch.tensor([5, 0, 3, 3]), tuple(n - 2 for n in axes)
    config = TransformConfig(size=4, resize="none", crop="random", flip=True, shift=1)
    places = windows(config, torch.tensor(axes).expand(4, -1), out, rows, epochs=torch.arange(4))
    found = cut(x, rows, places)
    for b, row in enumerate(rows.tolist()):
        one = x[row]
        for axis, place in enumerate(places):
            one = torch.stack([one.select(axis + 1, int(i)) for i in place[b]], axis + 1)
        assert torch.equal(found[b], one)


@pytest.mark.parametrize("given", [{"size": None}, {"size": None, "resize": "none"}, {"size": 8, "resize": "exact", "margin": 2}])
def test_a_random_crop_of_nothing_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="crop: random, but size .* leaves nothing to crop away"):
        TransformConfig(crop="random", **given)


def test_windows_stay_inside_and_reach_every_offset() -> None:
    n, sizes = 4000, torch.tensor([9, 7])
    (rows, columns) = windows(ALL, sizes.expand(n, -1), (6, 5), torch.arange(n), epochs=3)
    assert rows.min() == 0 and rows.max() == 8 and columns.min() == 0 and columns.max() == 6
    crop_only = ALL.replace(shift=0, flip=False)
    (rows, columns) = windows(crop_only, sizes.expand(n, -1), (6, 5), torch.arange(n), epochs=3)
    for start, offsets in ((rows[:, 0], 4), (columns[:, 0], 3)):
        counts = torch.bincount(start, minlength=offsets)
        assert len(counts) == offsets
        assert ((counts - n / offsets).square() / (n / offsets)).sum() < 20  # chi-square, 3 degrees of freedom


def test_a_shift_moves_by_at_most_its_size_and_repeats_the_border() -> None:
    x = images(300, 1, 8, 8)
    split = ArraySplit(x, transform=TransformConfig(shift=2))
    out = split.batch(torch.arange(300), epochs=0)["x"]
    padded = torch.nn.functional.pad(x.float() / 127.5 - 1, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for i in range(300):
        moves = [(a, b) for a in range(5) for b in range(5) if torch.allclose(out[i], padded[i, :, a : a + 8, b : b + 8])]
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) == 25


def test_half_of_the_flips_mirror_and_nothing_else_happens() -> None:
    x = images(400)
    out = ArraySplit(x, transform=TransformConfig(flip=True)).batch(torch.arange(400), epochs=0)["x"]
    plain = ArraySplit(x).batch(torch.arange(400))["x"]
    mirrored = (out == plain.flip(-1)).flatten(1).all(1)
    assert ((out == plain).flatten(1).all(1) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_draws_do_not_depend_on_the_batch() -> None:
    split = ArraySplit(images(), transform=ALL)
    epochs = torch.arange(50) % 3
    whole = split.batch(torch.arange(50), epochs, seed=4)["x"]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    parts = [split.batch(rows, epochs[rows], seed=4)["x"] for rows in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_epoch_seed_and_view_each_change_the_draws() -> None:
    split, rows = ArraySplit(images(), transform=ALL), torch.arange(50)
    variants = [
        split.batch(rows, 0)["x"],
        split.batch(rows, 1)["x"],
        split.batch(rows, 0, seed=1)["x"],
        split.batch(rows, view=1)["x"],
        split.batch(rows, view=2)["x"],
    ]
    for i, a in enumerate(variants):
        for b in variants[i + 1 :]:
            assert (a != b).flatten(1).any(1).sum() > 25
    assert torch.equal(split.batch(rows, 1)["x"], split.batch(rows, torch.ones(50, dtype=torch.int64))["x"])


def test_without_epoch_and_view_it_is_the_centre() -> None:
    x = images()
    for config in (ALL, ALL.replace(crop="center"), TransformConfig(size=(6, 5), resize="none")):
        out = ArraySplit(x, transform=config).batch(torch.arange(50))["x"]
        assert torch.equal(out, ArraySplit(x[:, :, 1:7, 1:6]).batch(torch.arange(50))["x"])


@pytest.mark.parametrize(
    ("config", "image", "scaled"),
    [
        ({"size": 8}, (16, 16), (8, 8)),
        ({"size": 8}, (30, 20), (12, 8)),
        ({"size": 8, "margin": 2}, (30, 20), (15, 10)),
        ({"size": (8, 4)}, (16, 16), (8, 8)),
        ({"size": (8, 4), "resize": "exact"}, (16, 16), (8, 4)),
        ({"size": (8, 4), "resize": "none"}, (16, 16), (16, 16)),
        ({}, (5, 7), (5, 7)),
        ({"size": 33}, (1000, 999), (33, 33)),
    ],
)
def test_an_image_is_scaled_to_cover_the_size(config: dict[str, object], image: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert TransformConfig(**config).scaled(*image) == scaled  # type: ignore[arg-type]


def test_a_scaled_image_is_never_smaller_than_the_size() -> None:
    for height in range(4, 60):
        for width in range(4, 60, 5):
            scaled = TransformConfig(size=(17, 13)).scaled(height, width)
            assert scaled[0] >= 17 and scaled[1] >= 13 and (scaled[0] == 17 or scaled[1] == 13)


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"size": 0}, "size"),
        ({"size": "32"}, "size"),
        ({"size": [32, 32, 32]}, "size"),
        ({"size": 32.0}, "size"),
        ({"size": True}, "size"),
        ({"size": 1 << 20}, "size"),
        ({"margin": -1}, "margin"),
        ({"margin": 2}, "margin"),
        ({"margin": 2, "size": 8, "resize": "exact"}, "margin"),
        ({"margin": 9, "size": 8}, "margin: 9 with size 8; expected at most 8"),
        ({"margin": 5, "size": [8, 4]}, "margin: 5 with size (8, 4); expected at most 4"),
        ({"shift": -1}, "shift"),
        ({"shift": 8, "size": 8}, "shift: 8 with size 8; expected less than 8"),
        ({"shift": 4, "size": [8, 4]}, "shift: 4 with size (8, 4); expected less than 4"),
        ({"channels": 2}, "channels"),
        ({"crop": "middle"}, "crop"),
        ({"flp": True}, "flp"),
    ],
)
def test_impossible_transforms_are_refused_by_name(tree: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as error:
        TransformConfig.from_dict(tree)
    assert str(error.value).startswith(path) and len(error.value.errors) == 1


def test_a_size_beyond_the_images_needs_a_resize() -> None:
    with pytest.raises(DataError, match=r"transform\.size.*\(9, 9\).*\(9, 7\)"):
        ArraySplit(images(), transform=TransformConfig(size=9, resize="none"))


@pytest.mark.parametrize("axes", [(9, 7), (40, 7, 8)])
def test_a_shift_that_leaves_nothing_of_a_signal_is_refused_where_no_size_says_so(axes: tuple[int, ...]) -> None:
    x = torch.zeros(2, 1, *axes, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"data\.transform\.shift: 7; expected less than 7"):
        ArraySplit(x, transform=TransformConfig(shift=7))
    assert len(ArraySplit(x, transform=TransformConfig(shift=6))) == 2


@pytest.mark.parametrize(
    ("config", "image", "reason"),
    [
        ({"size": 64}, (4, 5_000_000), "5000000x4 becomes 80000000x64 for the size 64x64; at most 20000000 pixels"),
        ({"size": 256}, (4000, 4), "4x4000 becomes 256x256000 for the size 256x256; at most 16777216 pixels"),
        ({"size": 256}, (4, 256), ""),
        ({"size": 1 << 14}, (64, 64), ""),  # what was asked for
        ({"size": 4096, "margin": 4096}, (64, 64), ""),
        ({"size": 4000}, (4000, 20_000), ""),  # no more than was decoded
        ({"size": 64, "resize": "none"}, (64, 1_000_000), ""),
        ({"size": 64, "resize": "exact"}, (4, 5_000_000), ""),
        ({}, (8000, 10_000), ""),
    ],
)
def test_a_strip_that_would_become_gigabytes_is_refused(config: dict[str, object], image: tuple[int, int], reason: str) -> None:
    assert TransformConfig(**config).too_large(*image) == reason  # type: ignore[arg-type]


def test_an_array_of_strips_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.transform\.size: 4000x4 becomes 256000x256"):
        ArraySplit(torch.zeros(1, 1, 4, 4000, dtype=torch.uint8), transform=TransformConfig(size=256))
