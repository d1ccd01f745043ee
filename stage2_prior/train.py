"""Trains a prior on codes: ``accelerate launch -m stage2_prior.train --config fashion_mnist/gpt --codes runs/codes --run runs/prior``.

Or ``python -m``. The same command resumes. The loop in ``train`` is the whole training; ``Run`` gives it services.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field

from intarsia.cli import Flags, parse, run_main
from intarsia.codes import CodesDataset, CodesError, check_match
from intarsia.config import ConfigError, Place, differences
from intarsia.machine import env_rank, tensor_bytes
from intarsia.meta import build_on_meta
from intarsia.rng import StepRng
from intarsia.run import Run
from intarsia.run_config import BatchSize, LogConfig, OptimConfig, RunConfig
from intarsia.run_folder import check_start, run_path
from intarsia.specs import CodesSpec, Cond
from intarsia.stepping import state_bytes
from stage2_prior.priors.base import PRIORS, Prior, PriorConfig
from stage2_prior.priors.gpt import GPTConfig

PROGRAM = "python -m stage2_prior.train"
CODES_FILE = "codes.json"  # in the run folder: which codes it trains on


class PriorTrainConfig(RunConfig):
    """Trains a prior on codes."""

    codes: Place[Annotated[str, Field(min_length=1)]]
    """The folder of codes that ``stage1_tokenizer.encode`` wrote. It may move; other codes are another run."""
    prior: PriorConfig = GPTConfig()
    """What is trained."""
    validation_samples: Place[Annotated[int, Field(ge=0)]] = 0
    """Validate on the first so many; 0 = all."""
    batch_size: BatchSize = 32
    """Samples per optimizer step, over all processes and micro-batches."""
    optim: OptimConfig = OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, average=0.999)
    """Optimizer and schedule."""
    log: LogConfig = LogConfig(release="last")
    """Cadences and trackers. The last averaged weights are released: validation bits do not rank the samples."""


def train(config: PriorTrainConfig, flags: Flags) -> None:
    """The whole training of a prior, from the checks of the folder to the release in ``model/``."""
    with Run(config, flags, kind="prior") as run:
        data, held = datasets(config)
        run.check_space(on_meta(config, data.spec))
        prior = PRIORS.build(config.prior, data.spec)
        same_codes(run, data)
        model = run.prepare(prior)
        if not run.resume():
            start(run, config, prior)

        for step in run.steps():
            for part in run.parts(data, step):
                with run.forward(part):
                    loss, stats = model(*inputs(prior, part.batch), part.rng)
                    run.backward(loss, part, stats)
            run.optimizer_step()
            run.log(step)
            if run.due("validate", step):
                with run.averaged():
                    if validate(run, config, prior, held, step):
                        run.release(prior.save_pretrained)
            run.checkpoint(step)

        with run.averaged():
            run.finish(prior.save_pretrained)


def inputs(prior: Prior, batch: dict[str, Any]) -> tuple[list[torch.Tensor], Cond | None]:
    """What a prior takes of a batch of codes: the levels up to its own last, and the labels where it is conditional."""
    return batch["codes"][: prior.levels.stop], Cond(label=batch["label"]) if prior.conditional else None


def validate(run: Run, config: PriorTrainConfig, prior: Prior, held: CodesDataset | None, step: int) -> bool:
    """Bits per code given the labels ("bits_bound" where a prior gives a bound), each sample counted once over the processes; True for
    a new best."""
    if held is None:
        return False
    levels = [level.positions for level in prior.own]
    total = torch.zeros(sum(levels) + 1, dtype=torch.float64, device=run.device)  # nats per position, and samples
    with torch.no_grad():
        for batch in run.batches(held, prior.nll_rows, config.validation_samples or None):
            nll = prior.nll(*inputs(prior, batch), StepRng(config.seed, 0, batch["index"]))
            total[:-1] += nll.double().sum(0)
            total[-1] += len(nll)
    nats = (run.comm.all_reduce_sum_(total)[:-1] / total[-1]).cpu()
    name = "bits_bound" if prior.nll_is_bound else "bits"
    figures = {name: nats.mean().item() / math.log(2)}
    if len(levels) > 1:
        apart = zip(prior.own, prior.by_level(nats), strict=True)
        figures |= {f"{name}/{level.name}": each.mean().item() / math.log(2) for level, each in apart}
    return run.validated(step, figures, best=name)


def start(run: Run, config: PriorTrainConfig, prior: Prior) -> None:
    """A fresh start: the weights of ``init``, where it is given.

    Raises:
        ConfigError: where ``init`` is of another configuration. CodesError: where it was trained on other codes.
    """
    if config.init is None:
        return
    release = Prior.from_pretrained(config.init)
    found = [("prior." + path, old, new) for path, old, new in differences(release.config, config.prior) if path not in FREE_FROM_INIT]
    if found:
        raise ConfigError([f"{path}: {new!r}, but init ({config.init}) was made with {old!r}" for path, old, new in found])
    check_match(release.spec.levels, release.spec.fingerprint, prior.spec, f"init ({config.init})")
    if release.conditional and release.spec.classes != prior.spec.classes:
        known, given = (", ".join(spec.classes) or "none" for spec in (release.spec, prior.spec))
        raise ConfigError([f"codes: the classes are {given}, but init ({config.init}) was trained with {known}"])
    prior.load_state_dict(release.state_dict())
    run.weights_changed()


FREE_FROM_INIT = ("corruption", "dropout")  # how a prior is trained, not what it is


def same_codes(run: Run, data: CodesDataset) -> None:
    """Raises CodesError where the run in this folder was begun on other codes.

    A fingerprint alone would not tell a dump with other views or rows, which would change what every later step sees.
    """
    facts = {"spec": data.spec.to_dict(), "train": [shard.sha256 for shard in data.manifest.split("train").shards]}
    begun = run.begun_on(CODES_FILE, facts)
    if begun != facts:
        before, now = begun["spec"]["fingerprint"], data.spec.fingerprint
        which = f"by the tokenizer {before}; these are by {now}" if before != now else "of other samples or views, by the same tokenizer"
        raise CodesError(f"codes: {data.folder}: the run {run.folder} was begun on codes {which}")


def datasets(config: PriorTrainConfig) -> tuple[CodesDataset, CodesDataset | None]:
    """The train split, and the validation split where there is one.

    Raises:
        CodesError: damaged codes; a split without the labels that the prior is to be conditioned on.
    """
    data = CodesDataset(config.codes, "train")
    names = [split.name for split in data.manifest.splits]
    held = CodesDataset(config.codes, "validation") if "validation" in names else None
    for split, part in (("train", data), ("validation", held)):
        if part is not None and part.label is None and data.spec.classes and config.prior.cond_dropout < 1:
            raise CodesError(f"codes: {config.codes}: the split {split!r} has no labels; prior.cond_dropout 1 trains without")
    return data, held


def on_meta(config: PriorTrainConfig, spec: CodesSpec) -> Prior:
    """The prior without memory: shapes only. Raises ValueError for a configuration that does not fit the codes."""
    module = build_on_meta(PRIORS.get(str(config.prior.type_name)), config.prior, spec)
    assert isinstance(module, Prior)
    return module


def describe(config: PriorTrainConfig, spec: CodesSpec) -> Iterator[str]:
    """What --dry_run prints."""
    prior = on_meta(config, spec)
    weights, state = tensor_bytes(prior.parameters()), state_bytes(prior, config.optim)
    yield f"{config.prior.type_name}: {sum(p.numel() for p in prior.parameters()):,} parameters"
    for title, levels in (("given", prior.upper), ("models", prior.own)):
        for level in levels:
            yield f"{title} level {level.name}: {level.vocab} codes on a grid of {'x'.join(map(str, level.shape))}"
    yield f"conditions: {f'{len(spec.classes)} classes' if prior.conditional else 'none'}"
    yield f"memory: {2 * weights + state:,} bytes for weights, gradients and optimizer; activations come on top"
    yield f"disk: {weights + state:,} bytes per checkpoint, {config.log.keep} are kept"


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(PriorTrainConfig, argv, aliases={"levels": "prior.levels"}, program=PROGRAM)
    if not (flags.check or flags.dry_run):
        train(config, flags)
        return
    run_path(config.run, make=False)
    check_start(config, flags)
    data, held = datasets(config)
    lines = [f"codes: {config.codes}: {len(data)} train rows" + ("" if held is None else f", {len(held)} validation rows")]
    lines += describe(config, data.spec)
    if env_rank() == 0:
        print(*lines, sep="\n")


if __name__ == "__main__":
    run_main(main)
