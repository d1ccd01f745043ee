"""The tokenizer interface: signals to codes and back, and what training needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intarsia.config import Config
from intarsia.distributed import Comm
from intarsia.hub import Pretrained
from intarsia.inference import inference, module_device, module_dtype
from intarsia.padded import run_padded
from intarsia.registry import Registry
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec, TokenizerSpec, to_plain
from stage1_tokenizer.quantizers.base import Quantizer, check_codes

TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", "stage1_tokenizer.tokenizers")


class TokenizerConfig(Config, registry=TOKENIZERS):
    """Base of the tokenizers' configurations."""

    micro_batch: int = 32
    """Rows of the fixed, padded micro-batches of ``encode`` and ``decode``; part of what makes their bits."""


@dataclass(frozen=True)
class TokenizerOutput:
    """What training sees.

    Attributes:
        x: (B, C, *axes), the reconstruction.
        codes: one (B, *grid) int64 tensor per level, coarse to fine.
        loss: () the quantisers' terms, mean over samples.
        stats: scalars to log, detached.
        prefixes: (count of leading levels, reconstruction from them alone), where trained.
        likely: the codes that ``encode`` gives, where training draws others (see ``Quantized``); None where they are ``codes``.
    """

    x: Tensor
    codes: tuple[Tensor, ...]
    loss: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    prefixes: tuple[tuple[int, Tensor], ...] = ()
    likely: tuple[Tensor, ...] | None = None


class Tokenizer(Pretrained, nn.Module):
    """Base class: ``__init__(config, signal)``. Signals are float (B, C, *axes) in [-1, 1].

    Attributes:
        config, signal: what it was built from.
        stride: samples per cell of the coarsest grid, along each axis; any size that it divides is encoded and decoded.
        halo: receptive reach in code cells; None where it is global.
        against_idle_level: settings to try where another sample's codes of a level cost next to nothing.
    """

    against_idle_level: ClassVar[str] = "fewer stages or groups, or a longer training"
    registry: ClassVar[Registry[Any]] = TOKENIZERS
    kind: ClassVar[str] = "tokenizer"
    config: TokenizerConfig
    stride: tuple[int, ...]
    halo: int | None

    def __init__(self, config: TokenizerConfig, signal: SignalSpec) -> None:
        super().__init__()
        if config.micro_batch < 1:
            raise ValueError(f"tokenizer.micro_batch: {config.micro_batch} must be positive")
        self.config = config
        self.signal = signal

    # What it is ------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> TokenizerSpec:
        """Signal, levels, fingerprint (of the weights as they are now) and prefixes."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Parameter:
        raise NotImplementedError

    def _spec_dict(self) -> dict[str, Any]:
        return to_plain(self.signal)

    @classmethod
    def _spec_from_dict(cls, tree: Mapping[str, Any]) -> SignalSpec:
        return SignalSpec.from_dict(tree)

    # Training --------------------------------------------------------------------------------------------------
    def initialize(self, batches: Iterable[Tensor], rng: StepRng, comm: Comm) -> None:
        """Sets the codebooks from data, coarse to fine.

        Args:
            batches: this rank's share of the initialisation signals, each (B, C, *axes), contiguous in the global order.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, cond: Cond | None = None, rng: StepRng | None = None) -> TokenizerOutput:
        raise NotImplementedError

    def reestimate(self, batches: Iterable[tuple[Tensor, StepRng]], comm: Comm) -> None:
        """Moves the codebooks under averaged weights: from ``(x, rng)``, each rank over its share of the data, with frozen weights."""
        raise NotImplementedError

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Once per optimizer step: every quantiser's ``update``."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forgets the statistics of a step that is skipped."""
        raise NotImplementedError

    def finite(self) -> Tensor:
        """() bool: all latents since the last ``update`` were finite."""
        raise NotImplementedError

    # Use -------------------------------------------------------------------------------------------------------
    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """One micro-batch of signals to codes, in eval mode."""
        raise NotImplementedError

    def _decode(self, codes: tuple[Tensor, ...], cond: Cond | None) -> Tensor:
        """One micro-batch of codes to signals, in eval mode."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, *axes) in [-1, 1] to codes, one (B, *grid) int64 tensor per level; a sample's codes do not depend on its batch.

        Raises ValueError for a wrong shape, NaN or inf, or values outside [-1, 1], naming the first bad row.
        """
        check_signal(x, self.signal, self.stride)
        with inference(self):
            return list(run_padded(self._encode, [x.to(self.dtype)], self.config.micro_batch))

    @torch.no_grad()
    def decode(self, codes: list[Tensor] | tuple[Tensor, ...], cond: Cond | None = None) -> Tensor:
        """Codes of all levels (or of a prefix in ``spec.prefixes``) to signals (B, C, *axes); not clamped to [-1, 1].

        Grids may be larger or smaller than those of ``spec``, all levels by the same factor along an axis.

        Raises ValueError for another count of levels, and naming the level for codes that are no int64 in [0, vocab) or whose grid does
        not fit; for a condition that it has no use for.
        """
        levels = self.level_specs()
        if len(codes) not in self.prefixes():
            raise ValueError(f"codes: {len(codes)} levels; decode accepts {', '.join(map(str, self.prefixes()))}")
        for level, c in zip(levels, codes, strict=False):
            check_codes(c, level.vocab, f"codes of level {level.name!r}")
        check_grids(codes, levels)
        if cond is not None:
            raise ValueError(f"cond: {type(self).__name__} has no use for a condition")
        with inference(self):
            return run_padded(lambda *c: [self._decode(c, None)], list(codes), self.config.micro_batch)[0]

    def level_specs(self) -> tuple[Any, ...]:
        """The levels, coarse to fine (cheap: no fingerprint)."""
        raise NotImplementedError

    def prefixes(self) -> tuple[int, ...]:
        """The counts of leading levels that ``decode`` accepts."""
        return (len(self.level_specs()),)

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks: quantisers stay in float32 or wider."""
        inner = {id(p) for module in self.modules() if isinstance(module, Quantizer) for p in module.parameters()}
        found = [p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in inner]
        return found[0] if found else module_dtype(self)

    @property
    def device(self) -> torch.device:
        return module_device(self)


def check_grids(codes: Sequence[Tensor], levels: Sequence[LevelSpec]) -> None:
    """Raises ValueError, naming the level, where its codes are not (B, *grid), of as many rows as those of the first level and with a grid
    that is the level's own times what that of the first level is: a look at shapes alone."""
    first, own = codes[0], levels[0]
    for level, c in zip(levels, codes, strict=False):
        found, usual = f"codes of level {level.name!r}: shape {tuple(c.shape)}", ", ".join(map(str, level.shape))
        if c.ndim != 1 + len(level.shape) or 0 in c.shape[1:]:
            raise ValueError(f"{found}; expected (batch, {usual}), or another grid of as many axes")
        if len(level.shape) != len(own.shape):
            alike = c.shape[1:] == level.shape
        else:
            alike = all(a * f == b * e for a, b, e, f in zip(c.shape[1:], first.shape[1:], level.shape, own.shape, strict=True))
        if len(c) != len(first) or not alike:
            beside = f"beside {tuple(first.shape)} of level {own.name!r}"
            raise ValueError(f"{found} {beside}; expected ({len(first)}, {usual}), or all levels scaled alike")


def check_signal(x: Tensor, signal: SignalSpec, stride: tuple[int, ...]) -> None:
    """Raises ValueError where ``x`` is no float (B, C, *axes) in [-1, 1] with axes that the stride divides, naming the first bad row."""
    fits = x.ndim == 2 + len(stride) and x.shape[1] == signal.channels
    if not fits or any(size == 0 or size % step for size, step in zip(x.shape[2:], stride, strict=True)):
        usual = ", ".join(map(str, (signal.channels, *signal.shape)))
        raise ValueError(f"x: shape {tuple(x.shape)}; expected (batch, {usual}) or other axes that the stride {stride} divides")
    if not x.is_floating_point():
        raise ValueError(f"x: dtype {x.dtype}; expected floating point in [-1, 1]")
    if x.is_meta or x.numel() == 0:
        return
    worst = x.abs().flatten(1).amax(1)  # NaN propagates
    bad = ~(worst <= 1 + 1e-4)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"x: row {row} holds {worst[row].item():g} as its largest magnitude; expected finite values in [-1, 1]")
