"""Checks of what reaches the encoder and the codebook: the paper's loss terms and the gradient of z."""

from __future__ import annotations

import torch
from torch import Tensor

import stage1_tokenizer.quantizers.conformance.codes  # noqa: F401  its checks stand before these
from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.quantizers.conformance.compare import close, equal, require
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.report import Skipped, Violation
from stage1_tokenizer.quantizers.conformance.subject import SAMPLES, Subject, rng

TOLERANCE = 1e-5


@conformance("round_trip")
def loss_terms(s: Subject) -> str | None:
    """The loss and its gradients, to the latents and to every parameter, are exactly those of the paper (beta on the encoder only)."""
    if s.traits.loss is None:
        raise Skipped("the paper's loss is not known for it")
    given, expected = _gradients(s, None), _gradients(s, s.traits.loss)
    close(given["loss"], expected["loss"], "the loss", TOLERANCE)
    for name in given:
        scale = expected[name].abs().max().clamp_min(1e-12)  # gradients of means are small numbers
        close(given[name] / scale, expected[name] / scale, f"the gradient of the loss: {name}", TOLERANCE)
    return None


def _gradients(s: Subject, reference: object) -> dict[str, Tensor]:
    """The loss and its gradient to the latents and to each parameter, zero where there is none."""
    q = s.fresh()
    z = s.batch(6).requires_grad_()
    out: Quantized = q(z, rng(0, SAMPLES))
    loss = reference(q, z, out) if callable(reference) else out.loss
    found = {"loss": loss.detach()}
    named = {"the latents": z, **dict(q.named_parameters())}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if loss.requires_grad else [None] * len(named)
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        found[name] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


@conformance("forward_is_pure")
def gradient_of_z(s: Subject) -> str | None:
    """The gradient of z reaches the latents unchanged and no parameter, or goes through the function that the codes are taken after."""
    if s.traits.surrogate is None:
        raise Skipped("the function whose gradient z has is not known for it")
    q: Quantizer = s.fresh()
    z = s.batch(7).requires_grad_()
    weight = s.batch(8)
    parameters = dict(q.named_parameters())
    total = (q(z, rng(0, SAMPLES)).z * weight).sum()
    given, *leaks = torch.autograd.grad(total, [z, *parameters.values()], allow_unused=True)
    if given is None:
        raise Violation("no gradient of z reaches the latents")
    (expected,) = torch.autograd.grad((s.traits.surrogate(q, z) * weight).sum(), z)
    if q.straight_through:
        equal(given, weight, "straight-through: the gradient at z_e against that at z_q")
        for name, leak in zip(parameters, leaks, strict=True):
            require(leak is None or not bool(leak.any()), f"straight-through: the gradient of z reaches the parameter {name}")
    factor = float((given * expected).sum() / expected.square().sum().clamp_min(1e-12))
    close(given, expected, f"the gradient at z_e, {factor:.4g} times what is expected on average", TOLERANCE)
    return None
