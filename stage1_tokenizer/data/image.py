"""One image: what is refused, what is converted, and the decoding to a uint8 array.

Accepted: grey and colour with 8 bits a channel, in the formats of FORMATS, none of which starts another program (for EPS, PIL runs
Ghostscript). Converted: palettes, transparency (laid on
white), bilevel, EXIF rotation. Refused: 16-bit and floating-point grey, CMYK and other colour spaces, animations,
images above MAX_PIXELS (a file of half a megabyte can hold a gigabyte) or below MIN_SIDE. What ``transform.too_large`` refuses, long
strips that a resize would enlarge to as much, is found by the headers, too.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stage1_tokenizer.data.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 80_000_000
MIN_SIDE = 4
GREY = {"1", "L", "LA", "La"}
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}
FORMATS = {"AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI"}
FORMATS |= {"TGA", "TIFF", "WEBP"}
FORMATS |= {"HEIF", "JXL"}  # by packages that add them to PIL
EXIF_ORIENTATION = 0x0112


class ImageError(DataError):
    """An image that cannot be used; the message is the reason alone, the caller names the file."""


@dataclass(frozen=True)
class Header:
    """Of an image after EXIF rotation; channels are 1 or 3."""

    height: int
    width: int
    channels: int


@cache
def _refuse_bombs() -> None:
    """PIL warns of huge images, and goes on; here its warning is an error."""
    import PIL.Image

    warnings.filterwarnings("error", category=PIL.Image.DecompressionBombWarning)


def open_image(data: str | bytes | Image) -> tuple[Image, Header, int]:
    """The image, not yet decoded, its header and its EXIF orientation (1 to 8). Raises ImageError with the reason."""
    import PIL.Image

    _refuse_bombs()
    try:
        if isinstance(data, PIL.Image.Image):
            image = data
        else:
            image = PIL.Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except Exception as error:  # PIL's readers raise many kinds for damaged files
        raise ImageError(_reason(error, data)) from error
    try:
        width, height = image.size
        if image.format == "TIFF":  # of which some versions of PIL report the size as turned already
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        _check(image, width, height)
        turn = _orientation(image)
    except ImageError:
        image.close()
        raise
    except Exception as error:  # as above
        image.close()
        raise ImageError(_reason(error, data)) from error
    if turn >= 5:
        height, width = width, height
    return image, Header(height, width, 1 if image.mode in GREY else 3), turn


def read_header(data: str | bytes | Image) -> Header:
    """Reads no more than the header. Raises ImageError with the reason."""
    image, header, _ = open_image(data)
    if image is not data:
        image.close()
    return header


def _check(image: Image, width: int, height: int) -> None:
    if image.format not in FORMATS | {None}:  # None: made in memory
        raise ImageError(f"format {image.format}; expected one of {', '.join(sorted(FORMATS))}")
    if height * width > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels; at most {MAX_PIXELS} are decoded")
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{width}x{height} pixels; each side needs at least {MIN_SIDE}")
    if image.mode not in GREY | COLOUR:
        raise ImageError(f"mode {image.mode}; expected grey or colour with 8 bits a channel (L, LA, P, RGB, RGBA)")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a preview beside it
        raise ImageError(f"{getattr(image, 'n_frames', 'several')} frames; expected a still image")


def _orientation(image: Image) -> int:
    """Read from the header alone: PIL would decode a PNG to look for a late chunk."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _reason(error: Exception, data: Any) -> str:
    import PIL

    if isinstance(error, PIL.UnidentifiedImageError):
        head = data[:64] if isinstance(data, bytes) else _head(data)
        if not head:
            return "the file is empty"
        if head.startswith(b"version https://git-lfs"):
            return "a git-lfs pointer, not the image itself (git lfs pull fetches it)"
        if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "an HTML page, not an image"
        return f"not an image that PIL reads (it starts with {head[:8].hex()})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _head(path: Any) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def decode(data: str | bytes | Image, scaled: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray[Any, Any]:
    """(C, h, w) uint8: turned upright, on white, with ``channels``, resized to ``scaled`` (h, w) by an antialiased Lanczos filter.

    Raises ImageError with the reason.
    """
    import PIL.Image

    image, header, turn = open_image(data)
    try:
        if scaled is not None and image.format in ("JPEG", "MPO"):
            h, w = (scaled[1], scaled[0]) if turn >= 5 else scaled
            image.draft(None, (2 * w, 2 * h))  # decodes fewer DCT coefficients where at least twice the size is left
        image.load()
        turned = image.format == "TIFF"  # PIL has turned it in load
        image = _flat(image, "L" if (channels or header.channels) == 1 else "RGB")
        if turn > 1 and not turned:
            image = image.transpose(_TURNS[turn])
        if scaled is not None and image.size != (scaled[1], scaled[0]):
            image = image.resize((scaled[1], scaled[0]), PIL.Image.Resampling.LANCZOS)
        array = np.asarray(image)
    except Exception as error:  # as above
        raise ImageError(_reason(error, data)) from error
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _flat(image: Image, mode: str) -> Image:
    """The image in ``mode`` (L or RGB), what is transparent laid on white."""
    import PIL.Image

    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode[:-1] + "A")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", over.size, "white"), over)
    return image if image.mode == mode else image.convert(mode)


# What undoes each EXIF orientation: PIL.Image.Transpose by number (0 and 1 mirror, 2 to 4 rotate, 5 transpose, 6 transverse).
_TURNS: dict[int, Any] = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
