"""The traits of the registered types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.quantizers.bsq import BSQ
from stage1_tokenizer.quantizers.composite import Composite
from stage1_tokenizer.quantizers.conformance.adapter import Adapter
from stage1_tokenizer.quantizers.conformance.subject import rng
from stage1_tokenizer.quantizers.conformance.traits import Choice, Codes, Traits, nearest_code, rows_of, table_of
from stage1_tokenizer.quantizers.fsq import FSQ
from stage1_tokenizer.quantizers.gumbel import Gumbel
from stage1_tokenizer.quantizers.lfq import LFQ, SignQuantizer
from stage1_tokenizer.quantizers.product import Product
from stage1_tokenizer.quantizers.residual import Residual
from stage1_tokenizer.quantizers.simvq import SimVQ
from stage1_tokenizer.quantizers.vq import VQ


def traits_of(quantizer: Quantizer) -> Traits:
    """The traits of a registered type; for a class that is unknown, none but those of the interface."""
    for kind, find in _KNOWN:
        if type(quantizer) is kind:
            return find(quantizer)
    if isinstance(quantizer, Adapter):  # a layer from elsewhere knows neither samples that do not count nor other processes
        return Traits(active=False, wide=False, ranks=False)
    if quantizer.straight_through:
        return Traits(surrogate=lambda _, z: z)
    return Traits()


def _vq(q: Quantizer) -> Traits:
    assert isinstance(q, VQ)
    c = q.config
    traits = nearest_code(
        beta=c.beta,
        codebook=float(c.update == "gradient"),
        project=_unit if c.cosine else None,
        ema=c.decay if c.update == "ema" and not c.grow else None,
        restart=c.restart > 0,
    )
    if c.beta_warmup or c.entropy.weight:  # written out in tests of their own
        traits = replace(traits, loss=None)
    if c.rate or c.grow:  # not the nearest of all codes
        traits = replace(traits, choices=None)
    return traits if c.estimator == "straight_through" else replace(traits, surrogate=None)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


def _simvq(q: Quantizer) -> Traits:
    assert isinstance(q, SimVQ)
    traits = nearest_code(beta=q.config.beta, codebook=1.0)
    return traits if q.straight_through else replace(traits, surrogate=None)


def _gumbel(q: Quantizer) -> Traits:
    assert isinstance(q, Gumbel)

    def loss(q: Quantizer, z: Tensor, out: Quantized) -> Tensor:
        """kl KL(softmax(logits) | uniform)."""
        assert isinstance(q, Gumbel)
        log_p = F.log_softmax(q.logits(rows_of(z)), -1)
        return q.config.kl * (log_p.exp() * (log_p + math.log(q.codes))).sum(-1).mean()

    nearest = nearest_code(beta=0.0, codebook=0.0).choices if q.config.logits == "distance" else None
    return Traits(choices=nearest, loss=loss)


def _fsq(q: Quantizer) -> Traits:
    def bounded(quantizer: Quantizer, z: Tensor) -> Tensor:
        assert isinstance(quantizer, FSQ)
        rows = z.movedim(1, -1)
        return (quantizer.bound(rows) / quantizer.middle.to(rows.dtype)).movedim(-1, 1)

    def choices(q: Quantizer, z: Tensor, codes: Codes) -> list[Choice]:
        return [Choice(rows_of(bounded(q, z)), table_of(q), codes[0].flatten())]

    return Traits(choices, lambda _, z, out: z.new_zeros(()), bounded)


def _sign(q: Quantizer) -> Traits:
    assert isinstance(q, SignQuantizer)
    traits = nearest_code(beta=q.config.beta, codebook=0.0, project=q.project)
    return replace(traits, loss=_sign_loss if q.config.bits <= min(q.config.group, 10) else None)


def _sign_loss(q: Quantizer, z: Tensor, out: Quantized) -> Tensor:
    """Both entropies over all 2^d codes, enumerated; they are of training."""
    assert isinstance(q, SignQuantizer)
    if not q.training:
        return q.config.beta * F.mse_loss(q.project(rows_of(z)), rows_of(q.decode(out.codes)))
    c, u, table = q.config, q.project(rows_of(z)), table_of(q)
    p = F.softmax(-(u[:, None] - table[None]).square().sum(-1) / c.tau, 1)
    own = -(p * p.clamp_min(1e-30).log()).sum(1).mean()
    mean = (p.mean(0) * q.usage.clamp_min(1e-6).log()).sum()
    return c.beta * F.mse_loss(u, rows_of(q.decode(out.codes))) + c.entropy * (own + c.diversity * mean) / c.bits


def _composite(q: Quantizer) -> Traits:
    assert isinstance(q, Composite)
    inner, through = traits_of(q.part(0)), isinstance(q, Product) or q.part(0).straight_through
    split = _groups if isinstance(q, Product) else _stages

    def choices(q: Quantizer, z: Tensor, codes: Codes) -> list[Choice]:
        assert inner.choices is not None
        return [choice for part in split(q, z, codes) for choice in inner.choices(*part)]

    def loss(q: Quantizer, z: Tensor, out: Quantized) -> Tensor:
        assert inner.loss is not None
        terms = []
        for i, (part, latents, codes) in enumerate(split(q, z, out.codes)):
            keep = torch.ones(len(z), dtype=torch.bool) if out.depth is None else out.depth > i
            if keep.any():
                some = Quantized(latents[keep], tuple(c[keep] for c in codes), z.new_zeros(()))
                square = q.scales[i] ** 2 if isinstance(q, Residual) else 1.0  # a magnified stage's loss in units of z
                terms.append(inner.loss(part, latents[keep], some) * keep.double().mean().to(z.dtype) * square)
        return torch.stack(terms).sum() / (q.count if isinstance(q, Product) else 1)

    def surrogate(q: Quantizer, z: Tensor) -> Tensor:
        assert isinstance(q, Composite) and inner.surrogate is not None
        if isinstance(q, Residual):
            if not q.training or q.straight_through:
                return z
            share = torch.where(q.depth(rng(0, len(z))) < q.count, q.config.shallow_gradient, 1.0).to(z.dtype)
            return z * share.view(-1, *[1] * (z.ndim - 1))
        return torch.cat([inner.surrogate(q.part(i), columns) for i, columns in enumerate(z.chunk(q.count, 1))], 1)

    return Traits(
        choices=choices if inner.choices else None,
        loss=loss if inner.loss and through else None,
        surrogate=surrogate if inner.surrogate and through else None,
        restart=inner.restart,
        one_table=len(q.parts) == 1 and q.maps == 1,
    )


def _groups(q: Quantizer, z: Tensor, codes: Codes) -> list[tuple[Quantizer, Tensor, Codes]]:
    """(part, its latents, its codes) of a product."""
    assert isinstance(q, Product)
    return [(q.part(i), c, m) for i, (c, m) in enumerate(zip(z.chunk(q.count, 1), q.split_codes(codes), strict=True))]


def _stages(q: Quantizer, z: Tensor, codes: Codes) -> list[tuple[Quantizer, Tensor, Codes]]:
    """(part, what the stages before it left, its codes) of a residual quantiser."""
    assert isinstance(q, Residual)
    found, left = [], z
    for i, (maps, scale) in enumerate(zip(q.split_codes(codes), q.scales, strict=True)):
        found.append((q.part(i), left / scale, maps))
        left = left - q.part(i).decode(maps).detach() * scale
    return found


_KNOWN: list[tuple[type[Quantizer], Callable[[Quantizer], Traits]]] = [
    (VQ, _vq),
    (SimVQ, _simvq),
    (Gumbel, _gumbel),
    (FSQ, _fsq),
    (LFQ, _sign),
    (BSQ, _sign),
    (Product, _composite),
    (Residual, _composite),
]
