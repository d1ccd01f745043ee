"""What completions are worth: ``python -m pipelines.judge_completions --pipeline DIR --judge DIR --part right --out DIR``.

A part of held-out images is drawn anew, and a judge, another pipeline on the same tokenizer's codes, says what the whole then
costs in bits: beside the codes as they were, and beside codes drawn independently from the frequencies of their position and
class (``IndependentCodes``), in the same places. The known codes of all three are of images whose part is filled from its border
(``masks.filled``), so that nothing of what is to be drawn is told by them. completions.json and completions.png.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import UserError, parse, run_main
from intarsia.config import Config, Place, Seed
from intarsia.files import EVALUATED, finite_or_null, json_bytes, writable_folder, write_atomic
from intarsia.pictures import save_strips
from pipelines.completion import called
from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.bootstrap import LEVEL, mean_estimate
from pipelines.evaluation.report import describe_pipeline
from pipelines.evaluation.settings import SplitName, check_fit, check_script, data_name, load_pipeline
from pipelines.masks import filled, kept_cells
from pipelines.options import merged_options
from pipelines.sample import device_of
from pipelines.sampling_config import ALIASES, SamplingConfig
from pipelines.two_stage import TwoStagePipeline
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig, Split
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.metrics import unit
from stage1_tokenizer.sizes import rows_at_once

PROGRAM = "python -m pipelines.judge_completions"
SHOWN = 10
Part = Literal["upper", "lower", "left", "right", "centre"]


class JudgeConfig(Config):
    """Measures completions of held-out images by the likelihood of another pipeline."""

    data: SourceConfig = BundledConfig()
    """The data that the pipelines were trained on."""
    split: SplitName = "validation"
    """Whose first images are completed."""
    pipeline: Place[str] = ""
    """Completes: folder of a saved pipeline, or a Hub id; the pipeline that ships with the package where empty."""
    judge: Place[str] = ""
    """Judges, likewise; its priors should know exact likelihoods, and its tokenizer must be the same."""
    part: Part = "lower"
    """What is drawn anew: a half, or the centre of half the height and width. Autoregressive priors complete the lower half alone."""
    n: Annotated[int, Field(ge=2)] = 1000
    """Images, or all of the split where it has fewer."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and the like."""
    bootstrap: Annotated[int, Field(ge=2)] = 200
    """Resampled sets behind each interval."""
    seed: Seed = 0
    """Of the completions and the baseline."""
    out: Place[Annotated[str, Field(min_length=1)]] = "completions"
    """The folder for completions.json and completions.png."""
    device: Place[str] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def part_mask(part: Part, n: int, shape: Sequence[int]) -> Tensor:
    """(n, 1, H, W) bool, True in the part."""
    height, width = shape
    mask = torch.zeros(n, 1, height, width, dtype=torch.bool)
    rows, columns = {
        "upper": (slice(height // 2), slice(None)),
        "lower": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "centre": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
    }[part]
    mask[:, :, rows, columns] = True
    return mask


def check_pair(pipeline: TwoStagePipeline, judge: TwoStagePipeline, source: Source) -> None:
    """Raises ValueError for data that are not those of the pipelines, and for a judge of another tokenizer's codes or other levels."""
    for one in (pipeline, judge):
        check_fit(one, source)
    if judge.tokenizer.fingerprint != pipeline.tokenizer.fingerprint:
        prints = f"{judge.tokenizer.fingerprint[:12]}; the pipeline's is {pipeline.tokenizer.fingerprint[:12]}"
        raise ValueError(f"judge: its tokenizer is {prints}: codes mean something else to it")
    mine, its = (one.priors[-1].levels.stop for one in (pipeline, judge))
    if its != mine:
        raise ValueError(f"judge: its priors model {its} level(s) of codes; those of the pipeline {mine}")


def encoded(pipeline: TwoStagePipeline, split: Split, rows: Tensor, hidden: Part | None = None) -> list[Tensor]:
    """Codes of rows of a split on the CPU, one (n, *grid) int64 tensor for each level that the priors model.

    Args:
        hidden: what is filled from its border before: encoders see far, those with group norm everything.
    """

    def codes(some: Tensor) -> list[Tensor]:
        x = unit(split.batch(some)["x"])
        return pipeline.encode(x if hidden is None else filled(x, part_mask(hidden, len(x), pipeline.signal.shape)))

    parts = [[c.cpu() for c in codes(some)] for some in rows.split(rows_at_once(pipeline.signal, pipeline.tokenizer.config.micro_batch))]
    return [torch.cat(level) for level in zip(*parts, strict=True)][: pipeline.priors[-1].levels.stop]


@dataclass(frozen=True)
class Hidden:
    """What is completed.

    Attributes:
        rows: (n,) int64, of the split.
        label: (n,) int64, their classes; None where unlabelled.
        mask: (n, 1, H, W) bool, True in the part.
        keep: one (n, *grid) bool tensor for each level that the priors model, True where the code stays.
    """

    rows: Tensor
    label: Tensor | None
    mask: Tensor
    keep: list[Tensor]

    def arguments(self, pipeline: TwoStagePipeline, config: JudgeConfig) -> dict[str, Any]:
        """What ``complete_codes`` is given beside codes."""
        return {"keep": self.keep, "label": self.label if pipeline.classes else None, "seed": config.seed, **config.sampling.given()}


def hidden_part(pipeline: TwoStagePipeline, judge: TwoStagePipeline, source: Source, config: JudgeConfig) -> Hidden:
    """What ``config`` asks for, before any image is encoded.

    Raises:
        ValueError: pipelines of different tokenizers or data; a split that is not there; a part that the pipeline's priors cannot complete;
            options that they do not have.
    """
    check_pair(pipeline, judge, source)
    split = source.split(config.split)
    rows = torch.arange(min(config.n, len(split)))
    label = None if split.labels is None else split.labels[rows]
    mask = part_mask(config.part, len(rows), pipeline.signal.shape)
    keep = [kept_cells(mask, level.shape) for level in pipeline.spec.levels[: pipeline.priors[-1].levels.stop]]
    hidden = Hidden(rows, label, mask, keep)
    with called("part"):
        pipeline.check_completion(**hidden.arguments(pipeline, config))
    return hidden


def measure_completions(
    pipeline: TwoStagePipeline, judge: TwoStagePipeline, source: Source, config: JudgeConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The figures as a plain tree, and rows of images for a picture. Raises ValueError as ``hidden_part`` does."""
    hidden = hidden_part(pipeline, judge, source, config)
    split, train = source.split(config.split), source.split("train")
    rows, label, mask, keep = hidden.rows, hidden.label, hidden.mask, hidden.keep
    codes, told = encoded(pipeline, split, rows), encoded(pipeline, split, rows, config.part)
    drawn = sum(int((~k[0]).sum()) for k in keep)
    completed = [c.cpu() for c in pipeline.complete_codes(told, **hidden.arguments(pipeline, config))]
    levels = pipeline.spec.levels[: len(codes)]
    baseline = IndependentCodes(levels, encoded(pipeline, train, torch.arange(len(train))), train.labels, len(source.classes))
    marginal = baseline.sample(rows, label if baseline.labels is not None else None, config.seed)
    independent = [torch.where(k, c, other) for k, c, other in zip(keep, told, marginal, strict=True)]

    real = [torch.where(k, c, whole) for k, c, whole in zip(keep, told, codes, strict=True)]
    sets = {"real": real, "completed": completed, "independent": independent}
    judged = label if judge.classes else None
    bits = {name: judge.nll(found, judged).cpu() / (math.log(2) * drawn) for name, found in sets.items()}

    def figure(values: Tensor) -> dict[str, float]:
        return mean_estimate(values, config.bootstrap, config.seed, "completions").to_dict()

    tree = {
        "pipeline": describe_pipeline(pipeline),
        "judge": describe_pipeline(judge) | {"nll_is_bound": judge.nll_is_bound},
        "data": source.describe(),
        "split": config.split,
        "part": config.part,
        "images": len(rows),
        "drawn_codes": drawn,
        "seed": config.seed,
        "sampling": merged_options(pipeline.priors, pipeline.defaults, config.sampling.given()),
        "bits_per_drawn_code": {
            "completed_above_real": figure(bits["completed"] - bits["real"]),
            "independent_above_real": figure(bits["independent"] - bits["real"]),
            "independent_above_completed": figure(bits["independent"] - bits["completed"]),
        },
        "bootstrap": {"replicates": config.bootstrap, "level": LEVEL},
    }
    first = slice(SHOWN)
    x = unit(split.batch(rows[first])["x"])
    decoded = {name: pipeline.decode([c[first] for c in sets[name]]).cpu() for name in ("completed", "independent")}
    return tree, {"real": x, "known": torch.where(mask[first], 0.5, x)} | decoded


def table_text(tree: Mapping[str, Any]) -> str:
    """The figures in lines."""
    words = {
        "completed_above_real": "completed, above the codes as they were",
        "independent_above_real": "drawn independently, above the codes as they were",
        "independent_above_completed": "drawn independently, above completed",
    }
    head = f"{tree['images']} {tree['split']} images, part {tree['part']}: {tree['drawn_codes']} codes of each drawn"
    lines = [f"{head}; bits per drawn code by the judge:"]
    for key, text in words.items():
        found = tree["bits_per_drawn_code"][key]
        lines.append(f"  {text}: {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(JudgeConfig, argv, ALIASES, PROGRAM)
    check_script(flags)
    device = device_of(config.device)
    source = SOURCES.build(config.data)
    print(f"data: {data_name(config.data)}", flush=True)
    pipeline, judge = load_pipeline(config.pipeline, device), load_pipeline(config.judge, device)
    hidden_part(pipeline, judge, source, config)
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=EVALUATED)
    if checked:
        return
    tree, pictures = measure_completions(pipeline, judge, source, config)
    write_atomic(out / "completions.json", json_bytes(finite_or_null(tree)))
    if source.signal.drawable:
        save_strips(out / "completions.png", pictures, title=f"Completions: {config.part}")
    print(table_text(tree))
    print(f"{out}/completions.json{' and completions.png' if source.signal.drawable else ''} written")


if __name__ == "__main__":
    run_main(main)
