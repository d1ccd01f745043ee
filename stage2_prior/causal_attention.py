"""Attention over all earlier positions of a grid, between the layers of a PixelCNN (PixelSNAIL, Chen et al. 2017).

Convolutions reach as far as their kernels add up to; attention reaches the whole past at once. As in PixelSNAIL, a position
asks and answers by its features and by its input, and what it hears goes through a gate. Here the input at place i is the code
of place i - 1 in raster order, and the features of place i have seen only codes before i, so that place i may attend to the
places 0..i, itself included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage2_prior.attention import Past, attend
from stage2_prior.gated_conv import gate, gate_


@dataclass
class Memory:
    """What one place after the other needs.

    Attributes:
        past: keys and values of the places so far.
        qkv, mix, out: (2D, 3D), (D, 2D) and (D, D), the weights as they are multiplied from the right.
        told: of each column of this row, (B or 1, 3D): what the context adds to queries, keys and values.
    """

    past: Past
    qkv: Tensor
    mix: Tensor
    out: Tensor
    told: tuple[Tensor, ...] = ()


class CausalAttention(nn.Module):
    """h + out(gate(mix(attention(norm(h), input, context)))).

    Args:
        width: D, features of ``h`` and of the input; a multiple of ``heads``.
        scale: of the initial weights of what is added to h.

    Attributes:
        context: what a caller applies to what is known of each place before it is told here: D to 3D.
    """

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(2 * width, 3 * width, bias=False)
        self.context = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.out.weight.data *= scale

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3D) to queries, keys and values (B, heads, N, head dim)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, h: Tensor, x: Tensor, told: Tensor, keep: Tensor | None = None) -> Tensor:
        """All places at once.

        Args:
            h: (B, N, D), that of place i having seen codes before i alone.
            x: (B, N, D), the embedded code of the place before; 0 at place 0.
            told: what ``self.context`` makes of what is known, broadcastable to (B, N, 3D).
            keep: (B, D) factors of what is added, the same for all places (dropout); None for none.
        """
        q, k, v = self._split(self.qkv(torch.cat([self.norm(h), x], -1)) + told)
        heard = attend(q, k, v, causal=True).transpose(1, 2).flatten(2)
        branch = self.out(gate(self.mix(heard)))
        return h + (branch if keep is None else branch * keep[:, None])

    # One place: the same without gradients -----------------------------------------------------------------------
    def begin(self, batch: int, places: int) -> Memory:
        """For ``batch`` samples before their first place."""
        weight, width = self.out.weight, self.out.in_features
        qkv, mix, out = (linear.weight.t().contiguous() for linear in (self.qkv, self.mix, self.out))
        return Memory(Past(weight, batch, self.heads, places, width // self.heads), qkv, mix, out)

    def step(self, memory: Memory, h: Tensor, x: Tensor, place: int, column: int) -> Tensor:
        """One place: h and x (B, D) to the h that goes on."""
        asked = torch.cat([self.norm(h), x], 1)
        q, k, v = self._split(torch.addmm(memory.told[column], asked, memory.qkv)[:, None])
        memory.past.write(place, k, v)
        mixed = memory.past.hear(q, place + 1).flatten(1) @ memory.mix
        return torch.addmm(h, gate_(mixed, *mixed.chunk(2, -1)), memory.out)
