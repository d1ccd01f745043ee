"""What the launcher starts in the tests of failing ranks: a tiny training in which one rank does ``sys.argv[2]`` in step 6."""

from __future__ import annotations

import os
import signal
import sys

from intarsia import cli
from intarsia.run import Run
from tests.training import run_training, tiny


def main() -> None:
    folder, fault = sys.argv[1:3]
    real = Run.parts

    def parts(self: Run, loader: object, step: int) -> object:
        assert self.comm.world_size == 2
        if step == 5 and self.comm.rank == 1 and fault == "raise":
            raise ValueError("the sensor of this rank is gone")
        if step == 5 and self.comm.rank == 1 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, loader, step)  # type: ignore[arg-type]

    Run.parts = parts  # type: ignore[method-assign,assignment]
    run_training(tiny(folder, steps=1000, timeout=15.0))


if __name__ == "__main__":
    cli.run_main(main)
