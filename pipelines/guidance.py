"""What guidance buys and costs: ``python -m pipelines.guidance --pipeline DIR --values "[1, 1.5, 2, 3]" --out DIR``.

Label agreement, precision, recall and Frechet distance of samples at each strength of guidance, of the same seed and classes:
guidance.json and a picture of the curves. Each strength is written as it is done; interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from intarsia.cli import UserError, parse, run_main
from intarsia.config import ConfigError, Place
from intarsia.files import EVALUATED, atomic, finite_or_null, json_bytes, read_json, writable_folder, write_atomic
from pipelines.evaluation.bootstrap import LEVEL, Estimate, mean_estimate
from pipelines.evaluation.distances import frechet_table, precision_recall
from pipelines.evaluation.features import FeatureModel, load_features
from pipelines.evaluation.report import describe_pipeline
from pipelines.evaluation.sets import ImageSet
from pipelines.evaluation.settings import (
    MeasureConfig,
    Reference,
    check_fit,
    check_script,
    choose_reference,
    data_name,
    load_pipeline,
    measure_reference,
    measure_samples,
)
from pipelines.options import merged_options
from pipelines.sample import device_of
from pipelines.sampling_config import ALIASES
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import SOURCES, Source

PROGRAM = "python -m pipelines.guidance"
FIGURES, PICTURE = "guidance.json", "guidance.png"
CURVES = {"frechet": "Frechet distance", "agreement": "label agreement", "precision": "precision", "recall": "recall"}


class GuidanceConfig(MeasureConfig):
    """Measures samples over the strength of guidance."""

    pipeline: Place[str] = ""
    """Folder of a saved pipeline, or a Hub id; the pipeline that ships with the package where empty."""
    values: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 1.5, 2.0, 3.0)
    """Strengths; 1 is off."""
    out: Place[Annotated[str, Field(min_length=1)]] = "guidance"
    """The folder for guidance.json and guidance.png."""


def heading(pipeline: TwoStagePipeline, source: Source, model: FeatureModel, config: GuidanceConfig, chosen: Reference) -> dict[str, Any]:
    """What every point of the curve was measured with."""
    return {
        "pipeline": describe_pipeline(pipeline),
        "features": {"name": model.name, "sha256": model.sha256},
        "data": source.describe(),
        "reference": {"split": config.reference, "count": len(chosen.rows)},
        "n": config.n,
        "k": config.k,
        "seed": config.seed,
        "balanced": chosen.balanced,
        "sampling": merged_options(pipeline.priors, pipeline.defaults, config.sampling.given()),
        "bootstrap": {"replicates": config.bootstrap, "level": LEVEL},
    }


def point(reference: ImageSet, samples: ImageSet, model: FeatureModel, source: Source, config: GuidanceConfig) -> dict[str, Any]:
    """The figures of one strength."""
    table = frechet_table(reference.feature_set(), [samples.feature_set()], config.bootstrap, config.seed)
    n = min(len(samples), len(reference))
    precision, recall = precision_recall(reference.features[:n], samples.features[:n], config.k).estimates(config.bootstrap, config.seed)
    found = {"frechet": table.estimate(samples.name).to_dict(), "precision": precision.to_dict(), "recall": recall.to_dict()}
    if model.classes == source.classes:
        found["agreement"] = mean_estimate(samples.right(), config.bootstrap, config.seed, samples.name, samples.strata).to_dict()
    return found


def measured(path: Path, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that an interrupted call left. Raises UserError where they were measured otherwise, naming what differs."""
    if not path.exists():
        return []
    tree = read_json(path, UserError)
    points = tree.get("points") if isinstance(tree, dict) else None
    if not isinstance(points, list):
        raise UserError(f"{path}: holds no curve over guidance; expected a new folder")
    different = [key for key in head if tree.get(key) != head[key]]
    if different:
        raise UserError(f"out: {path} was measured with another {', '.join(different)}; expected the same, or another folder")
    return points


def begun(
    pipeline: TwoStagePipeline, source: Source, model: FeatureModel, config: GuidanceConfig
) -> tuple[Reference, dict[str, Any], list[dict[str, Any]]]:
    """The reference images, what every point is measured with, and the points that are there already; nothing is drawn.

    Raises:
        ValueError: other data than the pipeline's; a prior without guidance; options that no prior has; classes that cannot be balanced.
        UserError: points in the folder that were measured otherwise.
    """
    check_fit(pipeline, source)
    options = config.sampling.given()
    if not pipeline.classes:
        raise ValueError("guidance: no prior of this pipeline takes labels, so that there is nothing to guide to")
    chosen = choose_reference(source, config, True)
    for value in config.values:
        pipeline.stream(1, label=chosen.labels(pipeline, 1, config.seed), seed=config.seed, **options | {"guidance": value})
    head = finite_or_null(heading(pipeline, source, model, config, chosen))
    return chosen, head, measured(Path(config.out) / FIGURES, head)


def sweep(pipeline: TwoStagePipeline, source: Source, model: FeatureModel, config: GuidanceConfig) -> dict[str, Any]:
    """Measures the strengths that are missing, and writes the file after each. Returns the whole tree, strengths rising.

    Raises ValueError or UserError as ``begun`` does, before any draw.
    """
    chosen, head, points = begun(pipeline, source, model, config)
    options, path = config.sampling.given(), Path(config.out) / FIGURES
    reference = measure_reference(source, config, chosen, model)
    for value in config.values:
        if any(one["guidance"] == value for one in points):
            continue
        print(f"guidance {value:g}: drawing {config.n} samples", flush=True)
        samples, _ = measure_samples(pipeline, config, chosen, model, options=options | {"guidance": value})
        points = sorted([*points, {"guidance": value} | point(reference, samples, model, source, config)], key=lambda one: one["guidance"])
        write_atomic(path, json_bytes(finite_or_null(head | {"points": points})))
    return head | {"points": points}


def save_picture(path: Path, tree: Mapping[str, Any]) -> None:
    """A panel for each figure, with its interval, over guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: Sequence[Mapping[str, Any]] = tree["points"]
    shown = [key for key in CURVES if key in points[0]]
    figure = Figure(figsize=(3.4 * len(shown), 2.8), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    x = [one["guidance"] for one in points]
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        axes.plot(x, [one[key]["value"] for one in points], marker="o", markersize=3.5, linewidth=1.3)
        axes.fill_between(x, [one[key]["low"] for one in points], [one[key]["high"] for one in points], alpha=0.2, linewidth=0)
        axes.set_title(CURVES[key], fontsize=10, loc="left")
        axes.set_xlabel("guidance", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#e6e6e6", linewidth=0.7)
    figure.suptitle(f"{tree['n']} samples; features: {tree['features']['name']}; 95 % intervals", fontsize=8, color="#666666")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def table_text(tree: Mapping[str, Any]) -> str:
    """The points as lines of text; brackets hold 95 % intervals."""
    lines = [f"{tree['n']} samples, features {tree['features']['name']}:"]
    for one in tree["points"]:
        figures = ", ".join(f"{name} {Estimate(**one[key]):.3f}" for key, name in CURVES.items() if key in one)
        lines.append(f"  guidance {one['guidance']:g}: {figures}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(GuidanceConfig, argv, ALIASES, PROGRAM)
    check_script(flags)
    if config.sampling.guidance is not None:
        raise ConfigError(["sampling.guidance: --values says which strengths are measured"])
    device = device_of(config.device)
    source = SOURCES.build(config.data)
    print(f"data: {data_name(config.data)}", flush=True)
    pipeline = load_pipeline(config.pipeline, device)
    model = load_features(config.features, source.signal, device)
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=EVALUATED)
    if checked:
        begun(pipeline, source, model, config)
        return
    tree = sweep(pipeline, source, model, config)
    save_picture(out / PICTURE, tree)
    print(table_text(tree))
    print(f"{out / FIGURES} and {out / PICTURE} written", flush=True)


if __name__ == "__main__":
    run_main(main)
