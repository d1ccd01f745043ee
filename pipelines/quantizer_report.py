"""The table and the curve of a comparison of quantisers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.files import write_atomic

Result = Mapping[str, Any]
NEAR = 0.2  # of the median rate


def _held(result: Result) -> list[dict[str, Any]]:
    """How the codes of each level are used on what was reconstructed: the last split that was counted."""
    levels = list(result["tokenizer"]["codes"].values())[-1]
    assert isinstance(levels, list)
    return levels


def bits_per_image(result: Result) -> float:
    """Entropy of the codes, each level on its own, as a memoryless coder pays it."""
    return float(sum(level["bits_per_image"] for level in _held(result)))


def _spread(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if len(values) == 1 or f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"


def row(result: Result) -> dict[str, str]:
    """Heading -> text of one quantiser."""
    levels, found = _held(result), result["tokenizer"]["reconstruction"]
    cells = {
        "quantiser": result["name"],
        "PSNR dB": f"{found['psnr']:.2f}",
        "pooled": f"{found['psnr_pooled']:.2f}",
        "SSIM": f"{found['ssim']:.4f}" if "ssim" in found else "",
        "used %": _spread([100 * level["usage"] for level in levels], ".1f"),
        "perplexity": _spread([level["perplexity"] for level in levels], ".0f"),
        "bits per image": f"{bits_per_image(result):.0f}",
        "of at most": f"{sum(level['nominal_bits_per_image'] for level in levels):.0f}",
        "steps": f"{result['steps']:,}",
        "prior: bits per image": "",
        "Frechet distance": "",
        "share of the baseline's": "",
    }
    if "prior" in result:
        total, samples = result["prior"]["bits"]["total"], result["prior"]["samples"]
        distance = samples["frechet"]["samples"]
        cells["prior: bits per image"] = ("<= " if total.get("is_bound") else "") + f"{total['bits_per_image']:.0f}"
        cells["Frechet distance"] = f"{distance['value']:.3f} [{distance['low']:.3f}, {distance['high']:.3f}]"
        cells["share of the baseline's"] = f"{samples['frechet_ratio_to_baseline']['value']:.3f}"
    return cells


def report(results: Sequence[Result]) -> str:
    """A Markdown table, best PSNR first."""
    rows = [row(result) for result in sorted(results, key=lambda r: -r["tokenizer"]["reconstruction"]["psnr"])]
    if not rows:
        return "Nothing is done yet.\n"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def curve(path: Path, results: Sequence[Result]) -> None:
    """PSNR against bits per image; a quantiser whose leading levels decode alone is a line. Beside it those near the median rate, named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    whole, near = figure.subplots(1, 2)
    rates = sorted(bits_per_image(result) for result in results)
    middle = rates[len(rates) // 2] if rates else 0.0
    for i, result in enumerate(results):
        end = (bits_per_image(result), float(result["tokenizer"]["reconstruction"]["psnr"]))
        points = [(float(p["bits_per_image"]), float(p["psnr"])) for p in result["tokenizer"]["prefixes"]]
        style: dict[str, Any] = {"marker": "os^"[i // 10 % 3], "color": f"C{i % 10}", "markersize": 5, "label": result["name"]}
        bits, quality = zip(*[*points, end], strict=True)
        whole.plot(bits, quality, **style)
        if abs(end[0] - middle) <= NEAR * middle:
            near.plot(*end, **style)
            near.annotate(result["name"], end, textcoords="offset points", xytext=(6, 3), fontsize=8)
    whole.set_title("all")
    near.set_title(f"within {NEAR:.0%} of the median rate")
    near.margins(x=0.15)
    for axes in (whole, near):
        axes.set_xlabel("bits per image: entropy of the codes, each level on its own")
        axes.set_ylabel("PSNR, dB (mean per image)")
        axes.grid(True, color="#e6e6e6")
    if results:
        whole.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(path, buffer.getvalue())
