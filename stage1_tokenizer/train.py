"""Trains a tokenizer: ``accelerate launch -m stage1_tokenizer.train --config fashion_mnist/vqvae --run runs/tok``, or ``python -m``.

The same command resumes. The loop in ``train`` is the whole training; ``Run`` gives it services.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import Flags, parse, run_main
from intarsia.config import Config, ConfigError, Place, differences, plain
from intarsia.machine import env_rank
from intarsia.meta import build_on_meta
from intarsia.pictures import save_strips
from intarsia.prefetch import Loader
from intarsia.rng import StepRng
from intarsia.run import Run
from intarsia.run_config import RunConfig
from intarsia.run_folder import check_start, run_path
from stage1_tokenizer import sizes
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.errors import BadFileError, DataError
from stage1_tokenizer.encode import space_needed
from stage1_tokenizer.health import Health, HealthConfig
from stage1_tokenizer.levels import prefix_rows, swapped_rows
from stage1_tokenizer.metrics import CodeMetrics, ReconstructionMetrics, unit
from stage1_tokenizer.objectives.base import OBJECTIVES, ObjectiveConfig
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAEConfig

PROGRAM = "python -m stage1_tokenizer.train"
PICTURED = 16
DATA_FILE = "data.json"  # in the run folder: which data it trains on


class TokenizerTrainConfig(RunConfig):
    """Trains a tokenizer on signals."""

    data: SourceConfig = BundledConfig()
    """The signals."""
    tokenizer: TokenizerConfig = VQVAEConfig()
    """What is trained."""
    objective: ObjectiveConfig = ReconstructionConfig()
    """What it is trained for."""
    health: HealthConfig = HealthConfig()
    """How the use of the codes is watched, and what a collapse leads to."""
    train: Literal["all", "decoder"] = "all"
    """decoder: only what turns codes into signals; the codes and the fingerprint of `init` stay."""
    init_samples: Annotated[int, Field(ge=1)] = 1024
    """Signals that the codebooks are initialised from, and re-estimated from under averaged weights."""
    validation_samples: Place[Annotated[int, Field(ge=0)]] = 0
    """Validate on the first so many; 0 = all."""

    def model_post_init(self, context: object) -> None:
        if self.train == "decoder" and self.init is None:
            raise ValueError("train: 'decoder' needs init, a release whose codes are kept")


def train(config: TokenizerTrainConfig, flags: Flags) -> None:
    """One run, from its first step or from where it was; leaves the release in model/."""
    with Run(config, flags, kind="tokenizer") as run, told_what_may_be_replaced():
        source = SOURCES.build(config.data)
        check_fit(config, source)
        data = source.split("train").loader(config.seed)
        same_data(run, source)
        shapes = on_meta(config, source)
        run.check_space(shapes, space_needed(shapes, source, views=1))
        tokenizer = TOKENIZERS.build(config.tokenizer, source.signal)
        objective = OBJECTIVES.build(config.objective).to(run.device, run.dtype)
        if any(p.requires_grad for p in objective.parameters()):
            raise ConfigError([f"objective: a {config.objective.type_name} has parameters to train; no critic is trained yet: freeze them"])
        if config.train == "decoder":
            freeze_codes(tokenizer)
        model = run.prepare(tokenizer)
        health = Health(config.health, tokenizer).to(run.device)
        if run.resume(extra={"objective": objective, "health": health}):
            health.restore(tokenizer)
        else:
            start(run, config, tokenizer, data)
            health.begin(tokenizer)
        codebooks = [p for part in tokenizer.modules() if isinstance(part, Quantizer) for p in part.parameters()]

        for step in run.steps():
            for part in run.parts(data, step):
                with run.forward(part):
                    x = part.batch["x"]
                    out = model(x, rng=part.rng)
                    loss, stats = objective.tokenizer_loss(out, x, step, part.rng)
                    run.backward(loss, part, stats)
                if not part.ghost:
                    health.count(out.likely or out.codes)
            if run.optimizer_step(tokenizer.finite()):
                if config.train == "all":
                    with run.following(codebooks):
                        run.note(tokenizer.update(run.rng(step), run.comm))
                else:
                    tokenizer.discard()
            if config.train == "all" and health.due(step, config.steps):
                left, anew = config.steps - step - 1, partial(set_anew, run, config, tokenizer, data)
                run.note(health.look(tokenizer, run.comm, anew, run.say, left, step + 1))
            run.log(step)
            if run.due("validate", step) or run.due("pictures", step):
                with release_weights(run, config, tokenizer, data):
                    if run.due("pictures", step):
                        draw_reconstructions(run, tokenizer, source, step)
                    if run.due("validate", step) and validate(run, config, tokenizer, source, step):
                        run.release(tokenizer.save_pretrained)
            run.checkpoint(step)

        with release_weights(run, config, tokenizer, data):
            run.finish(tokenizer.save_pretrained)


@contextmanager
def told_what_may_be_replaced() -> Iterator[None]:
    """Says of a file that cannot be decoded how the run goes on."""
    try:
        yield
    except BadFileError as error:
        if error.replaceable:
            error.add_note("replace the file, and the same command goes on")
        raise


def check_fit(config: TokenizerTrainConfig, source: Source) -> None:
    """Raises ConfigError where parts of the configuration ask for what the others, or the data, do not give."""
    errors = []
    if config.log.patience and not (config.log.validate_every and "validation" in source.splits):
        why = f"log.validate_every is {config.log.validate_every}, the splits are {', '.join(source.splits)}"
        errors.append(f"log.patience: {config.log.patience}, but nothing is validated: {why}; expected 0")
    for path, quantizer in vector_quantizers(config.tokenizer, "tokenizer"):
        if config.init is None and quantizer.grow and quantizer.grow[-1] >= config.steps:  # a release is grown already
            late = f"{path}.grow: {list(quantizer.grow)}, but steps is {config.steps}"
            errors.append(f"{late}: some of the {quantizer.codes} codes would never be in use; expected steps below {config.steps}")
    for name, none in (("prefix_blocks", None), ("prefix_decoders", ())):
        made = getattr(config.tokenizer, name, none)
        if made != none and getattr(config.objective, "prefix_weight", 1.0) == 0:
            trained = f"objective.prefix_weight: 0 trains no decoders of prefixes, tokenizer.{name}: {plain(made)} makes some"
            errors.append(f"{trained}; use tokenizer.{name}: {'null' if none is None else '[]'}")
    if errors:
        raise ConfigError(errors)


def vector_quantizers(config: Config, path: str) -> Iterator[tuple[str, VQConfig]]:
    """(path, configuration) of each ``vq`` in a configuration."""
    if isinstance(config, VQConfig):
        yield path, config
    for name in type(config).model_fields:
        value = getattr(config, name)
        inner = {f"{name}.{i}": entry for i, entry in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for place, entry in inner.items():
            if isinstance(entry, Config):
                yield from vector_quantizers(entry, f"{path}.{place}")


def same_data(run: Run, source: Source) -> None:
    """Raises DataError where the run in this folder was begun on other train data: it could not end as if never interrupted."""
    split = source.split("train")
    now: dict[str, Any] = {"train": {"count": len(split), "sha256": split.sketch()}}
    begun = run.begun_on(DATA_FILE, now)
    if begun != now:
        before, these = (f"{facts['train']['count']} train samples (sha256 {facts['train']['sha256'][:8]})" for facts in (begun, now))
        advice = "it goes on with the same data; --init starts another run from its weights"
        raise DataError(f"data: the run {run.folder} was begun on {before}, these are {these}: {advice}")


def freeze_codes(tokenizer: Tokenizer) -> None:
    """What decides the codes gets no gradient; moving averages are discarded in the loop."""
    for tensor in tokenizer.fingerprint_tensors().values():
        tensor.requires_grad_(False)


def start(run: Run, config: TokenizerTrainConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """A fresh start: the weights of ``init``, or codebooks from the first signals.

    Raises:
        ConfigError: where ``init`` is of another configuration or takes other signals.
    """
    if config.init is not None:
        release = Tokenizer.from_pretrained(config.init)
        found = [("tokenizer." + path, old, new) for path, old, new in differences(release.config, config.tokenizer)]
        if release.signal != tokenizer.signal:
            found.append(("data", release.signal, tokenizer.signal))
        if found:
            raise ConfigError([f"{path}: {new!r}, but init ({config.init}) was made with {old!r}" for path, old, new in found])
        tokenizer.load_state_dict(release.state_dict())
        run.weights_changed()
    if config.train == "all":
        initialize(run, config, tokenizer, data)


def initialize(run: Run, config: TokenizerTrainConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """Sets the codebooks from the first signals; those that are initialised already stay as they are."""
    batches = (batch["x"] for batch in run.first_batches(data, config.init_samples))
    tokenizer.initialize(batches, run.rng(0), run.comm)


def set_anew(run: Run, config: TokenizerTrainConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """``initialize`` in the middle of a run: averages go on from what it sets."""
    initialize(run, config, tokenizer, data)
    run.weights_changed()


@contextmanager
def release_weights(run: Run, config: TokenizerTrainConfig, tokenizer: Tokenizer, data: Loader) -> Iterator[None]:
    """The tokenizer as it is validated and released: averaged weights, where on, with the codebooks re-estimated under them."""
    with run.averaged() as averaged:
        if averaged and config.train == "all":
            batches = run.first_batches(data, max(config.init_samples, config.batch_size))
            tokenizer.reestimate(((b["x"], StepRng(config.seed, 0, b["index"])) for b in batches), run.comm)
        yield


def validate(run: Run, config: TokenizerTrainConfig, tokenizer: Tokenizer, source: Source, step: int) -> bool:
    """PSNR, SSIM, usage and perplexity on the validation split, each sample counted once over the processes; True for a new best.

    The best has the least mean error: a mean of PSNRs hangs on the few samples that come out almost exactly (blank ones).
    """
    if "validation" not in source.splits:
        return False
    levels = tokenizer.level_specs()
    quality, usage = ReconstructionMetrics(run.device), CodeMetrics(levels, run.device)
    size = 4 * tokenizer.config.micro_batch
    for batch in run.batches(source.split("validation").loader(config.seed), size, config.validation_samples or None):
        codes = tokenizer.encode(batch["x"])
        usage.update(codes)
        quality.update(unit(batch["x"]), unit(tokenizer.decode(codes)))
    figures = {k: v for k, v in quality.all_reduce_(run.comm).compute().items() if k in ("psnr", "psnr_pooled", "ssim", "mse")}
    for level in usage.all_reduce_(run.comm).compute():
        suffix = f"/{level.name}" if len(levels) > 1 else ""
        figures |= {f"usage{suffix}": level.usage, f"perplexity{suffix}": level.perplexity}
    return run.validated(step, figures, best="mse", higher=False)


def draw_reconstructions(run: Run, tokenizer: Tokenizer, source: Source, step: int) -> None:
    """reconstructions.png: the first signals of the validation split above what the codes make of them. Images only.

    With several levels also what leading levels alone make of them, and each image with its neighbour's codes of one level.
    """
    if not run.is_main or not source.signal.drawable:
        return
    split = source.split("validation" if "validation" in source.splits else "train")
    x: Tensor = split.batch(torch.arange(min(PICTURED, len(split))))["x"].to(run.device, run.dtype)
    codes = tokenizer.encode(x)
    rows = {"original": unit(x), **prefix_rows(tokenizer, codes), "reconstruction": unit(tokenizer.decode(codes))}
    rows |= swapped_rows(tokenizer, codes, [c.roll(1, 0) for c in codes])
    save_strips(run.folder / "reconstructions.png", rows, title=f"step {step + 1}")
    run.picture("reconstructions.png", step)


def on_meta(config: TokenizerTrainConfig, source: Source) -> Tokenizer:
    """The tokenizer without memory: shapes only. Raises ValueError for a configuration that does not fit the signals."""
    module = build_on_meta(TOKENIZERS.get(str(config.tokenizer.type_name)), config.tokenizer, source.signal)
    assert isinstance(module, Tokenizer)
    return module


def describe(config: TokenizerTrainConfig, source: Source) -> Iterator[str]:
    """What --dry_run prints."""
    yield from sizes.describe(on_meta(config, source), config.optim, config.log.keep)


def check(source: Source) -> Iterator[str]:
    """What --check prints."""
    yield from source.summary()


def main() -> None:
    """The command line."""
    config, flags = parse(TokenizerTrainConfig, program=PROGRAM)
    if not (flags.check or flags.dry_run):
        train(config, flags)
        return
    run_path(config.run, make=False)
    check_start(config, flags)
    source = SOURCES.build(config.data)
    check_fit(config, source)
    lines: list[str] = [*check(source), *describe(config, source)] if flags.check else list(describe(config, source))
    if env_rank() == 0:
        print(*lines, sep="\n")


if __name__ == "__main__":
    run_main(main)
