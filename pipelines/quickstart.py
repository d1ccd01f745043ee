"""The whole way on the bundled images, by one command: ``python -m pipelines.quickstart``.

Each stage is an ordinary command, printed before it runs. Interrupted, the same command goes on where it was: every stage
resumes or is done already. In the end the run folder holds samples.png, reconstructions.png, curves.png, codebook.png,
metrics.json and ``pipeline/``, which ``TwoStagePipeline.from_pretrained`` loads.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from intarsia.cli import Flags, UserError, parse, run_main
from intarsia.config import Config, Place, Seed
from intarsia.files import json_bytes, write_atomic
from intarsia.machine import check_folder
from stage1_tokenizer.run_data import run_data

PROGRAM = "python -m pipelines.quickstart"


class QuickstartConfig(Config):
    """Tokenizer, codes, prior, pipeline and evaluation on the bundled images."""

    run: Place[Annotated[str, Field(min_length=1)]] = "runs/quickstart"
    """The output folder. Running the same command again resumes."""
    tokenizer: str = "fashion/vqvae"
    """Configuration of stage 1."""
    prior: str = "fashion/prior"
    """Configuration of stage 2."""
    seed: Seed = 0
    """Root of all randomness."""
    samples: Annotated[int, Field(ge=10)] = 5000
    """Samples that are drawn for the evaluation."""
    device: Place[str] = "auto"
    """auto: CUDA where there is one."""


def stages(config: QuickstartConfig, max_steps: int | None) -> list[tuple[str, list[str]]]:
    """(name, arguments of ``python -m``) of the commands, in order."""
    run = Path(config.run)
    device, seed = ["--device", config.device], ["--seed", str(config.seed)]
    common = [*seed, *device]
    evaluation = ["--n", str(config.samples), *common]
    short = [] if max_steps is None else ["--max_steps", str(max_steps)]
    tokenizer, codes, prior = str(run / "tokenizer"), str(run / "codes"), str(run / "prior")
    return [
        ("tokenizer", ["stage1_tokenizer.train", "--config", config.tokenizer, "--run", tokenizer, *common, *short]),
        ("codes", ["stage1_tokenizer.encode", "--tokenizer", tokenizer, "--out", codes, *device]),
        ("prior", ["stage2_prior.train", "--config", config.prior, "--codes", codes, "--run", prior, *common, *short]),
        ("pipeline", ["pipelines.assemble", "--tokenizer", tokenizer, "--priors", prior, "--out", str(run / "pipeline")]),
        ("reconstructions", ["stage1_tokenizer.evaluate", "--tokenizer", tokenizer, "--out", str(run / "tokenizer_evaluation"), *device]),
        ("samples", ["pipelines.evaluate", "--pipeline", str(run / "pipeline"), "--out", str(run / "evaluation"), *evaluation]),
    ]


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """Runs one command; its failure ends the whole with the same exit code."""
    print(f"\n[{name}] python -m {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *arguments], check=False).returncode
    if code:
        print(f"error: {name} ended with exit code {code}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def gather(run: Path, seconds: dict[str, float]) -> None:
    """The pictures and figures of the stages, in one place."""
    from intarsia.pictures import save_curves

    pictures = {"samples.png": "evaluation", "reconstructions.png": "tokenizer_evaluation", "codebook.png": "tokenizer_evaluation"}
    for name, folder in pictures.items():
        write_atomic(run / name, (run / folder / name).read_bytes())
    save_curves(run / "curves.png", {"Tokenizer": run / "tokenizer/metrics.jsonl", "Prior": run / "prior/metrics.jsonl"})
    figures = {name: json.loads((run / name / "evaluation.json").read_text()) for name in ("tokenizer_evaluation", "evaluation")}
    write_atomic(run / "metrics.json", json_bytes({"seconds": seconds, **figures}))


def quickstart(config: QuickstartConfig, flags: Flags) -> None:
    """Runs all stages, or what is left of them."""
    if flags.resume is not None or flags.allow_low_space:
        raise UserError("--resume, --allow_low_space: the quickstart has no use for them; the same command goes on where it was")
    if flags.check or flags.dry_run:
        for name, arguments in stages(config, flags.max_steps):
            print(f"[{name}] python -m {shlex.join(arguments)}")
        return
    run = check_folder(config.run)
    seconds: dict[str, float] = {}
    for name, arguments in stages(config, flags.max_steps):
        if name == "samples":
            arguments = [*arguments, f"--data={run_data(run / 'tokenizer')}"]
        start = time.monotonic()
        run_stage(name, arguments)
        seconds[name] = round(time.monotonic() - start, 1)
    gather(run, seconds)
    print(f"\nDone in {sum(seconds.values()) / 60:.1f} minutes: {', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())}")
    print(f"Look at {run}/samples.png, or go on in Python:\n")
    print(f'  from pipelines import TwoStagePipeline\n  TwoStagePipeline.from_pretrained("{run}/pipeline").sample(16)')


def main() -> None:
    config, flags = parse(QuickstartConfig, program=PROGRAM)
    quickstart(config, flags)


if __name__ == "__main__":
    run_main(main)
