"""Puts the figures of a pipeline together: one plain tree for JSON, and lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from intarsia.specs import LevelSpec
from pipelines.evaluation.bootstrap import LEVEL, Estimate, mean_estimate, ratio_of_means
from pipelines.evaluation.distances import frechet_table, precision_recall
from pipelines.evaluation.features import FeatureModel
from pipelines.evaluation.memorisation import memorisation
from pipelines.evaluation.sets import ImageSet
from pipelines.two_stage import TwoStagePipeline


def sample_figures(
    model: FeatureModel,
    reference: ImageSet,
    sets: Mapping[str, ImageSet],
    *,
    classes: Sequence[str],
    own_split: str = "",
    k: int,
    replicates: int,
    seed: int,
) -> dict[str, Any]:
    """Frechet distances, precision and recall, and label agreement of image sets.

    Args:
        reference: the real images that sets are compared with.
        sets: ``samples``, ``baseline``, ``reconstructions`` and ``real`` (the last two of held-out images). A set of the reference's
            own split has no Frechet distance worth the name; ``own_split`` names it.
        classes: names of the labels; agreement is left out where the feature model knows others.
    """
    compared = {name: s for name, s in sets.items() if name != own_split}
    table = frechet_table(reference.feature_set(), [s.feature_set() for s in compared.values()], replicates, seed)
    figure: dict[str, Any] = {
        "features": {"name": model.name, "sha256": model.sha256},
        "bootstrap": {"replicates": replicates, "level": LEVEL, "seed": seed},
        "counts": {"reference": len(reference)} | {name: len(s) for name, s in sets.items()},
        "frechet": {name: table.estimate(s.name).to_dict() for name, s in compared.items()},
        "frechet_ratio_to_baseline": table.ratio(sets["samples"].name, sets["baseline"].name).to_dict(),
        "precision_recall": {"k": k},
    }
    n = min(len(reference), len(sets["samples"]), len(sets["baseline"]))
    figure["precision_recall"]["count"] = n
    for name in ("samples", "baseline"):
        precision, recall = precision_recall(reference.features[:n], sets[name].features[:n], k).estimates(replicates, seed)
        figure["precision_recall"][name] = {"precision": precision.to_dict(), "recall": recall.to_dict()}
    labelled = {name: s for name, s in sets.items() if s.labels is not None}
    if tuple(classes) == model.classes and "samples" in labelled:
        figure["agreement"] = {name: mean_estimate(s.right(), replicates, seed, s.name, s.strata).to_dict() for name, s in labelled.items()}
        figure["agreement_ratio_to_reconstructions"] = ratio_of_means(
            sets["samples"].right(),
            sets["reconstructions"].right(),
            replicates,
            seed,
            ("samples", "reconstructions"),
            (sets["samples"].strata, sets["reconstructions"].strata),
        ).to_dict()
    return figure


def memorisation_figures(nearest: Mapping[str, Tensor], samples: int, train: int, replicates: int, seed: int) -> dict[str, Any]:
    """Nearest training images in each space.

    Args:
        nearest: space -> distances (n_s + n_r,) of the samples, then of the reconstructions of held-out images.
        samples: n_s. train: how many training images were searched.
    """
    figure: dict[str, Any] = {"train_images": train, "samples": samples}
    for space, distance in nearest.items():
        figure["reconstructions"] = distance.shape[0] - samples
        figure[space] = memorisation(distance[:samples], distance[samples:], replicates, seed).to_dict()
    return figure


def describe_pipeline(pipeline: TwoStagePipeline) -> dict[str, Any]:
    """What the parts are, and which."""

    def level_tree(level: LevelSpec) -> dict[str, Any]:
        return {"name": level.name, "vocab": level.vocab, "shape": list(level.shape)}

    return {
        "tokenizer": {
            "type": pipeline.tokenizer.type_name,
            "fingerprint": pipeline.spec.fingerprint,
            "levels": [level_tree(level) for level in pipeline.spec.levels],
        },
        "priors": [
            {"type": prior.type_name, "sha256": prior.weights_sha256, "levels": [level.name for level in prior.own]}
            for prior in pipeline.priors
        ],
    }


def _text(figure: Mapping[str, float], spec: str = ".3f") -> str:
    return format(Estimate(**figure), spec)


def table(tree: Mapping[str, Any]) -> str:
    """The figures of ``pipelines.evaluate`` as lines of text; brackets hold 95 % intervals."""
    found, figures = tree["reconstruction"], tree["samples"]
    name, counts = figures["features"]["name"], figures["counts"]
    ssim = f", SSIM {found['ssim']:.4f}" if "ssim" in found else ""
    all_levels = [level["name"] for level in tree["pipeline"]["tokenizer"]["levels"]]
    used = found.get("levels", all_levels)  # figures of earlier versions do not say it
    leading = "" if used == all_levels else f" from {', '.join(used)} alone"
    lines = [
        f"reconstruction of {found['samples']} {tree['split']} images{leading}: PSNR {found['psnr']:.2f} dB (mean per image),"
        f" {found['psnr_pooled']:.2f} dB (pooled){ssim}"
    ]
    lines += [
        f"train codes, level {level['name']}: {level['used']} of {level['vocab']} used, perplexity {level['perplexity']:.1f}"
        for level in tree["codes"]["train"]
    ]
    bits = tree["bits"]
    for part in [*(bits["priors"] if len(bits["priors"]) > 1 else []), bits["total"]]:
        at_most, bound = ("<= ", " (bound)") if part["is_bound"] else ("", "")
        lines.append(
            f"{tree['split']} codes, levels {part['levels']}: {at_most}{_text(part['bits_per_code'])} bits per code{bound},"
            f" {at_most}{part['bits_per_image']:.1f} bits per image{bound};"
            f" independent drawing {_text(part['baseline_bits_per_code'])} per code"
        )
    lines.append(f"FD ({name}) to {counts['reference']} {tree['reference']} images:")
    for key, value in figures["frechet"].items():
        lines.append(f"  {key:16}{counts[key]:6} images: {_text(value)}")
    lines.append(f"  samples as a share of the baseline: {_text(figures['frechet_ratio_to_baseline'])}")
    pr = figures["precision_recall"]
    for key in ("samples", "baseline"):
        lines.append(
            f"precision, recall ({name}, k = {pr['k']}, {pr['count']} against {pr['count']}), {key}:"
            f" {_text(pr[key]['precision'])}, {_text(pr[key]['recall'])}"
        )
    if "agreement" in figures:
        lines.append(f"label agreement ({name}): " + "; ".join(f"{key} {_text(value)}" for key, value in figures["agreement"].items()))
        lines.append(f"  samples as a share of the reconstructions: {_text(figures['agreement_ratio_to_reconstructions'])}")
    for space in ("features", "pixels"):
        near = tree["memorisation"][space]
        lines.append(
            f"nearest of {tree['memorisation']['train_images']} train images, {name if space == 'features' else 'pixels'}:"
            " distance of samples as a share of that of reconstructions of held-out images, "
            + ", ".join(f"{float(q):.0%} quantile {_text(value['ratio'])}" for q, value in near["quantiles"].items())
            + f"; samples nearer than the nearest 1 % of these: {_text(near['nearer_than_1_percent_of_reconstructions'])}"
        )
    return "\n".join(lines)
