"""A transformer trunk, causal or not: pre-norm blocks of attention and a gated feed-forward, with the cache as an argument.

RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), optional rotary positions (Su et al. 2021), no biases: the blocks
of LLaMA (Touvron et al. 2023). Positions reach it through its input or through ``rotary``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.attention import Past, attend
from stage2_prior.packed import Projection, packed

NORM_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (length, head dim)
Projections = tuple[Projection, Projection, Projection, Projection]


@dataclass
class Cache:
    """What ``append`` goes on from, and adds to.

    Attributes:
        pasts: each block's keys and values.
        projections: each block's (qkv, out, gate_up, down) as they were when the cache was made, packed.
        length: how many places there are.
    """

    pasts: Sequence[Past]
    projections: Sequence[Projections]
    length: int = 0


def rotary_tables(coordinates: Tensor, dim: int, base: float = 10000.0) -> Rotary:
    """Cosines and sines of rotary positions over 1, 2 or 3 axes.

    The dim / 2 frequencies base^(-2i/dim) of Su et al. 2021, eq. 15, are dealt to the axes in turn, so that each axis has
    fast and slow ones; with one axis this is the ordinary embedding, in the half-split layout of LLaMA.

    Args:
        coordinates: (length, axes).

    Returns:
        two (length, dim) tensors of the dtype of ``coordinates``.
    """
    axes = coordinates.shape[1]
    if dim % 2 or dim // 2 < axes:
        raise ValueError(f"prior.heads: rotary positions over {axes} axes need an even head dimension >= {2 * axes}; got {dim}")
    index = torch.arange(dim // 2, device=coordinates.device)
    frequency = base ** (-2 * index.to(coordinates.dtype) / dim)
    angle = coordinates[:, index % axes] * frequency
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x: (..., length, dim), turned in the planes (i, i + dim / 2)."""
    cos, sin = rotary
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Attention(nn.Module):
    """Self-attention over the places of a sequence, queries, keys and values from one product; ``cached`` is the same for one
    stretch after another of a causal one."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3D) to queries, keys and values (B, heads, L, head dim)."""
        batch, length, width = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, width // 3 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
        return q, k, v

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = self.split(packed(self.qkv)(x), rotary)
        return packed(self.out)(attend(q, k, v, self.causal).transpose(1, 2).flatten(2))

    def cached(self, x: Tensor, rotary: Rotary | None, cache: Cache, layer: int) -> Tensor:
        """The same for the places that follow those in the cache, which takes up their keys and values."""
        project, out, _, _ = cache.projections[layer]
        q, k, v = self.split(project(x), rotary)
        past = cache.pasts[layer]
        past.write(cache.length, k, v)
        return out(past.hear(q, cache.length + x.shape[1]).transpose(1, 2).flatten(2))


def feed_forward_width(width: int) -> int:
    """About 8/3 of the width, so that a feed-forward with a gate costs what one of 4 times the width costs without."""
    return 32 * math.ceil(8 * width / 3 / 32)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = feed_forward_width(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, packed(self.gate_up), packed(self.down))


def swiglu(x: Tensor, gate_up: Projection, down: Projection) -> Tensor:
    """down(silu(gate) * up), with gate and up in one projection (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up(x).chunk(2, -1)
    return down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, causal)
        self.feed_forward_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, rotary: Rotary | None, keep: Tensor | None) -> Tensor:
        branch = self.attention(self.attention_norm(x), rotary)
        x = x + (branch if keep is None else branch * keep[:, 0])
        branch = self.feed_forward(self.feed_forward_norm(x))
        return x + (branch if keep is None else branch * keep[:, 1])

    def cached(self, x: Tensor, rotary: Rotary | None, cache: Cache, layer: int) -> Tensor:
        x = x + self.attention.cached(self.attention_norm(x), rotary, cache, layer)
        return x + swiglu(self.feed_forward_norm(x), *cache.projections[layer][2:])

    def projections(self) -> Projections:
        attention, feed_forward = self.attention, self.feed_forward
        return packed(attention.qkv), packed(attention.out), packed(feed_forward.gate_up), packed(feed_forward.down)


class Transformer(nn.Module):
    """A stack of ``depth`` blocks and a last norm.

    Args:
        width: D; a multiple of ``heads``.
        causal: place i sees places 0..i; else every place sees all.
    """

    def __init__(self, width: int, depth: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"prior.width: {width} is no multiple of prior.heads, {heads}")
        self.width, self.depth, self.heads = width, depth, heads
        self.blocks = nn.ModuleList(Block(width, heads, causal) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.reset()

    def reset(self) -> None:
        """Normal weights of variance 1 / fan-in; the branches' last layers are scaled by 1 / sqrt(2 depth) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * ((2 * self.depth) ** -0.5 if last else 1.0))

    @property
    def stack(self) -> Sequence[Block]:
        return cast(Sequence[Block], self.blocks)

    def forward(self, x: Tensor, rotary: Rotary | None = None, keep: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D).

        Args:
            rotary: tables of these L places.
            keep: (B, depth, 2, D) factors of the branches' channels, the same for all places (dropout); None for none.
        """
        for layer, block in enumerate(self.stack):
            x = block(x, rotary, None if keep is None else keep[:, layer, :, None])
        return self.norm(x)

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``capacity`` places."""
        weight, dim = self.norm.weight, self.width // self.heads
        pasts = [Past(weight, batch, self.heads, capacity, dim) for _ in self.stack]
        return Cache(pasts, [block.projections() for block in self.stack])

    def append(self, x: Tensor, cache: Cache, rotary: Rotary | None = None) -> Tensor:
        """``forward`` of the L places that follow those in ``cache``, which takes them up: one place, or several at first.

        Args:
            rotary: tables of these L places.
        """
        if cache.length and x.shape[1] > 1:
            raise ValueError(f"cache: {x.shape[1]} places at once after {cache.length}; only the first call takes several")
        for layer, block in enumerate(self.stack):
            x = block.cached(x, rotary, cache, layer)
        cache.length += x.shape[1]
        return self.norm(x)
