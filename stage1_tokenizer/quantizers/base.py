"""The quantiser interface: latents (B, D, *grid) to integers on the same grid and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intarsia.config import Config
from intarsia.distributed import Comm
from intarsia.registry import Registry
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec

QUANTIZERS: Registry[Quantizer] = Registry("quantizer", "stage1_tokenizer.quantizers")


class QuantizerConfig(Config, registry=QUANTIZERS):
    """Base of the quantisers' configurations."""


@dataclass(frozen=True)
class Quantized:
    """What a quantiser makes of latents.

    Attributes:
        z: (B, D, *grid), the quantised latents, with the gradient to the encoder.
        codes: one (B, *grid) int64 tensor for each map of codes, in [0, vocab).
        loss: () the quantiser's own terms (commitment, codebook, ...), mean over samples.
        stats: scalars to log, detached.
        depth: (B,) int64, the active stages of each sample under quantiser dropout; None where all are.
    """

    z: Tensor
    codes: tuple[Tensor, ...]
    loss: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    depth: Tensor | None = None


class Quantizer(nn.Module):
    """Base class. ``forward`` only accumulates statistics; ``update`` and ``initialize`` alone change a codebook outside the optimizer.

    Attributes:
        dim: D, the number of channels that ``forward`` takes.
    """

    type_name: ClassVar[str]
    dim: int

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        """The maps of codes on a grid: one level called ``name``, or "name/0", "name/1", ... for depths and groups."""
        raise NotImplementedError

    def prefixes(self) -> tuple[int, ...]:
        """The counts of leading maps of codes that ``decode`` accepts: all of them; with quantiser dropout fewer too."""
        return (len(self.level_specs("codes", (1,))),)

    def initialize(self, z: Tensor, rng: StepRng) -> None:
        """Sets the codebook from latents ``z`` (N, D), gathered in order of sample index and equal on every rank.

        Idempotent: a second call changes nothing. A quantiser without a codebook ignores it.
        """

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        """z: (B, D, *grid) floating point; computed in float32, float64 stays.

        ``active`` (B,) bool: which samples count in loss and statistics (quantiser dropout inside another quantiser); None for
        all. ``z`` and codes of the others are made all the same. Schedules are functions of ``rng.step``.

        In training, statistics of the step are accumulated (unless a latent is not finite: see ``finite``). In eval mode
        nothing changes. Raises ValueError for a wrong shape, an empty batch and, in eval mode, for NaN and inf.
        """
        raise NotImplementedError

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Once per optimizer step: moving averages, restarts, growth; the same on every rank. Returns scalars to log."""
        return {}

    def discard(self) -> None:
        """Forgets the statistics of a step that is skipped."""

    def reestimate(self, comm: Comm) -> None:
        """Sets each used code to the mean of the latents that ``forward`` gave it since the last ``update``.

        For averaged weights: the codebook of the running encoder is moved under the averaged one. A codebook that the
        optimizer trains is averaged like any parameter, and stays.
        """
        self.discard()

    def finite(self) -> Tensor:
        """() bool: every latent since the last ``update`` or ``discard`` was finite."""
        return torch.tensor(True)

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        """Codes, each (B, *grid) int64, to (B, D, *grid): ``decode(forward(z).codes, depth)`` equals ``forward(z).z``.

        Raises ValueError for a code outside [0, vocab).
        """
        raise NotImplementedError

    def code_tensors(self) -> dict[str, Tensor]:
        """The tensors that decide what a code is and means; running sums and counts are none of them."""
        return dict(self.named_parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves to another device or to float64, never to half precision: codebooks stay float32 or wider."""

        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if t.is_floating_point() and out.dtype in (torch.float16, torch.bfloat16):
                return t.to(out.device)
            return out

        return super()._apply(keep_precision, recurse)


def at_least_float32(z: Tensor) -> Tensor:
    """Promotes half precision to float32; float64 stays."""
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def check_latents(z: Tensor, dim: int) -> None:
    """Raises ValueError where ``z`` is no (B > 0, dim, *grid) floating-point tensor."""
    if z.ndim < 3 or z.shape[1] != dim:
        raise ValueError(f"latents: shape {tuple(z.shape)}; expected (batch, {dim}, *grid)")
    if z.shape[0] == 0:
        raise ValueError("latents: the batch is empty")
    if not z.is_floating_point():
        raise ValueError(f"latents: dtype {z.dtype}; expected floating point")


def check_codes(codes: Tensor, vocab: int, name: str = "codes") -> None:
    """Raises ValueError where a code lies outside [0, vocab) or is no int64 (one host sync)."""
    if codes.dtype != torch.int64:
        raise ValueError(f"{name}: dtype {codes.dtype}; expected torch.int64")
    if codes.numel() and not codes.is_meta:
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < 0 or high >= vocab:
            raise ValueError(f"{name}: values in [{low}, {high}]; expected [0, {vocab - 1}]")
