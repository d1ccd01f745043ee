"""The table of docs/scale.md: what each large configuration has, and what a process needs for it. Every figure is computed here.

    python -m configs.table [docs/scale.md]

prints it, or puts it between the marks in that file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.cli import find_config, load_tree, shipped_configs
from intarsia.machine import tensor_bytes
from intarsia.meta import build_on_meta
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec, Cond, LevelSpec, SignalSpec
from intarsia.stepping import state_bytes
from stage1_tokenizer.tokenizers.base import TOKENIZERS
from stage1_tokenizer.train import TokenizerTrainConfig
from stage2_prior.priors.base import PRIORS
from stage2_prior.train import PriorTrainConfig

LARGE = "# scale: large"  # the first line of a large configuration
DATA = {"cifar10": (32, 10), "celeba64": (64, 0), "imagenet256": (256, 1000)}  # side in pixels (colour), classes
PROCESSES = 8
MEASURED_SIDE = 128  # activations of a convolutional net are proportional to the pixels
BEGIN, END = "<!-- python -m configs.table -->\n", "<!-- end -->"
HEADING = (
    "configuration", "parameters", "codes a sample", "weights, gradients, moments, averages", f"each of {PROCESSES}, replicated",
    f"each of {PROCESSES}, in shards", "activations a sample", "samples and codes a step",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Bytes and counts of one configuration; ``shards`` is 0 for what is not sharded."""

    name: str
    parameters: int
    codes: str
    state: int
    replicated: int
    shards: int
    activations: int
    samples: int
    tokens: int

    def cells(self) -> list[str]:
        """One text for each of HEADING."""
        shards = _bytes(self.shards) if self.shards else "-"
        samples = f"{self.samples:,}: {self.tokens:,}"
        sizes = [_bytes(self.state), _bytes(self.replicated), shards, _bytes(self.activations)]
        return [self.name, f"{self.parameters / 1e6:,.1f} M", self.codes, *sizes, samples]


def large() -> list[str]:
    """The names of the configurations that are marked as large."""
    return [name for name in shipped_configs() if Path(find_config(name)).read_text(encoding="utf-8").startswith(LARGE)]


def config_of(name: str) -> Any:
    """The configuration as its script reads it, with a placeholder for each path that it needs."""
    tree = load_tree(name) | {"run": "run"}
    return TokenizerTrainConfig.from_dict(tree) if "tokenizer" in tree else PriorTrainConfig.from_dict(tree | {"codes": "codes"})


def tokenizer_of(prior: str) -> str:
    """The tokenizer of the same folder whose codes a prior takes: the one with the longest name that its own begins with, else vqvae."""
    folder, stem = prior.split("/")
    beside = [n.split("/")[1] for n in shipped_configs() if n.split("/")[0] == folder and "tokenizer" in load_tree(n)]
    return f"{folder}/{max((n for n in beside if stem.startswith(n)), key=len, default='vqvae')}"


def signal_of(name: str) -> SignalSpec:
    """The geometry of the data that a large configuration is for."""
    side, _ = DATA[name.split("/")[0]]
    return SignalSpec("image", 3, (side, side))


def levels_of(tokenizer: str) -> tuple[LevelSpec, ...]:
    """The levels of codes of a tokenizer's configuration."""
    config = config_of(tokenizer).tokenizer
    module: Any = build_on_meta(TOKENIZERS.get(config.type_name), config, signal_of(tokenizer))
    return tuple(module.level_specs())


def spec_of(prior: str) -> CodesSpec:
    """What a prior of this name is told of its codes."""
    _, classes = DATA[prior.split("/")[0]]
    return CodesSpec(levels_of(tokenizer_of(prior)), "0" * 64, tuple(str(i) for i in range(classes)), (1,) * classes)


def row(name: str, measure: bool = True) -> Row:
    """The figures of one configuration; without ``measure``, 0 for the activations, which take seconds."""
    config = config_of(name)
    if "tokenizer" in type(config).model_fields:
        module: Any = build_on_meta(TOKENIZERS.get(config.tokenizer.type_name), config.tokenizer, signal_of(name))
        levels, sharded = module.level_specs(), False
        activations = tokenizer_activations(config.tokenizer, signal_of(name)) if measure else 0
    else:
        spec = spec_of(name)
        module = build_on_meta(PRIORS.get(config.prior.type_name), config.prior, spec)
        levels, sharded = module.own, True
        activations = prior_activations(config.prior, spec) if measure else 0
    weights, statistics = tensor_bytes(module.parameters()), tensor_bytes(module.buffers())
    state = 2 * weights + state_bytes(module, config.optim) + statistics  # with gradients
    positions = sum(level.positions for level in levels)
    return Row(
        name=name,
        parameters=sum(p.numel() for p in module.parameters()),
        codes=" + ".join(f"{'x'.join(map(str, level.shape))} of {level.vocab:,}" for level in levels),
        state=state,
        replicated=state + weights,  # DDP's buckets are a second copy of the gradients
        shards=state // PROCESSES + weights if sharded else 0,  # validation gathers the weights on every process
        activations=activations,
        samples=config.batch_size,
        tokens=config.batch_size * positions,
    )


# Activations -------------------------------------------------------------------------------------------------------
def saved_bytes(module: nn.Module, forward: Any) -> int:
    """What autograd keeps of ``forward()`` until the backward pass, without the parameters themselves: each storage once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def tokenizer_activations(config: Any, signal: SignalSpec) -> int:
    """Of one sample in float32, at no more than MEASURED_SIDE pixels a side and in proportion to the pixels."""
    side = min(MEASURED_SIDE, signal.shape[0])
    module = TOKENIZERS.build(config, SignalSpec("image", signal.channels, (side, side))).train()
    x, rng = torch.zeros(1, signal.channels, side, side), StepRng(0, 0, torch.zeros(1, dtype=torch.int64))
    return saved_bytes(module, lambda: module(x, rng=rng)) * (signal.shape[0] // side) ** 2


def prior_activations(config: Any, spec: CodesSpec) -> int:
    """Of one sample in float32. Blocks are alike: those of a transformer are measured with one and two of them."""
    uniform = config.type_name in ("gpt", "maskgit")
    depths = (1, 2) if uniform else (config.depth,)
    found = [_prior_activations(config.replace(depth=depth), spec) for depth in depths]
    return found[0] + (config.depth - 1) * (found[1] - found[0]) if uniform else found[0]


def _prior_activations(config: Any, spec: CodesSpec) -> int:
    prior = PRIORS.build(config, spec).train()
    codes = [torch.zeros(1, *level.shape, dtype=torch.int64) for level in spec.levels[: prior.levels.stop]]
    index = torch.zeros(1, dtype=torch.int64)
    cond = Cond(label=index) if prior.conditional else None
    return saved_bytes(prior, lambda: prior.loss(codes, cond, StepRng(0, 0, index)))


# The document ------------------------------------------------------------------------------------------------------
def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table in Markdown."""
    yield f"| {' | '.join(HEADING)} |"
    yield f"|{'---|' * len(HEADING)}"
    yield from (f"| {' | '.join(each.cells())} |" for each in rows)


def main(argv: list[str] | None = None) -> None:
    names = list(sys.argv[1:] if argv is None else argv)
    assert len(HEADING) == len(fields(Row)) - 1
    text = "\n".join(lines([row(name) for name in large()])) + "\n"
    if not names:
        print(text, end="")
        return
    path = Path(names[0])
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)
    if not (found and after[1]):
        raise SystemExit(f"error: {path} holds no {BEGIN.strip()} ... {END}")
    path.write_text(before + BEGIN + text + END + after[2], encoding="utf-8")


if __name__ == "__main__":
    main()
