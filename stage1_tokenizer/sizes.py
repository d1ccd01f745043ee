"""How large a tokenizer is, counted on the meta device: its parts, its grids and codes, what training keeps of each sample;
and how many signals a pass over data takes at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.machine import tensor_bytes
from intarsia.rng import StepRng
from intarsia.run_config import OptimConfig
from intarsia.specs import SignalSpec
from intarsia.stepping import state_bytes
from stage1_tokenizer.levels import prefix_names
from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.tokenizers.base import Tokenizer

NUMBERS_AT_ONCE = 1 << 25  # of signals: 128 MiB in float32, of which a pass with figures holds about ten at a time


def rows_at_once(signal: SignalSpec, micro_batch: int = 1, most: int = 256) -> int:
    """How many signals a pass over data reads, encodes or compares at once; no figure and no file depends on it.

    Args:
        micro_batch: of the tokenizer that takes them: it pads what is no whole one.
        most: at least 1; that many where they are small: 256 images up to 3 x 209 x 209.

    Returns:
        ``most``, or what ``NUMBERS_AT_ONCE`` allows where that is less, in whole micro-batches and at least one of them.
    """
    fitting = NUMBERS_AT_ONCE // (signal.channels * math.prod(signal.shape))
    return most if fitting >= most else min(most, max(1, fitting // micro_batch) * micro_batch)


def parts(tokenizer: Tokenizer) -> dict[str, int]:
    """Parameters of each direct part, of a net its encoder and decoder apart; what has none is left out."""
    named: list[tuple[str, nn.Module]] = []
    for name, module in tokenizer.named_children():
        named += [(f"{name}.{inner}", m) for inner, m in module.named_children()] if name == "net" else [(name, module)]
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in named}
    return {name: count for name, count in counts.items() if count}


class _Quantizer(nn.Module):
    """Stands in for a quantiser where there are only shapes: keeps the latents and as many numbers again, as a codebook's loss does."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.maps, self.dim = len(quantizer.level_specs("codes", (1,))), quantizer.dim
        self.prefixes = quantizer.prefixes

    def forward(self, z: Tensor, rng: StepRng | None = None, active: Tensor | None = None) -> Quantized:
        codes = torch.empty(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device)
        return Quantized(z, (codes,) * self.maps, F.mse_loss(z, torch.empty_like(z)))

    def decode(self, codes: tuple[Tensor, ...]) -> Tensor:
        return torch.empty(len(codes[0]), self.dim, *codes[0].shape[1:], device=codes[0].device)


def activation_bytes(tokenizer: Tokenizer) -> int:
    """What autograd keeps of one sample between forward and backward, in float32.

    Args:
        tokenizer: on the meta device, where a forward takes neither time nor memory; it stays as it is.
    """
    twin = copy.deepcopy(tokenizer).eval()
    done: tuple[str, ...] = ()
    for name, module in list(twin.named_modules()):
        if isinstance(module, Quantizer) and not name.startswith(done):
            twin.set_submodule(name, _Quantizer(module))
            done += (f"{name}.",)
    kept: dict[int, tuple[int, Tensor]] = {}
    parameters = {id(p) for p in twin.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes(), tensor  # it is held, so that no other tensor gets its storage's address
        return tensor

    x = torch.empty(1, tokenizer.signal.channels, *tokenizer.signal.shape, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = twin(x)  # alive until all is counted
    total = sum(size for size, _ in kept.values())
    del out
    return total


def describe(tokenizer: Tokenizer, optim: OptimConfig, kept: int) -> Iterator[str]:
    """Lines of text on a tokenizer of the meta device.

    Args:
        optim: what trains it, which says what is kept beside weights and gradients.
        kept: checkpoints that a run keeps.
    """
    counts = parts(tokenizer)
    yield f"{tokenizer.type_name}: {sum(p.numel() for p in tokenizer.parameters()):,} parameters: " + ", ".join(
        f"{name} {count:,}" for name, count in counts.items()
    )
    bits = 0.0
    for level in tokenizer.level_specs():
        bits += level.positions * math.log2(level.vocab)
        yield f"level {level.name}: {level.vocab} codes on a grid of {'x'.join(map(str, level.shape))}"
    samples = tokenizer.signal.channels * math.prod(tokenizer.signal.shape)
    yield f"codes: {bits:,.0f} bits per sample, {bits / samples:.3f} per number of the signal"
    if names := prefix_names(tokenizer):
        yield f"decode alone: {', '.join(names.values())}"
    weights, gradients = tensor_bytes(tokenizer.state_dict().values()), tensor_bytes(p for p in tokenizer.parameters() if p.requires_grad)
    state = state_bytes(tokenizer, optim)
    yield f"memory: {weights + gradients + state:,} bytes for weights, gradients and optimizer"
    yield f"activations: {activation_bytes(tokenizer):,} bytes per sample of a micro-batch on top, in float32"
    yield f"disk: {weights + state:,} bytes per checkpoint, {kept} are kept"
