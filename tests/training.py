"""Small trainings for tests: a source of 8x8 images, a tokenizer of a few thousand parameters, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoint import load_checkpoint, newest_valid
from intarsia.cli import Flags, run_main
from intarsia.rng import uniform
from intarsia.run_config import LogConfig, OptimConfig
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.nets.ladder import GridConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAEConfig
from stage1_tokenizer.tokenizers.vqvae2 import LevelConfig, VQVAE2Config
from stage1_tokenizer.train import TokenizerTrainConfig, train

LOG = LogConfig(every=3, validate_every=0, checkpoint_every=5, pictures_every=0)
NET = ConvConfig(widths=(8, 8), blocks=(0, 1), encoder_blocks=(0, 0), patch=1)
TOKENIZER = VQVAEConfig(net=NET, quantizer=VQConfig(codes=24, dim=4, decay=0.9, restart=0.3), micro_batch=8)
_VQ = VQConfig(codes=12, dim=4, decay=0.9, restart=0.3)
HIERARCHY = VQVAE2Config(
    net=ConvConfig(widths=(8,), blocks=(0,), encoder_blocks=(0,)),
    ladder=(GridConfig(width=8, blocks=1, encoder_blocks=0),),
    levels=(LevelConfig(quantizer=_VQ), LevelConfig(quantizer=_VQ)),
    drop_finer=0.2,
    micro_batch=8,
)


class ToyConfig(SourceConfig):
    """Bright bars on a dark ground."""

    n: int = 50
    """Train samples; 11 more are for validation."""


@SOURCES.register("toy", ToyConfig)
class Toy(Source):
    """(1, 8, 8) images, half of them labelled 0, half 1."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        sizes = {"train": (config.n, 0), "validation": (11, 9000)}
        splits = {name: ArraySplit(bars(n, start), torch.arange(n) % 2, config.transform) for name, (n, start) in sizes.items()}
        self._finish(splits, ("lying", "standing"))


def bars(n: int, start: int = 0) -> Tensor:
    """(n, 1, 8, 8) uint8: noise with a bright bar at a random place."""
    index = torch.arange(start, start + n)
    x = 60 * uniform(0, "noise", index[:, None], 0, torch.arange(64)).view(n, 1, 8, 8)
    for i in range(n):
        at = int(8 * uniform(0, "bar", index[i : i + 1]))
        (x[i, 0, at] if i % 2 == 0 else x[i, 0, :, at]).add_(180)
    return x.to(torch.uint8)


def tiny(run: Path | str, **changes: Any) -> TokenizerTrainConfig:
    """A configuration that trains in milliseconds per step; ``log`` and ``optim`` may be dictionaries of changes."""
    for name, base in (("log", LOG), ("optim", OptimConfig(lr=3e-3, warmup=2))):
        changes[name] = base.replace(**changes.get(name, {}))
    values = {"steps": 20, "batch_size": 8, "precision": "fp32", "device": "cpu", "data": ToyConfig(), "tokenizer": TOKENIZER}
    return TokenizerTrainConfig(run=str(run), **(values | {"init_samples": 32} | changes))


def augmented(**changes: Any) -> ToyConfig:
    return ToyConfig(transform=TransformConfig(shift=2, flip=True), **changes)


def run_training(config: TokenizerTrainConfig, **flags: Any) -> None:
    train(config, Flags(**flags))


def together(ranks: Callable[..., list[Any]], *trainings: Callable[[], Any]) -> list[Any]:
    """Runs ``trainings`` one after the other in two forked processes; what each process got of the last one."""

    def work(rank: int) -> Any:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        return [training() for training in trainings][-1]

    return ranks(work, timeout=300.0)


@dataclasses.dataclass
class Left:
    """What a run leaves: the newest checkpoint's tensors and facts, and the lines of its log."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    metrics: str

    @classmethod
    def of(cls, run: Path | str) -> Left:
        path = newest_valid(Path(run) / "checkpoints")
        assert path is not None
        step, state, meta = load_checkpoint(path)
        tensors = {f"{part}/{name}": tensor for part, inner in state.items() for name, tensor in inner.items()}
        facts = {k: v for k, v in meta.items() if k not in ("config", "world_size")}
        metrics = Path(run) / "metrics.jsonl"
        return cls(step, tensors, facts, metrics.read_text() if metrics.exists() else "")

    def differences(self, other: Left) -> list[str]:
        """Names of whatever is not the same to the bit."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        both = self.tensors.keys() & other.tensors.keys()
        found = [n for n in names if n not in both or not torch.equal(self.tensors[n], other.tensors[n])]
        return found + [n for n in ("step", "facts", "metrics") if getattr(self, n) != getattr(other, n)]

    def distance(self, other: Left, parts: tuple[str, ...] = ("module/", "optimizer/")) -> float:
        """The largest difference of any number in the given parts."""
        assert self.tensors.keys() == other.tensors.keys()
        pairs = [(self.tensors[n], other.tensors[n]) for n in self.tensors if n.startswith(parts)]
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def fork(fn: Any, output: Path | None = None) -> int:
    """Runs ``fn`` in a child as a script's main, and returns its pid; what it prints goes to ``output``."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(descriptor, number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        run_main(fn)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, timeout: float = 60.0) -> int:
    """The exit code of a child, minus the signal where one ended it; AssertionError (and a kill) after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} had not ended after {timeout} s")
