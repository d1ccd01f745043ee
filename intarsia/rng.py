"""Stateless randomness: every draw is a function of (seed, step, sample, level, position, purpose).

Nothing has to be saved, and resumption, world size and batch splits do not change a draw. The generator is a
counter-based hash: each key is folded into a 64-bit state by the finaliser of SplitMix64 (Steele et al. 2014), in
integer tensor operations, which give the same bits on every device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift: int64 shifts keep the sign


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _root(seed: int, purpose: str, step: int) -> int:
    if seed < 0:
        raise ValueError(f"seed: {seed} must not be negative")
    name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    return _mix_int(_mix_int(_mix_int(seed & _MASK) ^ name) ^ (step & _MASK))


def bits(seed: int, purpose: str, sample: Tensor | int, level: Tensor | int = 0, position: Tensor | int = 0, step: int = 0) -> Tensor:
    """64 random bits for each element of the broadcast of ``sample``, ``level`` and ``position`` (int64, on one device)."""
    keys = []
    for name, key in (("sample", sample), ("level", level), ("position", position)):
        key = torch.as_tensor(key, dtype=torch.int64) if isinstance(key, int) else key
        if key.dtype != torch.int64:
            raise ValueError(f"{name}: dtype {key.dtype}; expected torch.int64")
        keys.append(key)
    state = _mix(keys[0] ^ _signed(_root(seed, purpose, step)))
    for key in keys[1:]:
        state = _mix(state ^ key)  # a number lies on the CPU and mixes with tensors of any device without a copy
    return state


def uniform(
    seed: int,
    purpose: str,
    sample: Tensor | int,
    level: Tensor | int = 0,
    position: Tensor | int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform draws in the open interval (0, 1): the root of all randomness.

    Args:
        sample, level, position: int64 tensors or integers; the result has their broadcast shape.
        dtype: float32 (2^23 values) or float64 (2^52 values); both ends are excluded.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype}; expected torch.float32 or torch.float64 (half precision would round to 1)")
    mantissa = 52 if dtype == torch.float64 else 23
    return (_shift(bits(seed, purpose, sample, level, position, step), 64 - mantissa).to(dtype) + 0.5) * 2.0**-mantissa


@dataclass(frozen=True)
class StepRng:
    """The draws of one training step for the samples of one micro-batch.

    Attributes:
        seed, step: of the run.
        index: (B,) int64, the samples' indices in the data set.
    """

    seed: int
    step: int
    index: Tensor

    def sub(self, name: str | int) -> StepRng:
        """The independent draws of a part, such as a stage or a level: another seed, a hash of this one and ``name``."""
        return replace(self, seed=_root(self.seed, f"sub/{name}", 0))

    def uniform(self, purpose: str, *shape: int, level: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) in (0, 1); a sample's draws do not depend on its neighbours."""
        position = torch.arange(math.prod(shape), device=self.index.device)
        draws = uniform(self.seed, purpose, self.index[:, None], level, position[None], self.step, dtype)
        return draws.view(self.index.shape[0], *shape)

    def gumbel(self, purpose: str, *shape: int, level: int = 0) -> Tensor:
        """(B, *shape) standard Gumbel noise."""
        return -torch.log(-torch.log(self.uniform(purpose, *shape, level=level)))

    def normal(self, purpose: str, *shape: int, level: int = 0) -> Tensor:
        """(B, *shape) standard normal noise (Box and Muller 1958)."""
        radius = torch.sqrt(-2 * torch.log(self.uniform(purpose + "/radius", *shape, level=level)))
        return radius * torch.cos(2 * math.pi * self.uniform(purpose + "/angle", *shape, level=level))


def permutation(seed: int, purpose: str, n: int, step: int = 0) -> Tensor:
    """A random permutation of ``range(n)`` (int64), a function of its arguments alone."""
    return torch.argsort(bits(seed, purpose, torch.arange(n), step=step), stable=True)
