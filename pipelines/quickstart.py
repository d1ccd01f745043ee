"""The whole way on the bundled images, by one command: ``python -m pipelines.quickstart``.

Each stage is an ordinary command, printed before it runs. Interrupted, the same command goes on where it was: every stage
resumes or is done already; where the tokenizer has gone on since (after ``--max_steps``), its codes and their prior are made anew. In
the end the run folder holds samples.png, reconstructions.png, curves.png, codebook.png, metrics.json and ``pipeline/``, which
``TwoStagePipeline.from_pretrained`` loads.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from intarsia.cli import Flags, UserError, parse, run_main
from intarsia.config import Config, Place, Seed
from intarsia.files import json_bytes, read_json, write_atomic
from intarsia.run_folder import run_path
from pipelines.stages import prior_config, tokenizer_config
from stage1_tokenizer.run_data import run_data

PROGRAM = "python -m pipelines.quickstart"
SECONDS = "seconds.json"  # of each stage, over all attempts


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
        ("pipeline", ["pipelines.assemble", "--tokenizer", tokenizer, "--priors", prior, f"--out={run / 'pipeline'}", "--overwrite=true"]),
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


def spent(run: Path) -> dict[str, float]:
    """Seconds of each stage so far. Raises UserError for a damaged file."""
    path = run / SECONDS
    found = read_json(path, UserError) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(value, int | float) for value in found.values()):
        raise UserError(f"{path}: holds no seconds of stages; remove it to count anew")
    return found


@contextmanager
def timed(run: Path, name: str) -> Iterator[None]:
    """Adds the seconds of a stage to those of earlier attempts, also where it fails."""
    start = time.monotonic()
    try:
        yield
    finally:
        before = spent(run)
        write_atomic(run / SECONDS, json_bytes(before | {name: round(before.get(name, 0.0) + time.monotonic() - start, 1)}))


def _told(path: Path, *keys: str) -> Any:
    """What a JSON file says at ``keys``; None where it is missing or does not say it."""
    tree = read_json(path, UserError) if path.is_file() else None
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def drop_stale(run: Path) -> None:
    """Removes the prior and the codes where another tokenizer than the one that is there now made the codes, and their seconds."""
    now = _told(run / "tokenizer/model/config.json", "fingerprint")
    made_by = {
        "prior": _told(run / "prior/codes.json", "spec", "fingerprint"),
        "codes": _told(run / "codes/codes.json", "tokenizer", "fingerprint"),
    }
    stale = [name for name, before in made_by.items() if None not in (now, before) and before != now]
    for name in stale:
        print(f"\n{run / name}: of the tokenizer {made_by[name][:12]}, which is {now[:12]} now: removed, to be made anew", flush=True)
        shutil.rmtree(run / name)
    if stale:
        write_atomic(run / SECONDS, json_bytes({name: s for name, s in spent(run).items() if name not in stale}))


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
    """Runs all stages, or what is left of them. Raises ConfigError or UserError before the first for a configuration that is not there or
    is wrong, and for a folder that cannot be written to."""
    if flags.resume is not None or flags.allow_low_space:
        raise UserError("--resume, --allow_low_space: the quickstart has no use for them; the same command goes on where it was")
    checked, commands = flags.check or flags.dry_run, stages(config, flags.max_steps)
    words = {name: arguments[1:] for name, arguments in commands}
    tokenizer_config(words["tokenizer"])
    prior_config(words["prior"])
    run = run_path(config.run, make=not checked, own=(SECONDS, "tokenizer"))
    if checked:
        for name, arguments in commands:
            print(f"[{name}] python -m {shlex.join(arguments)}")
        return
    for name, arguments in commands:
        if name == "samples":
            arguments = [*arguments, f"--data={run_data(run / 'tokenizer')}"]
        if name == "codes":
            drop_stale(run)
        with timed(run, name):
            run_stage(name, arguments)
    seconds = spent(run)
    gather(run, seconds)
    print(f"\nDone in {sum(seconds.values()) / 60:.1f} minutes: {', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())}")
    print(f"Look at {run}/samples.png, or go on in Python:\n")
    print(f'  from pipelines import TwoStagePipeline\n  TwoStagePipeline.from_pretrained("{run}/pipeline").sample(16)')


def main() -> None:
    config, flags = parse(QuickstartConfig, program=PROGRAM)
    quickstart(config, flags)


if __name__ == "__main__":
    run_main(main)
