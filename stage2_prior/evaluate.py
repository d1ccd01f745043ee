"""How well a prior predicts codes: ``accelerate launch -m stage2_prior.evaluate --prior runs/prior --codes runs/codes``.

Bits per code and per sample, over positions and classes, with and without the label. Any number of processes gives the
same figures: each takes a share of the samples, and sums are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import UserError, parse, run_main
from intarsia.codes import CodesDataset, CodesError
from intarsia.config import Config, ConfigError, Place
from intarsia.distributed import Comm, comm
from intarsia.files import finite_or_null, json_bytes, writable_folder, write_atomic
from intarsia.hub_files import check_source
from intarsia.padded import padded_batches
from intarsia.processes import start
from intarsia.rng import StepRng
from intarsia.specs import Cond
from stage2_prior.priors.base import Prior

PROGRAM = "python -m stage2_prior.evaluate"


class EvaluateConfig(Config):
    """Bits per code of a trained prior."""

    prior: Place[Annotated[str, Field(min_length=1)]]
    """A run folder, the folder of a release, or a Hub id."""
    codes: Place[Annotated[str, Field(min_length=1)]]
    """The folder of codes, of the tokenizer that the prior was trained for."""
    split: Literal["train", "validation", "test"] = "validation"
    """What is predicted."""
    out: Place[str | None] = None
    """The file to write; ``evaluation/SPLIT.json`` in the run folder where it is not given."""
    device: Place[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: CUDA where there is one."""
    timeout: Place[Annotated[float, Field(gt=0)]] = 300.0
    """Seconds after which a process that waits for another gives up."""


def evaluate(prior: Prior, data: CodesDataset, *, condition: bool, comm: Comm = comm) -> dict[str, Any]:
    """Bits of one split; each rank calls it, and all get the same.

    Args:
        condition: given the labels; False asks for the null condition, or for a prior without conditions.

    Returns:
        "bits_per_code", "bits_per_sample" (over the prior's levels), "levels": for each its name, bits per code and the bits of
        each position as nested lists in the shape of its grid; "classes": bits per code of each class, where there are labels.
    """
    classes = len(data.spec.classes) if data.label is not None else 0
    length = sum(level.positions for level in prior.own)
    total = torch.zeros(length + 1, dtype=torch.float64, device=prior.device)  # nats of each position, and samples
    by_class = torch.zeros(classes, 2, dtype=torch.float64, device=prior.device)  # nats, and samples
    for rows in list(padded_batches(len(data), prior.nll_rows))[comm.rank :: comm.world_size]:
        nll, label = _nll(prior, data, torch.arange(rows.start, rows.stop), condition)
        total += torch.cat([nll.sum(0), nll.new_full((1,), len(nll))])
        if label is not None and classes:
            by_class.index_add_(0, label, torch.stack([nll.mean(1), torch.ones_like(nll[:, 0])], 1))
    comm.all_reduce_sum_(total)
    comm.all_reduce_sum_(by_class)
    bits = (total[:-1] / total[-1] / math.log(2)).cpu()
    per_class = (by_class[:, 0] / by_class[:, 1] / math.log(2)).tolist()
    return {
        "bits_per_code": bits.mean().item(),
        "bits_per_sample": bits.sum().item(),
        "levels": [
            {"name": level.name, "bits_per_code": each.mean().item(), "positions": each.view(level.shape).tolist()}
            for level, each in zip(prior.own, prior.by_level(bits), strict=True)
        ],
        "classes": {name: value for name, value in zip(data.spec.classes, per_class, strict=False) if not math.isnan(value)},
    }


@torch.no_grad()
def _nll(prior: Prior, data: CodesDataset, rows: Tensor, condition: bool) -> tuple[Tensor, Tensor | None]:
    """(B, positions) float64 nats, and the labels."""
    batch = data.batch(rows)
    label = None if batch["label"] is None else batch["label"].to(prior.device)
    cond = Cond(label=label) if condition else None
    rng = StepRng(0, 0, rows.to(prior.device))
    return prior.nll([c.to(prior.device) for c in batch["codes"][: prior.levels.stop]], cond, rng).double(), label


def modes(prior: Prior, data: CodesDataset) -> Iterator[tuple[str, bool]]:
    """(name, condition) of what can be measured: with labels, and without where a null was trained.

    Raises CodesError where the prior needs labels and the split has none.
    """
    if prior.conditional and data.label is not None:
        yield "conditional", True
    if not prior.conditional or prior.has_null:
        yield "unconditional", False
    elif data.label is None:
        raise CodesError(f"codes: {data.folder} has no labels in this split, and the prior needs them (cond_dropout 0)")


def report(prior: Prior, data: CodesDataset, split: str, comm: Comm = comm) -> dict[str, Any]:
    """The figures as a plain tree. Each rank calls it; all get the same."""
    return {
        "prior": {"type": prior.type_name, "sha256": prior.weights_sha256, "levels": [level.name for level in prior.own]},
        "codes": {"fingerprint": data.spec.fingerprint, "split": split, "samples": len(data)},
        "bound": prior.nll_is_bound,
        **{name: evaluate(prior, data, condition=condition, comm=comm) for name, condition in modes(prior, data)},
    }


def table(tree: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = []
    for name in ("conditional", "unconditional"):
        if name in tree:
            found, most = tree[name], "at most " if tree["bound"] else ""
            apart = ", ".join(f"{level['name']} {level['bits_per_code']:.3f}" for level in found["levels"])
            lines.append(
                f"{tree['codes']['samples']} {tree['codes']['split']} samples, {name}: {most}{found['bits_per_code']:.4f} bits per code"
                f" ({apart}), {found['bits_per_sample']:.1f} bits per sample"
            )
    return "\n".join(lines)


def check_classes(prior: Prior, data: CodesDataset) -> None:
    """Raises CodesError where the labels of ``data`` number other classes than those that the prior was trained with."""
    if prior.conditional and data.label is not None and data.spec.classes != prior.spec.classes:
        known, given = (", ".join(spec.classes) or "none" for spec in (prior.spec, data.spec))
        raise CodesError(f"codes: the classes are {given}; the prior was trained with {known}")


def out_file(config: EvaluateConfig) -> Path:
    """Where to write. Raises ConfigError where that is not said and ``prior`` is no run folder, and UserError for a folder."""
    path = None if config.out is None else Path(config.out)
    if path is None:
        check_source("prior", config.prior)
        if not (Path(config.prior) / "config.yaml").is_file():
            raise ConfigError([f"out: {config.prior} is no run folder; say which file to write"])
        path = Path(config.prior) / "evaluation" / f"{config.split}.json"
    if path.is_dir():
        raise UserError(f"out: {path} is a folder; expected a file")
    return path


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(EvaluateConfig, argv, program=PROGRAM)
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: an evaluation has no steps"])
    out = out_file(config)
    device = start(config.device, config.timeout)
    checked = flags.check or flags.dry_run
    writable_folder(out.parent, "out", UserError, make=comm.rank == 0 and not checked)
    prior = Prior.from_pretrained(config.prior)
    data = CodesDataset(config.codes, config.split, prior.spec)
    check_classes(prior, data)
    asked = [name for name, _ in modes(prior, data)]  # raises for what cannot be measured
    if checked:
        if comm.rank == 0:
            own = ", ".join(level.name for level in prior.own)
            print(f"{prior.type_name} prior over {own}: {len(data)} {config.split} samples, {' and '.join(asked)}")
        return
    tree = report(prior.to(device), data, config.split)
    if comm.rank == 0:
        write_atomic(out, json_bytes(finite_or_null(tree)))
        print(table(tree))
        print(f"{out} written", flush=True)


if __name__ == "__main__":
    run_main(main)
