"""From features to the logits of a code: one softmax over the vocabulary, or one digit after the other.

Both give exact likelihoods: the digits of a code (see ``digits``) are predicted by the chain rule, each given those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.digits import Sizes, to_digits
from stage2_prior.packed import packed

# (digit, carried, the digit before it) -> (logits of the digit, carried). ``carried`` is the features (n, D) for digit 0.
Drawer = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Logits(nn.Linear):
    """A last layer: starts near 0, and learns better under AdamW than under Muon (docs/log.md)."""

    muon = False

    def __init__(self, width: int, vocab: int, bias: bool = False) -> None:
        super().__init__(width, vocab, bias=bias)
        nn.init.normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)


class FullHead(Logits):
    """One softmax over the whole vocabulary."""

    def logits(self, features: Tensor, codes: Tensor) -> Tensor:
        """(..., D) to (..., vocab); ``codes`` are not looked at."""
        return packed(self)(features)

    def drawer(self) -> Drawer:
        """The same code by code, with the weights as they are now."""
        project = packed(self)
        return lambda digit, carried, previous: (project(carried), carried)


class DigitHead(nn.Module):
    """Digit after digit, each given the features and the digits before it, through one hidden layer.

    NADE (Larochelle and Murray 2011) conditioned on features: the hidden activation a = W f + sum of a vector for each digit so
    far, logits of digit i = V_i silu(a + b_i), so that a further digit costs one lookup and one small product.
    """

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.hidden = nn.Linear(width, width, bias=False)
        self.biases = nn.Parameter(torch.zeros(len(sizes), width))
        self.seen = nn.ModuleList(nn.Embedding(size, width) for size in sizes[:-1])
        self.last = nn.ModuleList(Logits(width, size) for size in sizes)
        nn.init.normal_(self.hidden.weight, std=width**-0.5)
        for table in self.seen.parameters():
            nn.init.normal_(table, std=0.5)

    @property
    def output(self) -> Sequence[nn.Linear]:
        """The last layer of each digit."""
        return cast(Sequence[nn.Linear], self.last)

    def logits(self, features: Tensor, codes: Tensor) -> Tensor:
        """(..., D) and the true codes (...) to (..., sum(sizes)): the logits of each digit given those before it, side by side."""
        activation, out = packed(self.hidden)(features), []
        for i, (layer, digit) in enumerate(zip(self.output, to_digits(codes, self.sizes), strict=True)):
            out.append(packed(layer)(F.silu(activation + self.biases[i])))
            if i < len(self.seen):
                activation = activation + self.seen[i](digit)
        return torch.cat(out, -1)

    def drawer(self) -> Drawer:
        """The same digit by digit, with the weights as they are now."""
        hidden, output = packed(self.hidden), [packed(layer) for layer in self.output]

        def draw(digit: int, carried: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
            activation = hidden(carried) if previous is None else carried + self.seen[digit - 1](previous)
            return output[digit](F.silu(activation + self.biases[digit])), activation

        return draw


def code_head(sizes: Sizes, width: int) -> FullHead | DigitHead:
    """The head for codes with these digits."""
    return FullHead(width, sizes[0]) if len(sizes) == 1 else DigitHead(width, sizes)
