"""What quantisers see and do inside a tokenizer of any kind, level by level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Seen:
    """One call of a quantiser.

    Attributes:
        quantizer: which.
        z: (B, D, *grid), the latents that it was given.
        out: what it made of them.
    """

    quantizer: Quantizer
    z: Tensor
    out: Quantized


def outermost(tokenizer: Tokenizer) -> dict[str, Quantizer]:
    """The quantisers that are no part of another, by name."""
    found = {name: module for name, module in tokenizer.named_modules() if isinstance(module, Quantizer)}
    return {name: module for name, module in found.items() if not any(name.startswith(other + ".") for other in found)}


def innermost(tokenizer: Tokenizer) -> list[Quantizer]:
    """The quantisers that hold no other: each call of one makes one map of codes."""
    return [m for m in tokenizer.modules() if isinstance(m, Quantizer) and not any(isinstance(c, Quantizer) for c in _inside(m))]


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (child for child in module.modules() if child is not module)


@contextmanager
def probe(quantizers: list[Quantizer]) -> Iterator[list[Seen]]:
    """Collects the calls of these quantisers while the ``with`` lasts, in the order in which they happen.

    Of the innermost quantisers of a tokenizer, one ``forward`` makes as many calls as there are levels, in their order. Clear
    the list between forwards.
    """
    calls: list[Seen] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Quantized) -> None:
        assert isinstance(module, Quantizer)
        calls.append(Seen(module, args[0], out))

    hooks = [quantizer.register_forward_hook(note) for quantizer in quantizers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
