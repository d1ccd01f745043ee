"""The model card of a pipeline: what it makes, how to load it, its parts, and a picture of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from intarsia.hub_files import model_card
from intarsia.pictures import mosaic
from pipelines.fit import whole
from pipelines.labels import known_classes
from pipelines.outputs import CHANNELS

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.two_stage import TwoStagePipeline

PICTURE = "samples.png"


def picture(pipeline: TwoStagePipeline, samples: int) -> Image | None:
    """A grid of samples of seed 0, the classes in turn; None where none are asked for, or where the signal is no image."""
    if whole("samples", samples, 0) == 0 or pipeline.signal.kind != "image" or pipeline.signal.channels not in CHANNELS:
        return None
    label = torch.arange(samples) % len(pipeline.classes) if pipeline.classes else None
    latest = pipeline.last_seed
    rows = [x for _, x in pipeline.stream(samples, label=label, seed=0)]
    pipeline.last_seed = latest
    return mosaic(torch.stack(rows), math.ceil(math.sqrt(samples)))


def card(pipeline: TwoStagePipeline, source: str, metrics: Mapping[str, float] | None, license: str | None, pictured: bool) -> str:
    """The text of the README.

    Args:
        source: what ``from_pretrained`` is to be given.
    """
    signal = pipeline.signal
    kinds = [pipeline.tokenizer.type_name, *(prior.type_name for prior in pipeline.priors)]
    shown = f"![Samples of seed 0]({PICTURE})\n\n" if pictured else ""
    example = f", label={pipeline.classes[0]!r}" if pipeline.classes else ""
    classes = f"Classes: {known_classes(pipeline.classes)}.\n\n" if pipeline.classes else ""
    rows = [f"| tokenizer | {kinds[0]} | {_size(pipeline.tokenizer)} | |"]
    for i, prior in enumerate(pipeline.priors):
        levels = "; ".join(f"{level.name}: {' x '.join(map(str, level.shape))} codes of {level.vocab}" for level in prior.own)
        rows.append(f"| priors/{i} | {prior.type_name} | {_size(prior)} | {levels} |")
    table = "\n".join(["| part | type | parameters | levels |", "|---|---|---|---|", *rows])
    priors = "a prior" if len(pipeline.priors) == 1 else f"{len(pipeline.priors)} priors"
    size = " x ".join(map(str, (signal.channels, *signal.shape)))
    body = (
        f"{shown}A tokenizer and {priors} over its codes: together they make {signal.kind} signals of {size}.\n\n"
        f"```python\nfrom pipelines import TwoStagePipeline\n\npipeline = TwoStagePipeline.from_pretrained({source!r})\n"
        f"x = pipeline.sample(16{example}, seed=0)\n```\n\n{table}\n\n{classes}Fingerprint of the codes: `{pipeline.spec.fingerprint}`."
    )
    return model_card("Two-stage pipeline", body, tags=["intarsia", "two-stage", *dict.fromkeys(kinds)], license=license, metrics=metrics)


def _size(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
