"""Gated convolutions that see no future: a vertical stack over the rows above, a horizontal one over the row so far.

Van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders". Two stacks have no blind spot: the vertical
one reaches every position of the rows above, the horizontal one those to the left, and is told what the vertical one sees.
Masks are made by shifting and padding: the input is shifted by one row (one column) once, and kernels are cut to
the part that looks back, so that no multiplication is spent on masked weights.

Tensors are (B, rows, columns, features).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.packed import Projection, packed, packed_matrix


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


def gate_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``gate`` without gradients, for float32 and wider in three operations; ``x``, of which a and b are the halves, is overwritten.

    tanh(a) = 1 - 2 sigmoid(-2a), and torch's sigmoid is five times as fast as its tanh on a CPU. In half precision the difference
    of the two terms would lose what small values are about.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return torch.tanh(a) * torch.sigmoid(b)
    a.mul_(-2)
    x.sigmoid_()
    return torch.addcmul(b, a, b, value=-2)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (B, rows, columns, features), which is channels-last memory: no copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@dataclass
class Buffers:
    """What one layer keeps between steps; written in place. A step is a few small operations, so that views are made once.

    Attributes:
        rows: (B, kernel rows, columns + 2 pad, D), the vertical stack's last input rows, padded.
        around, window: (B, columns, kernel rows, kernel columns, D), what the vertical kernel sees of them, as a view and copied.
        places, windows: of each column, the (B, D) where its input to the horizontal stack goes and the (B, kernel columns * D)
            that its kernel sees; all of one tensor, 0 to the left of column 0.
        told: of each column of this row, (B, 2D): what the vertical stack and the context tell its gates.
        inside, halves: (B, 2D), where the horizontal gates are computed, and its halves.
        kernel, out, bias: (kernel columns * D, 2D), (D, D) and (D,), the horizontal weights as they are multiplied from the right.
        vertical, tell: the two large products of the vertical stack, the first over windows of (kernel rows * columns * D).
    """

    rows: Tensor
    around: Tensor
    window: Tensor
    places: Sequence[Tensor]
    windows: Sequence[Tensor]
    told: Sequence[Tensor]
    inside: Tensor
    halves: Sequence[Tensor]
    kernel: Tensor
    out: Tensor
    bias: Tensor
    vertical: Projection
    tell: Projection


class GatedLayer(nn.Module):
    """One layer of both stacks, each with a residual connection.

    Args:
        width: D, features of each stack.
        kernel: odd; the vertical kernel sees (kernel + 1) / 2 rows of ``kernel`` columns, the horizontal one (kernel + 1) / 2 columns.
        scale: of the initial weights of what is added to the stacks, such as depth^-1/2.
        last: no layer follows that would read the vertical stack, so that it is not brought up to date.

    Attributes:
        context: what a caller applies to what is known of each position before it is told here: a D vector to
            [for the horizontal gates 2D, for the vertical ones 2D], the last layer's without the second half.
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

    def forward(self, v: Tensor, h: Tensor, told: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One layer over the whole grid.

        Args:
            v, h: (B, R, C, D), shifted at the input of the stack.
            told: what ``self.context`` makes of what is known, broadcastable to (B, R, C, ...).
            keep: (B, 2, D) factors of what is added to each stack, the same for all positions (dropout); None for none.
        """
        for_v, for_h = (None, None) if keep is None else keep[:, :, None, None].unbind(1)
        inside = convolve(self.vertical, F.pad(v, (0, 0, self.side, self.side, self.reach - 1, 0)))
        to_h = self.tell(inside)
        if self.vertical_out is None:
            to_h = to_h + told
        else:
            from_context, to_v = told.chunk(2, -1)
            to_h = to_h + from_context
            branch = self.vertical_out(gate(inside + to_v))
            v = v + (branch if for_v is None else branch * for_v)
        branch = self.horizontal_out(gate(convolve(self.horizontal, F.pad(h, (0, 0, self.reach - 1, 0))) + to_h))
        return v, h + (branch if for_h is None else branch * for_h)

    # One row, one position: the same without gradients -----------------------------------------------------------
    def begin(self, batch: int, columns: int) -> Buffers:
        """For ``batch`` samples before their first row."""
        like, width = self.horizontal_out.weight, self.horizontal_out.in_features
        left = like.new_zeros(batch, columns + self.reach - 1, width)
        inside = like.new_zeros(batch, 2 * width)
        rows = like.new_zeros(batch, self.reach, columns + 2 * self.side, width)
        around = rows.unfold(2, 2 * self.side + 1, 1).permute(0, 2, 1, 4, 3)
        matrix, bias = rearrange(self.vertical.weight, "o d r k -> o (r k d)"), self.vertical.bias
        return Buffers(
            rows=rows,
            around=around,
            window=torch.empty_like(around, memory_format=torch.contiguous_format),
            places=left[:, self.reach - 1 :].unbind(1),
            windows=[left[:, c : c + self.reach].flatten(1) for c in range(columns)],
            told=(),
            inside=inside,
            halves=inside.chunk(2, -1),
            kernel=rearrange(self.horizontal.weight, "o d 1 k -> (k d) o").contiguous(),
            out=self.horizontal_out.weight.t().contiguous(),
            bias=self.horizontal_out.bias,
            vertical=packed_matrix(matrix, bias) or partial(F.linear, weight=matrix, bias=bias),
            tell=packed(self.tell),
        )

    def start_row(self, buffers: Buffers, v: Tensor, told: Tensor) -> Tensor:
        """The vertical stack of one row: v (B, C, D) to the next layer's v; ``told`` as in ``forward``, of this row."""
        buffers.rows[:, :-1] = buffers.rows[:, 1:].clone()
        buffers.rows[:, -1, self.side : -self.side] = v
        inside = buffers.vertical(buffers.window.copy_(buffers.around).flatten(2))
        to_h = buffers.tell(inside)
        if self.vertical_out is None:
            buffers.told = to_h.add_(told).unbind(1)
            return v
        from_context, to_v = told.chunk(2, -1)
        buffers.told = to_h.add_(from_context).unbind(1)
        inside.add_(to_v)
        return v + self.vertical_out(gate_(inside, *inside.chunk(2, -1)))

    def step(self, buffers: Buffers, h: Tensor, column: int) -> Tensor:
        """The horizontal stack at one position of the row: h (B, D) to the next layer's h."""
        buffers.places[column].copy_(h)
        torch.addmm(buffers.told[column], buffers.windows[column], buffers.kernel, out=buffers.inside)
        return torch.addmm(h, gate_(buffers.inside, *buffers.halves), buffers.out).add_(buffers.bias)
