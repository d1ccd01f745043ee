"""The reconstruction objective, against what its docstring says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.rng import StepRng
from stage1_tokenizer.objectives.reconstruction import Reconstruction, ReconstructionConfig
from stage1_tokenizer.tokenizers.base import TokenizerOutput

X = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 0.25, -0.5]).reshape(1, 1, 7)
Y = torch.tensor([-1.3, -1.0, -0.6, 1.5, 0.9, 1.75, -1.25]).reshape(1, 1, 7)
BEYOND = torch.tensor([True, False, False, True, False, False, False])
"""Where the reconstruction is beyond a limit at which the signal stands; the last two are beyond one at which it does not."""


def loss_and_gradient(y: Tensor, prefixes: tuple[Any, ...] = (), **fields: Any) -> tuple[float, Tensor]:
    y = y.clone().requires_grad_()
    out = TokenizerOutput(x=y, codes=(), loss=torch.zeros(()), stats={}, prefixes=prefixes)
    objective = Reconstruction(ReconstructionConfig(**fields))
    loss, _ = objective.tokenizer_loss(out, X.to(y.dtype), 0, StepRng(0, 0, torch.arange(1)))
    loss.backward()
    assert y.grad is not None
    return loss.item(), y.grad.flatten()


@pytest.mark.parametrize("error", ["mse", "l1"])
def test_a_censored_error_ignores_what_clamping_mends_and_nothing_else(error: str) -> None:
    plain, gradient = loss_and_gradient(Y, error=error, weight=2.0)
    censored, kept = loss_and_gradient(Y, error=error, weight=2.0, censored=True)
    assert torch.equal(kept[BEYOND], torch.zeros(2)) and gradient[BEYOND].abs().min() > 0
    assert torch.equal(kept[~BEYOND], gradient[~BEYOND])
    distance = (Y - X).flatten().abs()
    beyond = (distance**2 if error == "mse" else distance)[BEYOND].sum().item()
    assert censored == pytest.approx(plain - 2.0 * beyond / 7)


def test_a_censored_error_brings_back_a_reconstruction_that_left_the_range_where_the_signal_did_not() -> None:
    """Clamping before comparing would leave such a sample without a gradient for ever."""
    _, kept = loss_and_gradient(Y, censored=True)
    _, clamped = loss_and_gradient(Y.clamp(-1, 1), censored=True)
    assert kept[5] > 0 and kept[6] < 0
    assert kept[5] > clamped[5]


def test_prefixes_are_censored_alike_and_weighed_by_prefix_weight() -> None:
    alone, _ = loss_and_gradient(Y, censored=True)
    both, _ = loss_and_gradient(Y, prefixes=((1, Y),), censored=True, prefix_weight=0.5)
    assert both == pytest.approx(1.5 * alone)


def test_the_logarithm_of_the_error_is_psnr_and_weighs_an_easy_sample_as_much_as_a_hard_one() -> None:
    x = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + torch.tensor([0.5, 0.1, 0.02, 0.0]).view(4, 1, 1)).requires_grad_()
    out = TokenizerOutput(x=y, codes=(), loss=torch.zeros(()), stats={}, prefixes=())
    objective = Reconstruction(ReconstructionConfig(error="log_mse", weight=0.1))
    loss, _ = objective.tokenizer_loss(out, x, 0, StepRng(0, 0, torch.arange(4)))
    loss.backward()
    psnr = [10 * math.log10(4 / error**2) for error in (0.5, 0.1, 0.02)] + [10 * math.log10(4 / 1e-6)]  # no more than that for an exact one
    assert loss.item() == pytest.approx(0.1 * (math.log(4) - math.log(10) / 10 * sum(psnr) / 4), abs=2e-4)
    assert y.grad is not None
    pull = (y.grad * (y - x)).flatten(1).sum(1)  # how much the loss falls, at first, as a sample's error shrinks: relative, so alike
    assert torch.allclose(pull, torch.tensor([0.05, 0.05, 0.05, 0.0]), rtol=0.01)


def test_half_precision_is_compared_in_the_precision_of_the_signal() -> None:
    out = TokenizerOutput(x=Y.bfloat16(), codes=(), loss=torch.zeros(()), stats={}, prefixes=())
    loss, _ = Reconstruction(ReconstructionConfig(censored=True)).tokenizer_loss(out, X, 0, StepRng(0, 0, torch.arange(1)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_and_gradient(Y.bfloat16().float(), censored=True)[0])


def test_the_absolute_error_is_added_to_the_squared_one() -> None:
    mixed, gradient = loss_and_gradient(Y, absolute=0.5, weight=2.0)
    squared, of_squared = loss_and_gradient(Y, weight=2.0)
    absolute, of_absolute = loss_and_gradient(Y, error="l1", weight=2.0)
    assert mixed == pytest.approx(squared + 0.5 * absolute)
    assert torch.allclose(gradient, of_squared + 0.5 * of_absolute)


def test_an_absolute_error_on_top_of_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="absolute: 0.5 is added to error 'mse'; error is 'l1'"):
        ReconstructionConfig(error="l1", absolute=0.5)
    with pytest.raises(ValueError, match="absolute: -1"):
        ReconstructionConfig(absolute=-1)
