"""How long a training's steps take: measured in processes of their own, two of them by turns where trainings are compared.

``python -m pipelines.pace stage1_tokenizer.train FLAGS`` is such a process: a step for each line that it reads.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

WARMUP, REPEATS = 10, 40  # steps that do not count, and that do


class Stepper:
    """A training that makes a step when asked to, and nothing in between."""

    def __init__(self, training: Sequence[str]) -> None:
        self._folder, self._errors = tempfile.TemporaryDirectory(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        command = [sys.executable, "-m", "pipelines.pace", *training, "--run", f"{self._folder.name}/run"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)

    def step(self) -> float:
        """The seconds of the next step.

        Raises:
            SystemExit: with the exit code of the training, where it failed; the end of its errors is printed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer
        if answer := self._process.stdout.readline():
            return float(answer)
        code = self._process.wait()
        self._errors.seek(0)
        print(self._errors.read().decode(errors="replace")[-2000:], file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)

    def __enter__(self) -> Stepper:
        for _ in range(WARMUP):
            self.step()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


def pace(training: Sequence[str]) -> float:
    """Seconds per step of a training (module and flags, without its folder): the median."""
    with Stepper(training) as stepper:
        return statistics.median(stepper.step() for _ in range(REPEATS))


def ratio(training: Sequence[str], reference: Sequence[str]) -> float:
    """A step of one training as a multiple of one of the other: the median of steps by turns, as a machine's speed may change meanwhile."""
    with Stepper(reference) as other, Stepper(training) as this:
        return statistics.median(this.step() / other.step() for _ in range(REPEATS))


def _on_request() -> None:
    """The process behind ``Stepper``: standard output is for the seconds alone."""
    import torch

    from intarsia.run import Run

    answers, whole = os.fdopen(os.dup(1), "w"), Run.steps
    os.dup2(2, 1)

    def asked(run: Run) -> Iterator[int]:
        for step in whole(run):
            if not sys.stdin.readline():
                os._exit(0)
            begin = time.perf_counter()
            yield step
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            print(time.perf_counter() - begin, file=answers, flush=True)

    Run.steps = asked  # type: ignore[method-assign, assignment]
    sys.argv = sys.argv[1:]
    importlib.import_module(sys.argv[0]).main()


if __name__ == "__main__":
    from intarsia.cli import run_main

    run_main(_on_request)
