"""Which of several pipelines is better: ``python -m pipelines.compare --pipelines A,B --n 10000 --out DIR``.

Frechet distances to the same reference images, and the difference of each pipeline's to the first one's with a 95 % bootstrap
interval. Replicates are paired: each resamples the reference once for all pipelines, so that what the choice of reference images
adds to both distances cancels. The interval holds for the trained weights as they are; it says nothing of another training run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from intarsia.cli import UserError, parse, run_main
from intarsia.config import ConfigError, Place
from intarsia.files import EVALUATED, finite_or_null, json_bytes, writable_folder, write_atomic
from pipelines.evaluation.bootstrap import LEVEL, Estimate, mean_estimate
from pipelines.evaluation.distances import frechet_table, precision_recall
from pipelines.evaluation.features import FeatureModel, load_features
from pipelines.evaluation.report import describe_pipeline
from pipelines.evaluation.sets import ImageSet
from pipelines.evaluation.settings import (
    REFERENCE,
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
from pipelines.sample import device_of
from pipelines.sampling_config import ALIASES
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import SOURCES, Source

PROGRAM = "python -m pipelines.compare"
FIGURES = "comparison.json"


class CompareConfig(MeasureConfig):
    """Compares the samples of pipelines on the same data at equal n."""

    pipelines: Place[Annotated[str, Field(min_length=1)]]
    """Folders of saved pipelines or Hub ids, joined by commas; differences are to the first."""
    out: Place[Annotated[str, Field(min_length=1)]] = "comparison"
    """The folder for comparison.json."""


def named(text: str) -> list[str]:
    """The pipelines of a list joined by commas. Raises ConfigError for fewer than two, and for one that stands twice."""
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or len(set(names)) != len(names) or not all(names):
        raise ConfigError([f"pipelines: {text!r}; expected at least two different ones, joined by commas"])
    if REFERENCE in names:
        raise ConfigError([f"pipelines: {REFERENCE!r} is what the real images are called; expected another name, such as ./{REFERENCE}"])
    return names


def check_all(pipelines: Mapping[str, TwoStagePipeline], source: Source, config: CompareConfig) -> Reference:
    """The reference images. Raises ValueError before any draw: for data that are not those of a pipeline, for options that one has no use
    for, for pipelines with labels beside ones without, and for classes that cannot be balanced or drawn."""
    for pipeline in pipelines.values():
        check_fit(pipeline, source)
    labelled = {bool(pipeline.classes) for pipeline in pipelines.values()}
    if len(labelled) > 1:
        raise ValueError("pipelines: some take labels and some do not; their samples follow different classes")
    chosen = choose_reference(source, config, labelled == {True})
    for pipeline in pipelines.values():
        pipeline.stream(1, label=chosen.labels(pipeline, 1, config.seed), seed=config.seed, **config.sampling.given())
    return chosen


def compare(pipelines: Mapping[str, TwoStagePipeline], source: Source, model: FeatureModel, config: CompareConfig) -> dict[str, Any]:
    """The figures as a plain tree; pipelines are drawn one after the other, the first is what others are compared with."""
    chosen = check_all(pipelines, source, config)
    reference = measure_reference(source, config, chosen, model)
    sets: dict[str, ImageSet] = {}
    for name, pipeline in pipelines.items():
        print(f"drawing {config.n} samples of {name}", flush=True)
        sets[name], _ = measure_samples(pipeline, config, chosen, model, name=name)
    table = frechet_table(reference.feature_set(), [found.feature_set() for found in sets.values()], config.bootstrap, config.seed)
    base = next(iter(sets))
    agrees = model.classes == source.classes and all(found.labels is not None for found in sets.values())
    tree: dict[str, Any] = {
        "features": {"name": model.name, "sha256": model.sha256},
        "data": source.describe(),
        "reference": {"split": config.reference, "count": len(reference)},
        "n": config.n,
        "seed": config.seed,
        "balanced": chosen.balanced,
        "sampling": config.sampling.given(),
        "bootstrap": {"replicates": config.bootstrap, "level": LEVEL},
        "k": config.k,
        "pipelines": {},
        "differences": {name: table.difference(name, base).to_dict() for name in sets if name != base},
    }
    n = min(config.n, len(reference))
    for name, found in sets.items():
        precision, recall = precision_recall(reference.features[:n], found.features[:n], config.k).estimates(config.bootstrap, config.seed)
        tree["pipelines"][name] = describe_pipeline(pipelines[name]) | {
            "defaults": pipelines[name].defaults,
            "frechet": table.estimate(name).to_dict(),
            "precision": precision.to_dict(),
            "recall": recall.to_dict(),
        }
        if agrees:
            agreement = mean_estimate(found.right(), config.bootstrap, config.seed, name, found.strata)
            tree["pipelines"][name]["agreement"] = agreement.to_dict()
    return tree


def table_text(tree: Mapping[str, Any]) -> str:
    """The figures as lines of text; brackets hold 95 % intervals."""
    features = tree["features"]["name"]
    lines = [f"FD ({features}) of {tree['n']} samples to {tree['reference']['count']} {tree['reference']['split']} images:"]
    for name, found in tree["pipelines"].items():
        rest = "".join(f", {key} {Estimate(**found[key]):.3f}" for key in ("precision", "recall", "agreement") if key in found)
        lines.append(f"  {name}: {Estimate(**found['frechet']):.3f}{rest}")
    base = next(iter(tree["pipelines"]))
    for name, difference in tree["differences"].items():
        found = Estimate(**difference)
        verdict = "below" if found.high < 0 else "above" if found.low > 0 else "not told apart from"
        lines.append(f"  {name} - {base}: {found:.3f}: {verdict} {base}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(CompareConfig, argv, ALIASES, PROGRAM)
    check_script(flags)
    names = named(config.pipelines)
    device = device_of(config.device)
    source = SOURCES.build(config.data)
    print(f"data: {data_name(config.data)}", flush=True)
    model = load_features(config.features, source.signal, device)
    pipelines = {name: load_pipeline(name, device) for name in names}
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=EVALUATED)
    if checked:
        check_all(pipelines, source, config)
        return
    tree = compare(pipelines, source, model, config)
    write_atomic(out / FIGURES, json_bytes(finite_or_null(tree)))
    print(table_text(tree))
    print(f"{out / FIGURES} written", flush=True)


if __name__ == "__main__":
    run_main(main)
