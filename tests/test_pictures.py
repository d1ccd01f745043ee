"""Pictures hold the pixels that they should, where they should, and are written whole."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.pictures import GAP, MARGIN, mosaic, save_codebook, save_curves, save_grid, save_strips, to_uint8


def pixels(image):
    return np.asarray(image)


def tiles(n, channels=1, size=4):
    """Tiles of one colour each."""
    return (torch.arange(n).float() / n).view(n, 1, 1, 1).expand(n, channels, size, size).contiguous()


def has(page, color):
    return (pixels(page) == np.array(color)).all(-1)


def test_a_mosaic_places_every_tile_and_keeps_its_pixels():
    x = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    sheet = pixels(mosaic(x, 2, scale=3, gap=2))
    assert sheet.shape == (3 * 12 + 2 * 2, 2 * 18 + 2, 3)
    for i, tile in enumerate(to_uint8(x)):
        top, left = i // 2 * 14, i % 2 * 20
        assert (sheet[top : top + 12 : 3, left : left + 18 : 3] == tile).all()
        assert (sheet[top + 2 : top + 12 : 3, left + 2 : left + 18 : 3] == tile).all()
    assert (sheet[12:14] == 255).all() and (sheet[28:, 20:] == 255).all()


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_kept():
    assert mosaic(tiles(1, size=28), 1).size == (56, 56)
    assert mosaic(tiles(1, size=32), 1).size == (64, 64)
    assert mosaic(tiles(1, size=100), 1).size == (100, 100)


def test_values_outside_the_range_are_clamped_and_other_shapes_refused():
    assert to_uint8(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1))[:, 0, 0, 0].tolist() == [0, 128, 255]
    for wrong in (torch.rand(2, 2, 4, 4), torch.rand(3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected floating point"):
            to_uint8(wrong)


def test_a_grid_has_margins_labels_and_all_its_tiles(tmp_path):
    x = torch.zeros(6, 3, 8, 8)
    x[:, 0] = 1  # red, which no text is
    save_grid(tmp_path / "new" / "grid.png", x, columns=3, row_labels=("bag", "coat"), title="Samples", note="seed 0")
    page = Image.open(tmp_path / "new" / "grid.png")
    red = has(page, (255, 0, 0))
    assert red.sum() == 6 * 56 * 56
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert columns[-1] == page.width - MARGIN - 1 and columns[-1] - columns[0] + 1 == 3 * 56 + 2 * GAP
    dark = pixels(page).sum(-1) < 300
    assert dark[: rows[0]].any() and dark[rows[0] : rows[-1], : columns[0] - 2].any() and dark[rows[-1] + 2 :].sum() == 0
    assert (pixels(page)[rows[-1] + 2 :] < 200).any()  # the note, in grey
    assert not dark[:, -MARGIN:].any() and not dark[:MARGIN].any()
    with pytest.raises(ValueError, match="row_labels: 1 for 2 rows"):
        save_grid(tmp_path / "grid.png", x, columns=3, row_labels=("bag",))
    save_grid(tmp_path / "plain.png", x)
    assert Image.open(tmp_path / "plain.png").size == (3 * 56 + 2 * GAP + 2 * MARGIN, 2 * 56 + GAP + 2 * MARGIN)


def test_strips_put_what_belongs_together_below_each_other(tmp_path):
    originals, others = torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 8, 8)
    originals[:, 0] = torch.linspace(0.2, 1, 5).view(-1, 1, 1)
    others[:, 1] = torch.linspace(0.2, 1, 5).view(-1, 1, 1)
    save_strips(tmp_path / "strips.png", {"original": originals, "reconstruction": others}, columns=3)
    page = pixels(Image.open(tmp_path / "strips.png"))
    for i in range(5):
        value = round(51 * (i + 1))
        a, b = (np.argwhere((page == np.array(color)).all(-1)) for color in ((value, 0, 0), (0, value, 0)))
        assert len(a) == len(b) == 56 * 56
        assert (b[0] - a[0]).tolist() == [56 + GAP, 0]
    with pytest.raises(ValueError, match="all of one shape"):
        save_strips(tmp_path / "x.png", {"a": originals, "b": others[:4]})


def test_curves_show_each_figure_of_each_run_and_refuse_an_empty_file(tmp_path):
    lines = [{"step": i, "loss": 1 / i, "lr": 0.1, "bad": None, "flag": True} for i in range(1, 9)]
    lines += [{"step": 4, "validation/loss": 0.3}, {"step": 8, "validation/loss": 0.2}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_curves(tmp_path / "one.png", {"Tokenizer": path})
    save_curves(tmp_path / "two.png", {"Tokenizer": path, "Prior": path})
    one, two = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "two.png")
    assert two.size == (one.width, 2 * one.height) and one.width > 2 * 350
    blue, orange = ((np.abs(pixels(one).astype(int) - np.array(c)).sum(-1) < 30).sum() for c in ((59, 111, 182), (217, 119, 43)))
    assert blue > 300 and orange > 50
    (tmp_path / "empty.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="holds no figures"):
        save_curves(tmp_path / "x.png", {"Prior": tmp_path / "empty.jsonl"})
    with pytest.raises(ValueError, match="none given"):
        save_curves(tmp_path / "x.png", {})


def test_a_codebook_draws_usage_and_every_code_of_every_level(tmp_path):
    counts = torch.tensor([5, 0, 3, 1])
    drawn = torch.zeros(4, 3, 8, 8)
    drawn[:, 0] = 1
    save_codebook(tmp_path / "codebook.png", [("top", counts, drawn), ("bottom", counts, None)], title="Codebook")
    page = Image.open(tmp_path / "codebook.png")
    scale = 960 // 3 // 8
    assert has(page, (255, 0, 0)).sum() == 4 * (8 * scale) ** 2
    assert page.height > 2 * 230 + 16 * scale
    with pytest.raises(ValueError, match="level 'top': 5; expected 1 to 4"):
        save_codebook(tmp_path / "x.png", [("top", counts, torch.zeros(5, 1, 8, 8))])
    with pytest.raises(ValueError, match="no codes were given"):
        save_codebook(tmp_path / "x.png", [("top", counts * 0, None)])


def test_pyplot_and_its_global_backend_are_never_touched(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    save_codebook(tmp_path / "codebook.png", [("codes", torch.tensor([1, 2]), None)])
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_an_unwritable_picture_leaves_nothing_torn(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    save_grid(tmp_path / "grid.png", tiles(4))
    before = (tmp_path / "grid.png").read_bytes()
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"grid.png: No space left on device.* are free"):
        save_grid(tmp_path / "grid.png", tiles(9))
    assert (tmp_path / "grid.png").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["grid.png"]
