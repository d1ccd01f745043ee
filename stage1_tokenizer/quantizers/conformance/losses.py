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
MODES = ((True, "train mode"), (False, "eval mode"))


@conformance("round_trip")
def loss_terms(s: Subject) -> str | None:
    """The loss and its gradients, to latents and parameters, are the paper's (beta on the encoder only), in train and in eval mode."""
    if s.traits.loss is None:
        raise Skipped("the paper's loss is not known for it")
    for training, mode in MODES:
        given, expected = _gradients(s, None, training), _gradients(s, s.traits.loss, training)
        close(given["loss"], expected["loss"], f"{mode}: the loss", TOLERANCE)
        for name in given:
            scale = expected[name].abs().max().clamp_min(1e-12)  # gradients of means are small numbers
            close(given[name] / scale, expected[name] / scale, f"{mode}: the gradient of the loss: {name}", TOLERANCE)
    return None


def _gradients(s: Subject, reference: object, training: bool) -> dict[str, Tensor]:
    """The loss and its gradient to the latents and to each parameter, zero where there is none."""
    q = s.fresh(training=training)
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
    """The gradient of z reaches latents unchanged and no parameter, or goes through what the codes are taken after; in both modes."""
    if s.traits.surrogate is None:
        raise Skipped("the function whose gradient z has is not known for it")
    for training, mode in MODES:
        q: Quantizer = s.fresh(training=training)
        z = s.batch(7).requires_grad_()
        weight = s.batch(8)
        parameters = dict(q.named_parameters())
        total = (q(z, rng(0, SAMPLES)).z * weight).sum()
        require(total.requires_grad, f"{mode}: no gradient of z reaches the latents")
        given, *leaks = torch.autograd.grad(total, [z, *parameters.values()], allow_unused=True)
        if given is None:
            raise Violation(f"{mode}: no gradient of z reaches the latents")
        (expected,) = torch.autograd.grad((s.traits.surrogate(q, z) * weight).sum(), z)
        if q.straight_through:
            equal(given, weight, f"{mode}, straight-through: the gradient at z_e against that at z_q")
            for name, leak in zip(parameters, leaks, strict=True):
                reached = leak is not None and bool(leak.any())
                require(not reached, f"{mode}, straight-through: the gradient of z reaches the parameter {name}")
        factor = float((given * expected).sum() / expected.square().sum().clamp_min(1e-12))
        close(given, expected, f"{mode}: the gradient at z_e, {factor:.4g} times what is expected on average", TOLERANCE)
    return None
