"""A layer from elsewhere as a Quantizer: two small functions say how it is called."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.base import Quantized, Quantizer


class Adapter(Quantizer):
    """Calls ``layer`` on (B, N, D) latents, the grid flattened.

    What the layer does to itself in its forward, it does: ``update`` does nothing, and ``initialize`` is one forward in training. There
    are no samples that do not count (``active``), and no other processes.

    Args:
        layer: the module under test; it is a submodule, so that its state is the adapter's.
        dim: D.
        vocabs: the size of each map of codes.
        quantize: (layer, (B, N, D)) -> (quantised latents (B, N, D), one (B, N) tensor of codes for each map, loss ()).
        decode: (layer, the maps (B, N)) -> (B, N, D). It is asked for one map of each size in ``vocabs``, with ``dropout`` for fewer that
            lead; another count is refused here, by a ValueError.
        dropout: a residual layer that leaves out its last stages for some samples in training, and gives -1 for the codes of those. They
            become 0 here and the number of stages that count ``Quantized.depth``; ``decode`` gets -1 again for the stages beyond it, and
            for those that are not given. Without it -1 is an error.
    """

    type_name = "adapter"
    initialized: Tensor

    def __init__(
        self,
        layer: nn.Module,
        dim: int,
        vocabs: tuple[int, ...],
        quantize: Callable[[nn.Module, Tensor], tuple[Tensor, tuple[Tensor, ...], Tensor]],
        decode: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.dim, self.vocabs, self.dropout = layer, dim, vocabs, dropout
        self._quantize, self._decode = quantize, decode
        self.register_buffer("initialized", torch.tensor(False))

    def extra_repr(self) -> str:
        return type(self.layer).__name__

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        names = [name] if len(self.vocabs) == 1 else [f"{name}/{i}" for i in range(len(self.vocabs))]
        return tuple(LevelSpec(level, vocab, grid) for level, vocab in zip(names, self.vocabs, strict=True))

    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1 if self.dropout else len(self.vocabs), len(self.vocabs) + 1))

    @torch.no_grad()
    def initialize(self, z: Tensor, rng: StepRng) -> None:
        if not bool(self.initialized):
            self.layer.train()
            self._quantize(self.layer, z[None])
            self.initialized.fill_(True)

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        if active is not None:
            raise ValueError("active: an adapted layer counts all samples")
        grid = z.shape[2:]
        z_q, codes, loss = self._quantize(self.layer, z.flatten(2).movedim(1, -1))
        codes, depth = self._without_dropped(codes)
        return Quantized(
            z_q.movedim(-1, 1).reshape(len(z), -1, *grid),
            tuple(c.reshape(len(z), *grid) for c in codes),
            loss if torch.is_tensor(loss) and loss.ndim == 0 else torch.as_tensor(loss).sum(),
            depth=depth,
        )

    def _without_dropped(self, codes: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Maps (B, N) with 0 in place of -1, and the stages (B,) of each sample that count; None where all do."""
        if not any(bool((c == -1).any()) for c in codes):
            return codes, None
        dropped = torch.stack([(c == -1).flatten(1).all(1) for c in codes])
        depth = (~dropped).sum(0)
        whole = all(torch.equal(c == -1, d[:, None].expand_as(c)) for c, d in zip(codes, dropped, strict=True))
        trailing = torch.equal(dropped, torch.arange(len(codes), device=depth.device)[:, None] >= depth)
        if not (self.dropout and whole and trailing):
            raise ValueError("codes: -1, which is no code; a layer that leaves out the last stages of a sample wants Adapter(dropout=True)")
        return tuple(c.clamp_min(0) for c in codes), depth

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        if len(codes) not in self.prefixes():
            raise ValueError(f"codes: {len(codes)} maps; it decodes {', '.join(map(str, self.prefixes()))}")
        grid = codes[0].shape[1:]
        maps = [c.reshape(len(c), math.prod(grid)) for c in codes]
        if self.dropout and any(bool((c < 0).any()) for c in maps):
            raise ValueError("codes: a negative one; how many stages count is said by depth")
        if depth is not None:
            maps = [torch.where((depth > i)[:, None], c, -1) for i, c in enumerate(maps)]
        if self.dropout:
            maps += [torch.full_like(maps[0], -1)] * (len(self.vocabs) - len(maps))
        z_q = self._decode(self.layer, tuple(maps))
        return z_q.movedim(-1, 1).reshape(len(z_q), -1, *grid)
