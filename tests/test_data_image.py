"""One image to one array: conversions against PIL itself, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data.image import ImageError, decode, read_header


def noise(height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return x[:, :, 0] if channels == 1 else x


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_come_back_as_they_were(kind: str, channels: int, tmp_path: Path) -> None:
    x = noise(channels=channels)
    data = packed(Image.fromarray(x), kind)
    (tmp_path / "x").write_bytes(data)
    for source in (data, str(tmp_path / "x"), Image.fromarray(x)):
        header = read_header(source)
        assert (header.height, header.width, header.channels) == (12, 10, channels)
        out = decode(source)
        assert out.shape == (channels, 12, 10) and out.dtype == np.uint8
        assert np.array_equal(out, x[None] if channels == 1 else x.transpose(2, 0, 1))


def test_channels_are_converted_as_asked() -> None:
    colour, grey = Image.fromarray(noise()), Image.fromarray(noise(channels=1))
    assert np.array_equal(decode(packed(colour), channels=1)[0], np.asarray(colour.convert("L")))
    assert np.array_equal(decode(packed(grey), channels=3), np.repeat(noise(channels=1)[None], 3, 0))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_is_laid_on_white(mode: str) -> None:
    alpha = np.zeros((12, 10), np.uint8)
    alpha[:, 5:] = 255
    alpha[0, 5] = 128
    image = Image.fromarray(noise()).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    out = decode(packed(image)).transpose(1, 2, 0).astype(float)
    flat = np.asarray(image).astype(float)[:, :, :-1]
    assert (out[:, :5] == 255).all() and np.array_equal(out[1:, 5:], flat[1:, 5:])
    assert np.abs(out[0, 5] - (flat[0, 5] * 128 + 255 * 127) / 255).max() <= 1


def test_a_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.fromarray(noise()).quantize(8)
    index = int(np.asarray(image)[3, 3])
    clear = np.asarray(image) == index
    out = decode(packed(image, transparency=index))
    assert (out[:, clear] == 255).all() and np.array_equal(out[:, ~clear], np.asarray(image.convert("RGB"))[~clear].T)
    assert np.array_equal(decode(image.convert("PA")).transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_grey_with_a_transparent_level_stays_grey() -> None:
    x = noise(channels=1)
    x[2, 2] = x[3, 3] = 77
    out = decode(packed(Image.fromarray(x), transparency=77))
    assert out.shape[0] == 1 and (out[0][x == 77] == 255).all() and np.array_equal(out[0][x != 77], x[x != 77])


def test_bilevel_becomes_black_and_white() -> None:
    x = noise(channels=1) > 127
    assert np.array_equal(decode(packed(Image.fromarray(x)))[0], x * np.uint8(255))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_undone(turn: int, kind: str) -> None:
    from PIL import ImageOps

    image = Image.fromarray(noise())
    exif = Image.Exif()
    exif[0x0112] = turn
    data = packed(image, kind, exif=exif)
    oracle = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    out = decode(data)
    assert np.array_equal(out.transpose(1, 2, 0), np.asarray(oracle))
    header = read_header(data)
    assert (header.height, header.width) == out.shape[1:] == ((10, 12) if turn >= 5 else (12, 10))
    assert decode(data, (6, 5)).shape == (3, 6, 5)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_undone_once_where_the_mode_changes_too(turn: int, kind: str) -> None:
    grey = noise(channels=1)
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = decode(packed(Image.fromarray(grey), kind, exif=exif))
    assert np.array_equal(decode(packed(Image.fromarray(grey), kind, exif=exif), channels=3), np.repeat(upright, 3, 0))
    opaque = Image.fromarray(grey).convert("RGBA")
    assert np.array_equal(decode(packed(opaque, kind, exif=exif)), np.repeat(upright, 3, 0))


def test_resizing_is_pils_lanczos() -> None:
    image = Image.fromarray(noise(60, 90))
    oracle = np.asarray(image.resize((9, 6), Image.Resampling.LANCZOS))
    assert np.array_equal(decode(packed(image), (6, 9)).transpose(1, 2, 0), oracle)


def test_a_jpeg_decoded_at_a_fraction_looks_as_one_decoded_whole() -> None:
    smooth = Image.fromarray(noise(8, 8)).resize((512, 512), Image.Resampling.BICUBIC)
    data = packed(smooth, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(decode(data, (64, 64)).transpose(1, 2, 0) - whole).mean() < 1


def test_a_photo_with_a_preview_beside_it_is_one_image() -> None:
    first, preview = Image.fromarray(noise(24, 16)), Image.fromarray(noise(8, 8))
    data = packed(first, "MPO", save_all=True, append_images=[preview])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert decode(data).shape == (3, 24, 16)


def test_a_format_for_which_pil_runs_another_program_is_refused_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="format EPS; expected one of AVIF, BMP"):
        decode(str(path))
    with pytest.raises(ImageError, match="format EPS"):
        decode(Image.open(path))


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")]
)
def test_other_modes_are_refused_by_name(mode: str, kind: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode}"):
        decode(packed(Image.new(mode, (8, 8)), kind))
