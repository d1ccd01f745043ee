"""What quantisers made of quantisers share: parts, each with draws of its own, that are asked one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from intarsia.distributed import Comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, Quantizer, QuantizerConfig


def named(stats: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scalars of part i as "name/i"; what was "name/j" inside of it as "name/i/j"."""
    return {"/".join([name.split("/")[0], str(i), *name.split("/")[1:]]): v for i, part in enumerate(stats) for name, v in part.items()}


def joined_likely(outs: Sequence[Quantized]) -> tuple[Tensor, ...] | None:
    """``Quantized.likely`` of all parts, each given what those before it drew; None where training draws nothing."""
    if all(out.likely is None for out in outs):
        return None
    return tuple(codes for out in outs for codes in (out.codes if out.likely is None else out.likely))


class Composite(Quantizer):
    """Parts of one configuration. Part i has the levels "name/i", or "name/i/j" where it is a composite itself.

    Attributes:
        parts: the distinct quantisers; one where all share it.
        count: how often a part is used in one forward.
        maps: the maps of codes of one part.
    """

    def __init__(self, inner: QuantizerConfig, count: int, shared: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(QUANTIZERS.build(inner) for _ in range(1 if shared else count))
        self.count = count
        self.maps = len(self.part(0).level_specs("codes", (1,)))
        if len(self.part(0).prefixes()) > 1:
            raise ValueError(f"{self.type_name}.inner: {inner.type_name} has quantiser dropout; only the outermost quantiser may")

    def part(self, i: int) -> Quantizer:
        """What the i-th use calls."""
        part = self.parts[i % len(self.parts)]
        assert isinstance(part, Quantizer)
        return part

    def distinct(self) -> Iterator[tuple[int, Quantizer]]:
        """(number, part), each once."""
        return ((i, self.part(i)) for i in range(len(self.parts)))

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        return tuple(level for i in range(self.count) for level in self.part(i).level_specs(f"{name}/{i}", grid))

    def split_codes(self, codes: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The maps of each part. Raises ValueError for a count that ``prefixes`` does not list."""
        if len(codes) not in self.prefixes():
            raise ValueError(f"codes: {len(codes)} maps; {self.type_name} decodes {', '.join(map(str, self.prefixes()))}")
        return [codes[start : start + self.maps] for start in range(0, len(codes), self.maps)]

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        return named([part.update(rng.sub(i), comm) for i, part in self.distinct()])

    def discard(self) -> None:
        for _, part in self.distinct():
            part.discard()

    @property
    def passes(self) -> int:
        return self.part(0).passes

    def reestimate(self, comm: Comm, number: int = 0) -> None:
        for _, part in self.distinct():
            part.reestimate(comm, number)

    def finite(self) -> Tensor:
        return torch.stack([part.finite() for _, part in self.distinct()]).all()

    def code_tensors(self) -> dict[str, Tensor]:
        return {f"parts.{i}.{name}": tensor for i, part in self.distinct() for name, tensor in part.code_tensors().items()}
