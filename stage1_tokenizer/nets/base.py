"""The net interface: the encoder and decoder around a quantiser."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from intarsia.config import Config
from intarsia.registry import Registry
from intarsia.specs import SignalSpec

NETS: Registry[Net] = Registry("net", "stage1_tokenizer.nets")


class NetConfig(Config, registry=NETS):
    """Base of the nets' configurations."""


class Net(nn.Module):
    """Base class: ``__init__(config, signal)``.

    Attributes:
        width: channels of the features between ``encode`` and ``decode``.
        grid: shape of the code grid for ``signal.shape``.
        stride: samples of the signal per grid cell, along each axis.
        halo: receptive reach of encoder and decoder in grid cells; None where it is global.
        encoder: all that ``encode`` computes with, so that a tokenizer can name what decides its codes.
        last_layer: the weight of the last layer of the decoder (adaptive loss weights are measured there).
    """

    type_name: ClassVar[str]
    width: int
    grid: tuple[int, ...]
    stride: tuple[int, ...]
    halo: int | None
    encoder: nn.Module

    def __init__(self, config: NetConfig, signal: SignalSpec) -> None:
        super().__init__()

    @property
    def last_layer(self) -> nn.Parameter:
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, *axes) in [-1, 1] to (B, width, *grid)."""
        raise NotImplementedError

    def decode(self, features: Tensor, kind: Tensor | None = None) -> Tensor:
        """(B, width, *grid) to (B, C, *axes).

        Args:
            kind: (B,) int64, what ``tell`` is for; it is given to nets that were told of kinds alone.
        """
        raise NotImplementedError

    def tell(self, kinds: int) -> None:
        """Makes ``decode`` take the kind of each sample, in [0, kinds): how many maps of codes its features are made of, say.

        Raises ValueError where a net has no such decoder.
        """
        raise ValueError(f"net: the decoder of a {self.type_name} net cannot be told of kinds of samples")
