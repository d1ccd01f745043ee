"""A training step of shipped configurations against the bare products in it: ``python -m benchmarks.training [CONFIG ...]``.

The ordinary scripts train, on the bundled images and on random codes, in the precision that they choose for the machine. After each
step every convolution and linear layer that a step calls is run once more by itself, forward and backward, on inputs of the same
shape and layout: nearly what no implementation of the same net in torch can do without (the gradient of the images is too much).
The rest of a step is quantiser, norms, gates, attention, error, optimizer and logging. One pinned core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Row, pin, ratios, report, row

if TYPE_CHECKING:
    from intarsia.run import Run

TOKENIZERS = ("fashion/vqvae", "fashion_mnist/vqvae", "fashion_mnist/vqvae2", "emoji/vqvae")
PRIORS = ("fashion/prior", "fashion_mnist/pixelcnn", "fashion_mnist/gpt", "fashion_mnist/maskgit")
WARMUP, REPEATS = 4, 15
CODES = 2000  # random ones, for the priors
QUIET = ["--device=cpu", "--log.validate_every=0", "--log.pictures_every=0", f"--max_steps={WARMUP + REPEATS}"]


class Products:
    """The convolutions and linear layers that a module calls, and their inputs."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    @contextmanager
    def recording(self, module: Any) -> Iterator[None]:
        """Writes down all calls within the block."""
        from torch import nn

        def note(layer: Any, given: Any, out: Any) -> None:
            self.calls.append((layer, given[0].detach()))

        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
        handles = [layer.register_forward_hook(note) for layer in layers]
        yield
        for handle in handles:
            handle.remove()

    def run(self, run: Run) -> None:
        """Each of them forward and backward, one after the other."""
        import torch

        for layer, given in self.calls:
            x = given.requires_grad_()
            with torch.enable_grad(), run.autocast():
                y = layer.forward(x)
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))


def measure(train: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of each step that ``train`` makes after WARMUP, and of its bare products, by turns."""
    from intarsia.run import Run

    steps, bare, whole = [], [], Run.steps

    def timed(run: Run) -> Iterator[int]:
        products = Products()
        for step in whole(run):
            begin = time.perf_counter()
            with products.recording(run.module) if step == 1 else nullcontext():
                yield step
            seconds = time.perf_counter() - begin
            if step >= WARMUP:
                begin = time.perf_counter()
                products.run(run)
                steps.append(seconds)
                bare.append(time.perf_counter() - begin)

    Run.steps = timed  # type: ignore[method-assign, assignment]
    try:
        train()
    finally:
        Run.steps = whole  # type: ignore[method-assign]
    return steps, bare


def tokenizer_training(name: str, folder: Path) -> Callable[[], None]:
    """The training of a tokenizer on the bundled images of its size."""
    from intarsia.cli import parse
    from stage1_tokenizer.train import TokenizerTrainConfig, train

    data = "emoji" if name.startswith("emoji/") else "fashion"
    words = ["--config", name, f"--data={{type: bundled, name: {data}}}", "--run", str(folder / "run"), *QUIET]
    return lambda: train(*parse(TokenizerTrainConfig, words))


def prior_training(name: str, folder: Path) -> Callable[[], None]:
    """The training of a prior on random codes, 7x7 of 512, of ten classes."""
    import torch

    from intarsia.cli import parse
    from intarsia.codes import write_codes
    from intarsia.specs import LevelSpec, SignalSpec
    from stage2_prior.train import PriorTrainConfig, train

    codes, label = torch.randint(512, (CODES, 7, 7)), torch.arange(CODES) % 10
    levels, signal = (LevelSpec("codes", 512, (7, 7)),), SignalSpec("image", 1, (28, 28))
    facts = {"type": "vqvae", "fingerprint": "a" * 64}
    classes = tuple("0123456789")
    write_codes(folder / "codes", {"train": ([codes], label)}, levels, signal=signal, tokenizer=facts, classes=classes)
    words = ["--config", name, "--codes", str(folder / "codes"), "--run", str(folder / "run"), *QUIET]
    return lambda: train(*parse(PriorTrainConfig, words))


def rows(name: str) -> list[Row]:
    """A step in milliseconds, and as a multiple of its bare products."""
    with tempfile.TemporaryDirectory() as folder:
        prepare = tokenizer_training if name in TOKENIZERS else prior_training
        steps, bare = measure(prepare(name, Path(folder)))
    times = row("training", f"step / its bare products, {name}", ratios(steps, bare), "times")
    return [times, row("training", f"step, {name}", [1e3 * s for s in steps], "ms")]


def main() -> None:
    pin()
    wanted = sys.argv[1:] or [*TOKENIZERS, *PRIORS]
    if unknown := set(wanted) - {*TOKENIZERS, *PRIORS}:
        raise SystemExit(f"error: {', '.join(sorted(unknown))}; expected some of {', '.join([*TOKENIZERS, *PRIORS])}")
    report("training", [each for name in wanted for each in rows(name)], "accelerate")


if __name__ == "__main__":
    main()
