"""Averaged weights: an exponential moving average of the trained parameters (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from intarsia.sharding import like


class AveragedWeights:
    """average <- d average + (1 - d) weight after each step, with d = min(decay, (1 + t) / (10 + t)) for short runs.

    Attributes:
        values: one tensor per trained parameter, by its name.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """``step``: optimizer steps before this one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self._parameters.values()], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Starts from the weights as they are: after a release has been loaded into the module."""
        for name, p in self._parameters.items():
            self.values[name].copy_(p)

    @contextmanager
    def following(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Rows of these that are written to inside, past the optimizer, are taken over as they are: what lies between the place that a
        code has left and its new one is a code of neither."""
        watched = {id(p) for p in parameters}
        before = {name: p.detach().clone() for name, p in self._parameters.items() if id(p) in watched}
        yield
        for name, old in before.items():
            new, value = self._parameters[name].detach(), self.values[name]
            moved = (new != old).flatten(1).any(1).view(-1, *[1] * (new.ndim - 1))
            value.copy_(torch.where(moved, new, value))

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        if saved.keys() != self.values.keys():
            raise ValueError(f"averaged weights: {sorted(saved.keys() ^ self.values.keys())[:3]} stand on one side only")
        for name, value in saved.items():
            self.values[name].copy_(like(value, self.values[name]))

    @torch.no_grad()
    def copy_in(self) -> None:
        """Makes the module's parameters the averaged ones."""
        for name, p in self._parameters.items():
            p.copy_(self.values[name])


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Parameters, persistent buffers and mode of ``module`` are afterwards what they were before."""
    tensors = module.state_dict(keep_vars=True)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    training = module.training
    try:
        yield
    finally:
        module.train(training)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
