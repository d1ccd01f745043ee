"""Small priors for tests: every registered type, conditional or not, one level or several, with or without levels above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.specs import CodesSpec, Cond, LevelSpec
from stage2_prior.priors.base import PRIORS, Prior

TINY: dict[str, dict[str, Any]] = {
    "gpt": {"width": 16, "depth": 2, "heads": 2},
    "rq": {"width": 16, "depth": 2, "heads": 2, "inner": 2},
    "pixelcnn": {"width": 12, "depth": 2},
    "maskgit": {"width": 16, "depth": 2, "heads": 2},
}


@dataclass(frozen=True)
class Case:
    """A type of prior over levels of the given (vocabulary, shape), coarse to fine; a vocabulary is a number or its factors."""

    type: str
    shapes: tuple[tuple[int | tuple[int, ...], tuple[int, ...]], ...]
    levels: str = ""
    classes: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = "-".join(f"{k}={v}" for k, v in self.config.items())
        grids = "+".join("x".join(map(str, shape)) for _, shape in self.shapes)
        return "-".join(filter(None, [self.type, grids, self.levels.replace(":", "to"), f"{self.classes}classes", extra]))

    @property
    def spec(self) -> CodesSpec:
        factors = [vocab if isinstance(vocab, tuple) else (vocab,) for vocab, _ in self.shapes]
        shapes = [shape for _, shape in self.shapes]
        levels = tuple(LevelSpec(f"level{i}", math.prod(f), s, f) for i, (f, s) in enumerate(zip(factors, shapes, strict=True)))
        return CodesSpec(levels, "0" * 64, tuple(f"class{i}" for i in range(self.classes)), (5,) * self.classes)

    def build(self, seed: int = 0, noise: float = 0.4) -> Prior:
        """In eval mode, with weights moved by noise, so that logits are far from uniform and depend on everything."""
        torch.manual_seed(seed)
        config = PRIORS.config(self.type).from_dict({"levels": self.levels, **TINY[self.type], **self.config})
        prior = PRIORS.build(config, self.spec)
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter += noise * torch.randn_like(parameter)
        return prior.eval()

    def codes(self, n: int, seed: int = 0) -> list[Tensor]:
        """Random codes of all levels up to its own last."""
        generator = torch.Generator().manual_seed(seed)
        stop = int(self.levels.split(":")[1]) if self.levels else len(self.shapes)
        return [torch.randint(level.vocab, (n, *level.shape), generator=generator) for level in self.spec.levels[:stop]]

    def cond(self, n: int) -> Cond | None:
        return Cond(label=torch.arange(n) % self.classes) if self.classes else None


# Every type in every setting that decides which code runs.
CASES = [
    Case("gpt", ((5, (3, 4)),), classes=3),
    Case("gpt", ((5, (3, 4)),)),
    Case("gpt", ((5, (3, 4)),), classes=3, config={"positions": "rotary", "heads": 2}),
    Case("gpt", ((7, (9,)),), classes=2),
    Case("gpt", ((4, (2, 2, 3)),), config={"positions": "rotary", "heads": 1}),
    Case("gpt", ((6, (2, 2)), (5, (4, 4))), levels="1:2", classes=3),
    Case("gpt", ((6, (2, 2)), (5, (4, 4))), classes=2),
    Case("gpt", ((6, (2, 2)), (5, (4, 4))), config={"positions": "rotary"}),
    Case("gpt", ((6, (2, 3)), (5, (2, 3)), (3, (2, 3))), levels="1:3", classes=2, config={"order": "position"}),
    Case("gpt", ((5, (7,)),), classes=3, config={"positions": "rotary", "label": "prefix"}),
    Case("gpt", ((6, (2, 2)), (5, (2, 2))), levels="1:2", classes=2, config={"label": "prefix"}),
    Case("gpt", ((5, (3, 3)),), classes=2, config={"positions": "rotary", "trunk": "llama"}),
    Case("gpt", ((5, (2, 3)),), config={"trunk": "llama"}),
    Case("gpt", (((3, 2, 4), (2, 3)),), classes=2, config={"head": "factorised"}),
    Case("gpt", ((6, (2, 2)), ((2, 2, 3), (2, 2)), ((3, 2), (2, 2))), "1:3", 2, {"head": "factorised", "order": "position"}),
    Case("rq", ((6, (2, 3)), (5, (2, 3)), (4, (2, 3))), classes=3),
    Case("rq", ((6, (2, 3)), (5, (2, 3)), (3, (2, 3))), levels="1:3", config={"positions": "rotary"}),
    Case("rq", (((2, 3), (4,)), ((3, 2, 2), (4,))), classes=2, config={"head": "factorised", "label": "prefix"}),
    Case("rq", ((5, (6,)),)),
    Case("pixelcnn", ((5, (3, 4)),), classes=3),
    Case("pixelcnn", ((5, (4, 3)),), config={"kernel": 5}),
    Case("pixelcnn", ((6, (2, 2)), (5, (4, 4))), levels="1:2", classes=3),
    Case("pixelcnn", ((6, (1, 1)), (5, (2, 2)), (4, (5, 4))), levels="2:3"),
    Case("pixelcnn", ((5, (3, 4)),), classes=3, config={"attention": 2}),
    Case("pixelcnn", ((6, (2, 2)), (5, (4, 3))), levels="1:2", config={"attention": 1, "heads": 3}),
    Case("maskgit", ((5, (3, 4)),), classes=3),
    Case("maskgit", ((5, (3, 4)),)),
    Case("maskgit", ((5, (9,)),), classes=2, config={"positions": "rotary"}),
    Case("maskgit", ((4, (2, 2, 3)),), config={"schedule": "arccos"}),
    Case("maskgit", ((6, (2, 2)), (5, (4, 4))), levels="1:2", classes=3),
    Case("maskgit", ((6, (2, 2)), (5, (4, 4))), classes=2),
    Case("maskgit", ((6, (1, 1)), (5, (2, 2)), (4, (4, 4))), levels="1:3", config={"positions": "rotary"}),
]


class Leaves:
    """Makes what the prior's own code tables return into leaves, so that a gradient tells which codes an output has seen.

    Attributes:
        found: one (B, positions, D) tensor per table, after a forward.
    """

    def __init__(self, tables: Sequence[nn.Module]) -> None:
        self.found: list[Tensor] = []
        self.handles = [table.register_forward_hook(self._hook) for table in tables]

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self.found.append(leaf)
        return leaf

    def __enter__(self) -> Leaves:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def all_grids(levels: Sequence[LevelSpec]) -> list[Tensor]:
    """Every assignment of codes to the positions of these levels: one (count, *shape) tensor each."""
    vocabs = [level.vocab for level in levels for _ in range(level.positions)]
    flat = torch.cartesian_prod(*[torch.arange(v) for v in vocabs]).view(-1, len(vocabs))
    assert len(flat) == math.prod(vocabs)
    parts = flat.split([level.positions for level in levels], 1)
    return [part.reshape(-1, *level.shape) for part, level in zip(parts, levels, strict=True)]
