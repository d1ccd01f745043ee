"""Runs to one pipeline folder: ``python -m pipelines.assemble --tokenizer runs/tok --priors runs/top,runs/bottom --out DIR``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from intarsia.cli import UserError, parse, run_main
from intarsia.config import Config, ConfigError, Place
from intarsia.files import writable_folder
from pipelines.paths import split_paths
from pipelines.sampling_config import ALIASES, SamplingConfig
from pipelines.saving import check_place, other_parts
from pipelines.two_stage import TwoStagePipeline

PROGRAM = "python -m pipelines.assemble"


class AssembleConfig(Config):
    """Puts a tokenizer and the priors over its codes into one folder, which loads from disk or from the Hub."""

    tokenizer: Place[Annotated[str, Field(min_length=1)]]
    """A run folder, the folder of a release, or a Hub id."""
    priors: Place[Annotated[str, Field(min_length=1)]]
    """Likewise; several joined by commas, coarse to fine. A path that holds a comma can stand alone."""
    out: Place[Annotated[str, Field(min_length=1)]]
    """The folder of the pipeline: new or empty, or one of the same parts."""
    overwrite: Place[bool] = False
    """Where ``out`` holds a pipeline of other parts, it is replaced."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampling options that pipeline.json keeps as its defaults."""
    micro_batch: Annotated[int | None, Field(ge=1)] = None
    """Samples that a prior draws at a time, 32 where null: fewer need less memory, more are faster. It decides the bits of samples."""


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(AssembleConfig, argv, ALIASES, PROGRAM)
    priors = split_paths(config.priors)
    if not all(priors):
        raise ConfigError([f"priors: {config.priors!r} holds an empty path; expected one or several, joined by commas"])
    out = writable_folder(config.out, "out", UserError, make=False)
    try:
        check_place(out)
    except FileExistsError as error:
        raise UserError(f"out: {error}") from None
    settings = {} if config.micro_batch is None else {"micro_batch": config.micro_batch}
    pipeline = TwoStagePipeline.from_runs(config.tokenizer, priors, defaults=config.sampling.given(), **settings)
    if not config.overwrite and (difference := other_parts(out, pipeline)):
        raise UserError(f"out: {out} holds another pipeline: {difference}; --overwrite=true replaces it")
    if flags.check or flags.dry_run:
        print(f"{pipeline}: the parts fit; nothing was written")
        return
    pipeline.save_pretrained(out)
    print(f"{pipeline} -> {config.out}")


if __name__ == "__main__":
    run_main(main)
