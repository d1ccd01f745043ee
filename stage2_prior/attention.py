"""softmax(q k^T / sqrt(dim)) v: of all places at once, and of one after the other, which keeps keys and values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = (torch.float32, torch.float64)
EXPLICIT_LENGTH = 512  # longest sequence whose attention is computed explicitly in half precision on a CPU
TILE = 64  # places by which the memory of a ``Past`` grows on a CPU


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, heads, length, dim) tensors to one.

    In half precision on a CPU, torch's fused kernel is 4 to 9 times slower than the plain products for short sequences:
    there the plain ones run, with the softmax in float32. In float32 and wider that kernel rounds a row differently by its place
    in the batch where the number of queries is no multiple of 4, mostly with several threads: without gradients it gets zeros more.
    """
    length = q.shape[-2]
    if q.device.type == "cpu" and q.dtype in WHOLE and length % 4 and not torch.is_grad_enabled():
        more = F.pad(q, (0, 0, 0, -length % 4))
        return F.scaled_dot_product_attention(more, k, v, is_causal=causal)[..., :length, :]
    if q.device.type != "cpu" or q.dtype in WHOLE or length > EXPLICIT_LENGTH:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full((length, k.shape[-2]), -math.inf, device=q.device).triu(1)
    return torch.softmax(scores, -1).to(v.dtype) @ v


def attend_last(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """``attend`` of one query, (B, heads, 1, dim), to the first ``length`` of the keys.

    On a CPU by plain products, which round a row as any other of the batch (``attend`` would compute 4 queries) and are faster
    for many rows. They go over all keys, at weight 0 over those behind: memory that is read from end to end takes about half of
    the time that it takes with a gap after each head. What lies behind must be finite.
    """
    if q.device.type != "cpu" or q.dtype not in WHOLE:
        return attend(q, k[:, :, :length], v[:, :, :length], causal=False)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if length < k.shape[2]:
        scores[..., length:] = -math.inf
    return torch.softmax(scores, -1) @ v


class Past:
    """Keys and values of the places so far of one attention, written in place.

    Float32 or wider whatever the weights are: single-query attention in bfloat16 is several times slower on a CPU, and the past
    is summed over at every step. On a CPU memory grows with the places, elsewhere all of it is there from the beginning.

    Args:
        like: a weight; its device, and its dtype where that is wider than float32.
        capacity: the most places that there will be.

    Attributes:
        keys, values: (B, heads, places that there is memory for, head dim), zeros where nothing was written.
    """

    def __init__(self, like: Tensor, batch: int, heads: int, capacity: int, dim: int) -> None:
        self.capacity = capacity
        places = min(capacity, TILE) if like.device.type == "cpu" else capacity
        self.keys = like.new_zeros(batch, heads, places, dim, dtype=torch.promote_types(like.dtype, torch.float32))
        self.values = torch.zeros_like(self.keys)

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Keys and values (B, heads, L, head dim) of the places from ``start`` on."""
        end = start + k.shape[2]
        if end > self.keys.shape[2]:
            more = min(self.capacity, TILE * math.ceil(end / TILE)) - self.keys.shape[2]
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v

    def hear(self, q: Tensor, length: int) -> Tensor:
        """What the last L of ``length`` places, (B, heads, L, head dim), hear of all places up to themselves; one place, or all."""
        wide = q.to(self.keys.dtype)
        if q.shape[2] == 1:
            return attend_last(wide, self.keys, self.values, length).to(q.dtype)
        return attend(wide, self.keys[:, :, :length], self.values[:, :, :length], causal=True).to(q.dtype)
