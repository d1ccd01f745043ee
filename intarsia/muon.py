"""Muon for the weights of hidden layers, AdamW for all else (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

torch's own Muon takes matrices only and multiplies in bfloat16, which a CPU without it does slowly; this one takes convolutions too
and computes in the precision of the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
HIDDEN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of (N, A, B) matrices U S V^T with its singular values brought near 1 (0.7 to 1.2, those far below the norm less): five
    Newton-Schulz steps x -> a x + b x^3 + c x^5, steep at 0, of S / |S|. A matrix of zeros stays one.

    A step X -> Q X, Q = a + b G + c G^2, needs of X only G = X X^T, which becomes Q G Q: all but the first and the last product are
    of the shorter side alone.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram, steps = x @ x.mT, None
    for i in range(ITERATIONS):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        steps = step if steps is None else step @ steps
        if i + 1 < ITERATIONS:
            gram = step @ gram @ step
    x = steps @ x
    return x.mT if tall else x


def hidden_weights(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights of linear layers and convolutions, each once; not what lies within a module with ``muon = False``, such as a
    quantiser or a layer that makes logits, nor a weight that is an embedding too."""
    left_out = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) or not getattr(m, "muon", True) for p in m.parameters()}
    chosen = {id(m.weight) for m in module.modules() if isinstance(m, HIDDEN)} - left_out
    return [p for p in module.parameters() if p.requires_grad and id(p) in chosen]


class Muon(torch.optim.AdamW):
    """Parameter groups with ``hidden: True`` step along their Nesterov momentum made orthogonal, the others as in AdamW.

    A weight of more than two axes is the matrix (first axis, all others). Its step has the length ``lr * sqrt(max(1, rows / columns))``
    along every singular vector; weight decay is decoupled.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ValueError("closure: this optimizer takes none")
        for group in self.param_groups:
            if group.get("hidden"):
                self._step_hidden(group)
        return super().step()

    def _step_hidden(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape].append(p)
        for params in alike.values():
            updates = orthogonal(torch.stack([self._momentum(p).flatten(1) for p in params]))
            rows, columns = updates.shape[1:]
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
                p.grad = None  # AdamW, which comes next, leaves it alone

    def _momentum(self, p: nn.Parameter) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one of every parameter that has a state
            state["momentum"] = torch.zeros_like(p)
        state["step"] += 1
        state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(state["momentum"], MOMENTUM)
