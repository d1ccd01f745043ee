"""Codes that cost their bits: entropy-constrained search (Chou, Lookabaugh and Gray 1989)."""

from __future__ import annotations

import pytest
import torch

from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.vq import VQ, VQConfig


def trained(rate: float, steps: int = 60) -> tuple[VQ, torch.Tensor]:
    """A codebook of 16 codes on a skewed mixture, and how often each code is used in the last step."""
    torch.manual_seed(0)
    quantizer = VQ(VQConfig(codes=16, dim=2, rate=rate, restart=0.0)).train()
    for step in range(steps):
        index = torch.arange(64) + 64 * step
        rng = StepRng(0, step, index)
        z = rng.normal("z", 2, 8) * torch.where(rng.uniform("wide", 1, 8) < 0.1, 3.0, 0.3)
        if step == 0:
            quantizer.initialize(z.movedim(1, -1).reshape(-1, 2), StepRng(0, 0, torch.arange(1)))
        codes = quantizer(z, rng).codes[0]
        quantizer.update(rng, comm)
    return quantizer, torch.bincount(codes.flatten(), minlength=16)


def entropy(counts: torch.Tensor) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


def test_the_code_has_the_least_distance_plus_cost() -> None:
    quantizer, _ = trained(0.05)
    quantizer.eval()
    z = torch.randn(32, 2, 8, generator=torch.Generator().manual_seed(1))
    rows = z.movedim(1, -1).reshape(-1, 2).double()
    p = quantizer.counts.double() / quantizer.counts.double().sum()
    total = torch.cdist(rows, quantizer.codebook.double()).square() - 0.05 * 2 * p.log2()
    codes = quantizer(z).codes[0].flatten()
    chosen = total.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, total.amin(1), rtol=1e-5, atol=1e-5)
    assert (codes != torch.cdist(rows, quantizer.codebook.double()).argmin(1)).any()  # the cost decides somewhere


def test_a_rate_lowers_the_entropy_of_the_codes() -> None:
    bits = [entropy(trained(rate)[1]) for rate in (0.0, 0.02, 0.1)]
    assert bits[0] > bits[1] > bits[2] > 0


def test_the_use_of_the_codes_is_part_of_what_they_mean_only_where_it_costs() -> None:
    for rate, is_part in ((0.0, False), (0.05, True)):
        assert ("counts" in VQ(VQConfig(codes=16, dim=2, rate=rate)).code_tensors()) == is_part


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate -0\.1 must not be negative"):
        VQConfig(rate=-0.1)
