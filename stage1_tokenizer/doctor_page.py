"""doctor.png: where the bits of each level lie, rate against distortion, and what to change."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from intarsia.files import write_atomic
from stage1_tokenizer.checkup import Checkup

PANEL = 3.4  # inches
INK, FAINT, BLUE, ORANGE = "#222222", "#777777", "#3b6fb6", "#d9772b"


def save_page(path: Path, checkup: Checkup, shapes: Sequence[tuple[int, ...]]) -> None:
    """Draws a checkup; ``shapes`` are the grids of its levels. Matplotlib draws without a display or a global backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(checkup.levels)
    columns = max(3, count)
    figure = Figure(figsize=(PANEL * columns, 2.2 * PANEL + 0.3 * len(checkup.findings)), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, columns, height_ratios=(1, 1, 0.2 + 0.1 * len(checkup.findings)))
    for i, (facts, bits, shape) in enumerate(zip(checkup.levels, checkup.position_bits, shapes, strict=True)):
        axes = figure.add_subplot(grid[0, i])
        _positions(axes, bits, shape)
        used = f"{facts.used} of {facts.in_use} used, perplexity {facts.perplexity:.0f}"
        axes.set_title(f"{facts.name}: bits by position\n{used}", fontsize=9, loc="left")
    _curve(figure.add_subplot(grid[1, : columns // 2 + 1]), checkup.curve)
    _gradients(figure.add_subplot(grid[1, columns // 2 + 1 :]), checkup.gradients)
    _advice(figure.add_subplot(grid[2, :]), checkup)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _positions(axes: Any, bits: Tensor, shape: tuple[int, ...]) -> None:
    """The entropy of each position; of three axes the first ones below each other."""
    if len(shape) == 1:
        axes.plot(bits.numpy(), color=BLUE)
        axes.set_ylim(bottom=0)
        return
    image = axes.imshow(bits.view(-1, shape[-1]).numpy(), cmap="viridis", vmin=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _curve(axes: Any, rows: Sequence[dict[str, float | str]]) -> None:
    """Each way to fewer bits is a line that ends in all codes."""
    whole = rows[0]
    ways: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        name = str(row["kind"]).partition(",")[0].partition(":")[0]
        ways.setdefault("leading levels alone" if name == "levels 0" else f"{name}, fewer codes", []).append(
            (float(row["bits"]), float(row["psnr"]))
        )
    end = (float(whole["bits"]), float(whole["psnr"]))
    for i, (name, points) in enumerate(ways.items()):
        bits, quality = zip(*sorted([*points, end]), strict=True)
        axes.plot(bits, quality, marker="o", markersize=3, linewidth=1.2, color=f"C{i}", label=name)
    axes.plot(*end, marker="o", color=ORANGE, label="all codes", linestyle="none")
    axes.set_xlabel("bits per sample (entropy of the codes)", fontsize=8)
    axes.set_ylabel("PSNR, dB", fontsize=8)
    axes.set_title("rate against distortion", fontsize=9, loc="left")
    axes.grid(True, color="#e6e6e6")
    axes.legend(fontsize=7, frameon=False)


def _gradients(axes: Any, gradients: dict[str, dict[str, float]]) -> None:
    kinds = ("task", "quantiser", "codebook")
    for i, (name, norms) in enumerate(gradients.items()):
        axes.bar([k + 0.8 * i / len(gradients) for k in range(3)], [norms[kind] for kind in kinds], width=0.7 / len(gradients), label=name)
    axes.set_xticks(
        [k + 0.4 * (1 - 1 / max(1, len(gradients))) for k in range(3)],
        ["task,\nat the latents", "quantiser,\nat the latents", "codebook"],
        fontsize=8,
    )
    axes.set_title("norms of gradients", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)


def _advice(axes: Any, checkup: Checkup) -> None:
    axes.set_axis_off()
    lines: list[str] = []
    for finding in checkup.findings:
        lines += textwrap.wrap(finding.what, 120) + textwrap.wrap(
            f"try: {finding.try_}", 120, initial_indent="    ", subsequent_indent="    "
        )
    axes.text(
        0,
        1,
        "\n".join(["What to change", "", *lines] if lines else ["Nothing to change"]),
        va="top",
        fontsize=9,
        color=INK,
        transform=axes.transAxes,
    )
