"""The commands that other scripts run: their configurations, looked at before any of them runs, and how one is run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from intarsia.cli import parse
from intarsia.config import ConfigError
from stage1_tokenizer.train import TokenizerTrainConfig
from stage2_prior.train import PriorTrainConfig


@contextmanager
def said_of(argument: str) -> Iterator[None]:
    """What is wrong is said of the argument that it came from: ValueError as ConfigError, each line with the name in front."""
    try:
        yield
    except ValueError as error:
        lines = error.errors if isinstance(error, ConfigError) else [str(error)]
        raise ConfigError([line if line.startswith(f"{argument}:") else f"{argument}: {line}" for line in lines]) from None


def tokenizer_config(words: Sequence[str], argument: str = "tokenizer") -> TokenizerTrainConfig:
    """What ``python -m stage1_tokenizer.train`` makes of these words. Raises ConfigError naming ``argument``."""
    with said_of(argument):
        return parse(TokenizerTrainConfig, words)[0]


def prior_config(words: Sequence[str], argument: str = "prior") -> PriorTrainConfig:
    """What ``python -m stage2_prior.train`` makes of these words. Raises ConfigError naming ``argument``."""
    with said_of(argument):
        return parse(PriorTrainConfig, words, {"levels": "prior.levels"})[0]


def run_command(arguments: Sequence[str], quiet: bool = False, log: Path | None = None, jobs: int = 1) -> float:
    """Runs ``python -m`` with these arguments; the seconds that it took. SystemExit with its code where it fails.

    Args:
        quiet: nothing is printed but the end of its errors. ``log``: a file that takes what it prints instead.
        jobs: so many commands run at once: each takes its share of the cores.
    """
    line = f"python -m {shlex.join(arguments)}"
    if not quiet:
        print(f"\n> {line}", flush=True)
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ} if jobs > 1 else dict(os.environ)
    command, begin = [sys.executable, "-m", *arguments], time.perf_counter()
    if log is None:
        done = subprocess.run(command, check=False, capture_output=quiet, text=True, env=env)
    else:
        with log.open("a") as file:
            done = subprocess.run(command, check=False, stdout=file, stderr=file, text=True, env=env)
    if done.returncode:
        told = (done.stderr or "")[-2000:] if log is None else f"see {log}"
        print(told, f"error: {line}: exit code {done.returncode}", file=sys.stderr)
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return time.perf_counter() - begin
