"""Pictures of what a model does: grids of samples, originals beside reconstructions, training curves, codebooks.

Images come as float (n, C, H, W) in [0, 1] with 1 or 3 channels. Tiles are enlarged by whole factors only, so that a pixel
stays a pixel. Every function writes one PNG, whole or not at all. Pillow and matplotlib are imported when they are needed,
and matplotlib draws without a display or a global backend.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intarsia.files import write_atomic
from intarsia.metrics_log import read_metrics

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

TILE = 56  # pixels that a tile should have at least, where small images are enlarged
GAP, MARGIN = 3, 16
INK, FAINT = (34, 34, 34), (110, 110, 110)
BLUE, ORANGE = "#3b6fb6", "#d9772b"
TITLE, TEXT = 17, 13


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and is its own font, so that drawings and charts match."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def to_uint8(images: Tensor) -> np.ndarray[Any, Any]:
    """(n, C, H, W) in [0, 1] to (n, H, W, 3) uint8, clamped and rounded. Raises ValueError for another shape."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(f"images: {images.dtype} of shape {tuple(images.shape)}; expected floating point (n, 1 or 3, height, width)")
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def mosaic(images: Tensor, columns: int, *, scale: int | None = None, gap: int = GAP) -> Image:
    """The tiles in rows of ``columns`` on white, each enlarged ``scale`` times (default: to at least 56 pixels)."""
    from PIL import Image

    tiles = to_uint8(images)
    n, height, width, _ = tiles.shape
    if n < 1 or columns < 1:
        raise ValueError(f"images: {n} tiles in {columns} columns; both must be positive")
    scale = scale or max(1, math.ceil(TILE / max(height, width)))
    tiles = tiles.repeat(scale, 1).repeat(scale, 2)
    height, width = height * scale, width * scale
    sheet = np.full((math.ceil(n / columns) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet)


def _page(blocks: Sequence[Image], labels: Sequence[Sequence[str]], title: str, note: str = "", space: int = MARGIN) -> Image:
    """``blocks`` one below the other; ``labels``: for each, the texts beside its rows, equally spaced; title above, note below."""
    from PIL import Image, ImageDraw

    text, heading = _font(TEXT), _font(TITLE)
    indent = max((math.ceil(text.getlength(word)) for row in labels for word in row), default=0)
    left = MARGIN + (indent + 10 if indent else 0)
    top = MARGIN + (TITLE + 14 if title else 0)
    wide = max([left + max(b.width for b in blocks), *(MARGIN + math.ceil(f.getlength(t)) for f, t in ((heading, title), (text, note)))])
    tall = top + sum(b.height for b in blocks) + space * (len(blocks) - 1) + (TEXT + 12 if note else 0)
    page = Image.new("RGB", (wide + MARGIN, tall + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, heading)
    for block, words in zip(blocks, labels, strict=True):
        page.paste(block, (left, top))
        for i, word in enumerate(words):
            draw.text((left - 10, top + (i + 0.5) * block.height / len(words)), word, INK, text, anchor="rm")
        top += block.height + space
    if note:
        draw.text((MARGIN, tall - TEXT), note, FAINT, text)
    return page


def _stacked(pages: Sequence[Image]) -> Image:
    from PIL import Image

    sheet = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), "white")
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def _save(page: Image, path: str | Path) -> None:
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), buffer.getvalue())


def save_grid(
    path: str | Path,
    images: Tensor,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    title: str = "",
    note: str = "",
    scale: int | None = None,
) -> None:
    """Images in a grid, nearly square unless ``columns`` says otherwise.

    Args:
        row_labels: one text per row, such as the classes of a picture with a row per class; or none.
    """
    n = images.shape[0]
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / max(1, columns))
    if len(row_labels) not in (0, rows):
        raise ValueError(f"row_labels: {len(row_labels)} for {rows} rows")
    _save(_page([mosaic(images, columns, scale=scale)], [row_labels], title, note), path)


def save_strips(
    path: str | Path,
    rows: Mapping[str, Tensor],
    *,
    columns: int = 16,
    title: str = "",
    note: str = "",
    scale: int | None = None,
) -> None:
    """Corresponding images below each other, as originals over reconstructions or samples over their nearest neighbours.

    Args:
        rows: text -> images (n, C, H, W) of one shape; column i of every row belongs together. Wrapped after ``columns``.
    """
    counts = {name: tuple(images.shape) for name, images in rows.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"rows: shapes {counts}; expected at least one row, all of one shape")
    n = next(iter(counts.values()))[0]
    blocks = [
        mosaic(torch.cat([images[start : start + columns].float().cpu() for images in rows.values()]), min(columns, n - start), scale=scale)
        for start in range(0, n, columns)
    ]
    _save(_page(blocks, [list(rows)] * len(blocks), title, note), path)


def _chart(width: float, height: float) -> tuple[Any, Any]:
    """A figure of that many pixels and its canvas, apart from pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained", facecolor="white")
    return figure, FigureCanvasAgg(figure)


def _drawn(canvas: Any) -> Image:
    from PIL import Image

    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#222222")
    axes.tick_params(which="both", labelsize=8, length=3, color="#999999", labelcolor="#444444")
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """figure -> kind ("training" or "validation") -> (steps, values), of the numbers in the lines of a metrics.jsonl."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for line in lines:
        for key, value in line.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            head, _, tail = key.partition("/")
            kind, name = ("validation", tail) if head == "validation" and tail else ("training", key.removeprefix("train/"))
            steps, values = found.setdefault(name, {}).setdefault(kind, ([], []))
            steps.append(line["step"])
            values.append(value)
    return found


class NoFiguresError(ValueError):
    """A metrics.jsonl in which nothing was logged yet."""


def _curves(metrics: Path, limit: int) -> Image:
    """One panel per figure of a metrics.jsonl."""
    found = _series(read_metrics(metrics))
    if not found:
        raise NoFiguresError(f"{metrics}: holds no figures to draw")
    names = sorted(found, key=lambda name: ("validation" not in found[name], not name.startswith("health/")))[:limit]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, canvas = _chart(380 * columns, 240 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, axes in zip(names, panels, strict=False):
        _tidy(axes, name)
        for kind, color, marker in (("training", BLUE, None), ("validation", ORANGE, "o")):
            if kind in found[name]:
                axes.plot(*found[name][kind], color=color, label=kind, linewidth=1.3, marker=marker, markersize=3)
        if len(found[name]) > 1:
            axes.legend(fontsize=8, frameon=False)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return _drawn(canvas)


def save_curves(path: str | Path, runs: Mapping[str, str | Path], *, limit: int = 18) -> None:
    """Each figure of each run over the steps, training and validation (``validation/NAME``) in one panel.

    Figures with a validation come first, then the health of the codes, then the rest in their order, ``limit`` panels per run. Raises
    NoFiguresError for a file without figures.

    Args:
        runs: heading -> metrics.jsonl.
    """
    if not runs:
        raise ValueError("runs: none given")
    pages = [_page([_curves(Path(metrics), limit)], [()], heading) for heading, metrics in runs.items()]
    _save(_stacked(pages), path)


def _histogram(counts: Tensor, name: str, width: int) -> Image:
    """Frequencies of the codes of one level, in falling order, with the uniform line."""
    shares = (counts.double() / counts.sum()).sort(descending=True).values.cpu().numpy()
    figure, canvas = _chart(width, 230)
    axes = figure.add_subplot()
    used = int((shares > 0).sum())
    nats = -float((shares[:used] * np.log(shares[:used])).sum())
    _tidy(axes, f"{name}: {used} of {len(shares)} codes used, perplexity {math.exp(nats):.0f}")
    axes.fill_between(np.arange(len(shares) + 1), np.append(shares, shares[-1]), step="post", color=BLUE, linewidth=0)
    axes.axhline(1 / len(shares), color=ORANGE, linewidth=1.2, linestyle="--", label="uniform")
    axes.set_xlim(0, len(shares))
    axes.set_yscale("log")  # a background takes most of many data sets, and the rest would lie on the axis
    axes.set_ylim(bottom=min(0.1 / len(shares), 0.5 * shares[used - 1]))
    axes.set_xlabel("codes by frequency", fontsize=8, color="#444444")
    axes.set_ylabel("share", fontsize=8, color="#444444")
    axes.legend(fontsize=8, frameon=False)
    return _drawn(canvas)


def save_codebook(path: str | Path, levels: Sequence[tuple[str, Tensor, Tensor | None]], *, title: str = "", note: str = "") -> None:
    """For each level a histogram of the usage and its codes as the decoder draws them, both by falling frequency.

    Args:
        levels: (name, counts (vocab,), tiles (m, C, h, w) in [0, 1] of the m most frequent codes in that order, or None where codes
            have no picture).
    """
    blocks: list[Image] = []
    for name, counts, tiles in levels:
        if int(counts.sum()) == 0:
            raise ValueError(f"counts of level {name!r}: no codes were given")
        drawn = None
        if tiles is not None:
            if not 0 < tiles.shape[0] <= counts.shape[0]:
                raise ValueError(f"tiles of level {name!r}: {tiles.shape[0]}; expected 1 to {counts.shape[0]}, at most one per code")
            columns = min(tiles.shape[0], math.ceil(math.sqrt(2 * tiles.shape[0])))
            drawn = mosaic(tiles, columns, scale=max(1, 960 // columns // max(tiles.shape[2:])), gap=1)
        blocks.append(_histogram(counts, name, drawn.width if drawn and drawn.width > 480 else 960))
        blocks += [drawn] if drawn else []
    _save(_page(blocks, [()] * len(blocks), title, note), path)
