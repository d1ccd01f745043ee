"""The quantiser interface: latents (B, D, *grid) to integers on the same grid and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
        loss: () the quantiser's own terms (commitment, codebook, ...), mean over all samples of the batch; one that is not
            ``active`` adds 0. So it is linear in the batch: micro-batches weighted by their sizes equal the whole.
        stats: scalars to log, detached.
        depth: (B,) int64, the active stages of each sample under quantiser dropout; None where all are.
        likely: the codes that these latents get in eval mode, where training draws others; None where they are ``codes``.
    """

    z: Tensor
    codes: tuple[Tensor, ...]
    loss: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    depth: Tensor | None = None
    likely: tuple[Tensor, ...] | None = None


class Quantizer(nn.Module):
    """Base class. ``forward`` only accumulates statistics; ``update`` and ``initialize`` alone change a codebook outside the optimizer.

    Attributes:
        dim: D, the number of channels that ``forward`` takes.
        straight_through: the gradient of ``Quantized.z`` reaches the latents unchanged and no parameter gets any of it. A residual
            quantiser then lets it pass around all its stages at once; otherwise it differentiates through them.
        soft: in training ``Quantized.z`` is a mixture that no code stands for.
        shrink: how much smaller than its input what it leaves is, where that is fixed; 1 where a codebook adapts. A residual
            quantiser magnifies what each stage leaves by this much for the next.
        advice: symptom -> settings to try, in order: "collapse" where few codes are used, "far" where latents lie far from all codes,
            "twins" where codes lie next to each other.
    """

    type_name: ClassVar[str]
    advice: ClassVar[dict[str, str]] = {"collapse": "fewer codes", "far": "a smaller learning rate", "twins": "fewer codes"}
    muon: ClassVar[bool] = False  # what it learns by gradient is AdamW's
    decays: ClassVar[bool] = False  # codes that nobody uses have no gradient, and would go to 0
    dim: int
    straight_through: bool = False
    soft: bool = False
    shrink: float = 1.0

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
        all. ``z`` and codes of the others are made all the same; to the loss they add 0, and it stays a mean over all B samples.
        Schedules are functions of ``rng.step``.

        In training, statistics of the step are accumulated (unless a latent is not finite: see ``finite``). In eval mode
        nothing changes. Raises ValueError for a wrong shape, an empty batch and, in eval mode, for NaN and inf.
        """
        raise NotImplementedError

    @torch.no_grad()
    def as_on_rank_0(self, comm: Comm) -> None:
        """Takes over rank 0's numbers after ``initialize``: on CUDA each rank may have added the same rows in another order."""
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                comm.broadcast_(tensor)

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Once per optimizer step: moving averages, restarts, growth; the same on every rank. Returns scalars to log; ``restarts`` is how
        many codes were moved to current latents."""
        return {}

    def discard(self) -> None:
        """Forgets the statistics of a step that is skipped."""

    @property
    def passes(self) -> int:
        """How many passes over the latents ``reestimate`` takes: one for each part whose latents hang on codebooks before it."""
        return 1

    def reestimate(self, comm: Comm, number: int = 0) -> None:
        """Sets each used code to the mean of the latents that ``forward`` gave it since the last ``update``; after pass ``number`` the
        codes whose turn it is.

        For averaged weights: the codebook of the running encoder is moved under the averaged one. A codebook that the
        optimizer trains is averaged like any parameter, and stays.
        """
        self.discard()

    def codes_in_use(self, vocab: int) -> int:
        """How many codes, the first of all, there can be as yet; fewer than ``vocab`` while a codebook grows. Waits for the device."""
        return vocab

    def remedies(self) -> tuple[str, ...]:
        """What can be done against a collapse in the middle of a training, in order."""
        return ()

    def remedy(self, name: str, again: bool = False) -> None:
        """Does one of ``remedies``; the next ``initialize`` sets a codebook that is to be set anew.

        Args:
            again: after a resumption, where what is in the checkpoint stays as it is.
        """
        raise ValueError(f"remedy: {name!r}; {self.type_name} has {', '.join(self.remedies()) or 'none'}")

    def finite(self) -> Tensor:
        """() bool: every latent since the last ``update`` or ``discard`` was finite."""
        return torch.tensor(True)

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        """Codes, each (B, *grid) int64, to (B, D, *grid): ``decode(forward(z).codes, depth)`` equals ``forward(z).z``.

        ``codes`` are all maps or a leading part of them whose count is in ``prefixes()``.

        Raises ValueError for a code outside [0, vocab) and for another count.
        """
        raise NotImplementedError

    def compared(self, z: Tensor) -> Tensor:
        """(B, D, *grid) latents to what is compared with the codes' vectors; themselves unless they are bounded or scaled first."""
        return z

    def code_tensors(self) -> dict[str, Tensor]:
        """The tensors that decide what a code is and means: the fingerprint is theirs. All parameters and saved buffers but
        ``initialized``; a type whose running sums or counts decide nothing leaves them out."""
        return {name: t for name, t in self.state_dict(keep_vars=True).items() if name.split(".")[-1] != "initialized"}

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


class _StraightThrough(torch.autograd.Function):
    """Forward the second argument, backward the identity to the first."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, z_q: Tensor) -> Tensor:
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """``z_q`` with the gradient of ``z`` (Bengio et al. 2013, arXiv:1308.3432); its very bits, which z + (z_q - z).detach() has not."""
    out: Tensor = _StraightThrough.apply(z, z_q)
    return out


def direction(z: Tensor, dim: int) -> Tensor:
    """z / |z|, without a gradient where |z| < 1e-6: at length 0 ``F.normalize`` multiplies it by 10^12."""
    short = z.detach().norm(dim=dim, keepdim=True) < 1e-6
    return F.normalize(torch.where(short, z.detach(), z), dim=dim)


def check_finite(z: Tensor, training: bool) -> Tensor:
    """() bool: all latents are finite, without a host sync in training. In eval mode ValueError names the first bad row."""
    z = z.detach()
    low, high = torch.aminmax(z)  # NaN and inf come through; one pass without a mask of the size of z
    finite = torch.isfinite(low) & torch.isfinite(high)
    if not training and not z.is_meta and not bool(finite):
        bad = int((~torch.isfinite(z).flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"latents: NaN or inf in row {bad}")
    return finite


def active_mean(values: Tensor, active: Tensor | None) -> Tensor:
    """() the mean of ``values`` (B, ...) over everything, where samples that are not ``active`` (B,) count as 0."""
    if active is None:
        return values.mean()
    return torch.where(active.view(-1, *[1] * (values.ndim - 1)), values, 0.0).mean()


def check_codes(codes: Tensor, vocab: int, name: str = "codes") -> None:
    """Raises ValueError where a code lies outside [0, vocab) or is no int64 (one host sync)."""
    if codes.dtype != torch.int64:
        raise ValueError(f"{name}: dtype {codes.dtype}; expected torch.int64")
    if codes.numel() and not codes.is_meta:
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < 0 or high >= vocab:
            raise ValueError(f"{name}: values in [{low}, {high}]; expected [0, {vocab - 1}]")
