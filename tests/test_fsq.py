"""FSQ: every level is reached, codes write the digits that priors read, gradients are those of the bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from intarsia.config import ConfigError
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers.fsq import FSQ, FSQConfig

LEVELS = [(8, 6, 5), (3, 4), (7, 5, 5, 5, 5), (512,), (9,)]


def paper(z: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The values of float64 rows (N, D), a dimension at a time, as the paper defines them."""
    columns = []
    for column, size in zip(z.unbind(1), levels, strict=True):
        half = (size - 1) * (1 + 1e-3) / 2
        offset = 0.0 if size % 2 else 0.5
        bounded = torch.tanh(column + math.atanh(offset / half)) * half - offset
        columns.append(torch.round(bounded) / (size // 2))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("levels", LEVELS)
def test_values_are_those_of_the_paper(levels: tuple[int, ...]) -> None:
    q, z = FSQ(FSQConfig(levels=levels)).double(), torch.randn(4000, len(levels), dtype=torch.float64) * 2
    torch.testing.assert_close(q(z[..., None]).z[..., 0], paper(z, levels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", LEVELS)
def test_each_dimension_has_its_levels_and_zero_is_one_of_them(levels: tuple[int, ...]) -> None:
    q = FSQ(FSQConfig(levels=levels)).double()
    ramp = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for i, size in enumerate(levels):
        z = torch.zeros(len(ramp), len(levels), 1, dtype=torch.float64)
        z[:, i, 0] = ramp
        found = q(z).z[:, i, 0].unique()
        expected = (torch.arange(size, dtype=torch.float64) - size // 2) / (size // 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not q(torch.zeros(1, len(levels), 1)).z.any()


def test_codes_are_little_endian_numbers_of_the_digits() -> None:
    levels = (8, 6, 5)
    q = FSQ(FSQConfig(levels=levels))
    for digits in itertools.product(*(range(size) for size in levels)):
        code = torch.tensor([[digits[0] + 8 * digits[1] + 48 * digits[2]]])
        value = q.decode((code,))
        expected = torch.tensor([(d - size // 2) / (size // 2) for d, size in zip(digits, levels, strict=True)])
        torch.testing.assert_close(value[0, :, 0], expected)
        assert q.to_digits(code)[0, 0].tolist() == list(digits)
    assert q.dim == 3 and q.level_specs("top", (4, 4)) == (LevelSpec("top", 240, (4, 4), levels),)


@pytest.mark.parametrize("levels", [(9, 3), (3, 9), (5, 5)])
def test_what_is_left_fills_the_range_again_after_shrink(levels: tuple[int, ...]) -> None:
    """What a residual stage leaves, magnified by 1 / shrink, is within [-1, 1] in all dimensions, and reaches it in one."""
    q = FSQ(FSQConfig(levels=levels))
    inside = torch.linspace(-1, 1, 2001).expand(2, -1)  # bounded latents, between the outermost values
    values = [torch.linspace(-1, 1, size) for size in levels]
    left = torch.stack([(row[:, None] - value).abs().amin(1).max() for row, value in zip(inside, values, strict=True)])
    assert left.max().item() / q.shrink == pytest.approx(1, abs=1e-3)


def test_every_code_is_reached_by_some_latent() -> None:
    q = FSQ(FSQConfig(levels=(8, 5, 4)))
    z = torch.rand(40000, 3, 1) * 8 - 4
    assert q(z).codes[0].unique().numel() == 160


def test_the_gradient_is_that_of_the_bound_and_there_is_no_loss() -> None:
    levels = (8, 5)
    q = FSQ(FSQConfig(levels=levels)).double()
    z = torch.randn(6, 2, 7, dtype=torch.float64, requires_grad=True)
    out = q(z)
    (grad,) = torch.autograd.grad(out.z.sum(), z)
    for i, size in enumerate(levels):
        half = (size - 1) * 1.001 / 2
        shift = 0.0 if size % 2 else math.atanh(0.5 / half)
        expected = half * (1 - torch.tanh(z[:, i] + shift) ** 2) / (size // 2)
        torch.testing.assert_close(grad[:, i], expected.detach())
    assert out.loss.item() == 0 and not list(q.parameters()) and not q.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f2_large_half_precision_latents_keep_their_codes_under_autocast(dtype: torch.dtype) -> None:
    q = FSQ(FSQConfig(levels=(8, 8, 8, 5, 5, 5)))
    z = (torch.randn(4, 6, 500) * torch.tensor([0.01, 1.0, 30.0, 1000.0])[:, None, None]).clamp(-1000, 1000).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = q(z)
    assert torch.equal(out.codes[0], q(z.float()).codes[0]) and out.z.dtype == torch.float32


def test_the_same_codes_in_float64() -> None:
    z = torch.randn(5, 3, 40, dtype=torch.float64)
    q = FSQ(FSQConfig(levels=(7, 7, 7)))
    single, double = q(z), FSQ(FSQConfig(levels=(7, 7, 7))).double()(z)
    assert single.z.dtype == torch.float64 and torch.equal(single.z, q.decode(single.codes).double())
    assert torch.equal(single.codes[0], double.codes[0])


@pytest.mark.parametrize("levels", [(), (2, 8), (8, 1), (513,), (8, -3)])
def test_impossible_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"levels.*expected at least one, each of 3 to 512"):
        FSQConfig.from_dict({"levels": levels})


def test_too_many_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"134217728000 codes; at most 2147483648"):
        FSQ(FSQConfig(levels=(512, 512, 512, 10, 10, 10)))


def test_codes_out_of_range_and_other_counts_are_refused() -> None:
    q = FSQ(FSQConfig(levels=(5, 5)))
    code = torch.zeros(1, 3, dtype=torch.int64)
    for codes, message in [((code + 25,), r"\[0, 24\]"), ((code - 1,), r"\[0, 24\]"), ((code, code), "2 maps; fsq has one")]:
        with pytest.raises(ValueError, match=message):
            q.decode(codes)
