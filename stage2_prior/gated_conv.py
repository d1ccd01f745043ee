"""Gated convolutions that see no future: a vertical stack over the rows above, a horizontal one over the row so far.

Van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders". Two stacks have no blind spot: the vertical
one reaches every position of the rows above, the horizontal one those to the left, and is told what the vertical one sees.
Masks are made by shifting and padding: the input is shifted by one row (one column) once, and kernels are cut to
the part that looks back, so that no multiplication is spent on masked weights.

Tensors are (B, rows, columns, features).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shift_down(x: Tensor) -> Tensor:
    """Row r becomes row r + 1; row 0 becomes zero."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


def shift_right(x: Tensor) -> Tensor:
    """Column c becomes column c + 1; column 0 becomes zero."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def gate(x: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b) of the two halves of the features (eq. 2)."""
    a, b = x.chunk(2, -1)
    return torch.tanh(a) * torch.sigmoid(b)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (B, rows, columns, features), which is channels-last memory: no copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@dataclass
class Buffers:
    """What one layer keeps between steps; written in place.

    Attributes:
        above: (B, kernel rows - 1, columns + 2 pad, D), the vertical stack's last input rows, padded.
        left: (B, columns + kernel columns - 1, D), the horizontal stack's inputs of this row, padded on the left.
        told: (B, columns, 2D), what the vertical stack and the context tell this row's gates.
        weight: (2D, kernel columns * D), the horizontal kernel as a matrix.
    """

    above: Tensor
    left: Tensor
    told: Tensor
    weight: Tensor


class GatedLayer(nn.Module):
    """One layer of both stacks, each with a residual connection.

    Args:
        width: D, features of each stack.
        kernel: odd; the vertical kernel sees (kernel + 1) / 2 rows of ``kernel`` columns, the horizontal one (kernel + 1) / 2 columns.
        scale: of the initial weights of what is added to the stacks, such as depth^-1/2.
        last: no layer follows that would read the vertical stack, so that it is not brought up to date.
    """

    def __init__(self, width: int, kernel: int, scale: float, last: bool = False) -> None:
        super().__init__()
        self.reach, self.side = (kernel + 1) // 2, kernel // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach), bias=False)
        self.tell = nn.Linear(2 * width, 2 * width)
        self.context = nn.Linear(width, 2 * width if last else 4 * width, bias=False)
        self.horizontal_out = nn.Linear(width, width)
        self.vertical_out = None if last else nn.Linear(width, width)
        for out in (self.vertical_out, self.horizontal_out):
            if out is not None:
                out.weight.data *= scale

    def _vertical(self, rows: Tensor, v: Tensor, context: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The padded rows that the kernel sees to the new v, and what this layer tells the horizontal gates."""
        inside = convolve(self.vertical, rows)
        told = self.tell(inside)
        if self.vertical_out is None:
            return v, told + context
        to_h, to_v = context.chunk(2, -1)
        branch = self.vertical_out(gate(inside + to_v))
        return v + (branch if keep is None else branch * keep), told + to_h

    def forward(self, v: Tensor, h: Tensor, context: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One layer over the whole grid.

        Args:
            v, h: (B, R, C, D), shifted at the input of the stack.
            context: what ``self.context`` makes of it, broadcastable to (B, R, C, ...).
            keep: (B, 2, D) factors of what is added to each stack, the same for all positions (dropout); None for none.
        """
        for_v, for_h = (None, None) if keep is None else keep[:, :, None, None].unbind(1)
        new_v, told = self._vertical(F.pad(v, (0, 0, self.side, self.side, self.reach - 1, 0)), v, context, for_v)
        branch = self.horizontal_out(gate(convolve(self.horizontal, F.pad(h, (0, 0, self.reach - 1, 0))) + told))
        return new_v, h + (branch if for_h is None else branch * for_h)

    # One row, one position -------------------------------------------------------------------------------------
    def begin(self, batch: int, columns: int, like: Tensor) -> Buffers:
        width = self.horizontal_out.in_features
        return Buffers(
            like.new_zeros(batch, self.reach - 1, columns + 2 * self.side, width),
            like.new_zeros(batch, columns + self.reach - 1, width),
            like.new_zeros(batch, columns, 2 * width),
            self.horizontal.weight[:, :, 0].transpose(1, 2).flatten(1),
        )

    def start_row(self, buffers: Buffers, v: Tensor, context: Tensor) -> Tensor:
        """The vertical stack of one row: v (B, 1, C, D) to the next layer's v; context as in ``forward``, of this row."""
        rows = torch.cat([buffers.above, F.pad(v, (0, 0, self.side, self.side))], 1)
        buffers.above = rows[:, 1:]
        new_v, told = self._vertical(rows, v, context)
        buffers.told = told[:, 0]
        return new_v

    def step(self, buffers: Buffers, h: Tensor, column: int) -> Tensor:
        """The horizontal stack at one position of the row: h (B, D) to the next layer's h."""
        buffers.left[:, column + self.reach - 1] = h
        window = buffers.left[:, column : column + self.reach].flatten(1)
        inside = F.linear(window, buffers.weight)
        return h + self.horizontal_out(gate(inside + buffers.told[:, column]))
