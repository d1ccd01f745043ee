"""What a prior knows beside its own codes: where it is, the label, and the codes of the levels above.

Inside this room a label is an integer in [0, classes]; ``classes`` stands for the learned null, which takes the place of a
dropped condition in training and of ``cond=None`` in use (classifier-free guidance, Ho and Salimans 2022). It never
leaves the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from intarsia.specs import LevelSpec
from stage2_prior.digits import code_table, sizes_of
from stage2_prior.layout import Layout, nearest_cells

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Context:
    """What the trunk is told.

    Attributes:
        aligned: (B or 1, N, D), of each place in the sequence: the position itself and the upper codes there.
        whole: (B, D), of the sample as a whole: its label, or the learned null; None for a prior without conditions.
    """

    aligned: Tensor
    whole: Tensor | None = None


def embedding(count: int, width: int, std: float) -> nn.Embedding:
    """A table of normal vectors."""
    table = nn.Embedding(count, width)
    nn.init.normal_(table.weight, std=std)
    return table


def _block(axes: int, width: int) -> nn.Sequential:
    """The branch of a residual convolution, 0 at first."""
    conv = _CONV[axes]
    last = conv(width, width, 1)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.SiLU(), conv(width, width, 3, padding=1), nn.SiLU(), last)


class UpperCodes(nn.Module):
    """Codes of the levels above, on the grid of a level below: embedded, upsampled to the nearest cell, then convolved.

    The residual convolutions see to both sides (upper codes are known in full), so that a place is told about its
    neighbourhood too, as the conditioning stack of VQ-VAE-2's bottom prior does (Razavi et al. 2019, appendix).
    """

    def __init__(self, upper: Sequence[LevelSpec], levels: Sequence[LevelSpec], width: int, blocks: int = 2) -> None:
        super().__init__()
        axes = len(levels[0].shape)
        if axes not in _CONV:
            raise ValueError(f"prior.levels: a grid of {axes} axes; expected 1, 2 or 3")
        for level in upper:
            if len(level.shape) != axes:
                raise ValueError(f"prior.levels: {level.name!r} has a grid {level.shape}; expected {axes} axes, as below it")
            for shape in (below.shape for below in levels):
                if any(coarse > fine for coarse, fine in zip(level.shape, shape, strict=True)):  # codes under no cell are never seen
                    raise ValueError(f"prior.levels: {level.name!r} has a grid {level.shape}, finer than {shape} below it")
        self.shapes = [level.shape for level in levels]
        self.coarse = [level.shape for level in upper]
        self._cells: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], Tensor] = {}
        self.tables = nn.ModuleList(code_table(sizes_of(u, "auto"), width, len(upper) ** -0.5) for u in upper)
        self.blocks = nn.ModuleList(_block(axes, width) for _ in range(blocks))

    def _under(self, coarse: tuple[int, ...], fine: tuple[int, ...], device: torch.device) -> Tensor:
        """``nearest_cells``, copied to the device once: a copy at every step would wait for it."""
        key = (coarse, fine, device)
        if key not in self._cells:
            with torch.inference_mode(False):  # it outlives the call, and training must be able to save it
                self._cells[key] = nearest_cells(coarse, fine).to(device)
        return self._cells[key]

    def forward(self, upper: Sequence[Tensor]) -> list[Tensor]:
        """One (B, *shape) int64 tensor per upper level to one (B, positions, D) per level below."""
        embedded = [table(codes.flatten(1)) for table, codes in zip(self.tables, upper, strict=True)]
        out = []
        for shape in self.shapes:
            x = sum(e[:, self._under(coarse, shape, e.device)] for e, coarse in zip(embedded, self.coarse, strict=True))
            grid = rearrange(x, "b p d -> b d p").unflatten(2, shape)
            for block in self.blocks:
                grid = grid + block(grid)
            out.append(rearrange(grid.flatten(2), "b d p -> b p d"))
        return out


class ContextEncoder(nn.Module):
    """Makes a ``Context`` for the sequence of ``layout``.

    Args:
        layout: of the levels that the prior models.
        upper: the levels above them.
        classes: how many labels there are; 0 for a prior without conditions.
        null: whether there is a learned null.
        positions: a learned vector for each position; where False (rotary positions) one for each level.
    """

    def __init__(self, layout: Layout, upper: Sequence[LevelSpec], width: int, classes: int, null: bool, positions: bool = True) -> None:
        super().__init__()
        self.layout = layout
        self.places = nn.ParameterList(nn.Parameter(torch.empty(size if positions else 1, width)) for size in layout.sizes)
        self.upper = UpperCodes(upper, layout.levels, width) if upper else None
        self.label = embedding(classes + null, width, 0.5) if classes else None
        for place in self.places:
            nn.init.normal_(place, std=0.1)

    def forward(self, upper: Sequence[Tensor], label: Tensor | None) -> Context:
        """
        Args:
            upper: one (B, *shape) int64 tensor for each level above.
            label: (B,) int64 in [0, classes], ``classes`` for the null; None for a prior without conditions.
        """
        maps = [place.expand(size, -1)[None] for place, size in zip(self.places, self.layout.sizes, strict=True)]
        if self.upper is not None:
            maps = [m + u for m, u in zip(maps, self.upper(upper), strict=True)]
        return Context(self.layout.join(maps), None if self.label is None else self.label(label))
