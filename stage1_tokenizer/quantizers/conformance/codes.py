"""Checks of what codes are: their shapes and range, what they decode to, how they are chosen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import stage1_tokenizer.quantizers.conformance.basics  # noqa: F401  its checks stand before these
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.quantizers.conformance.compare import equal, require
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.report import Skipped, Violation
from stage1_tokenizer.quantizers.conformance.subject import GRIDS, SAMPLES, Subject, rng

HALVES = (torch.bfloat16, torch.float16)
TIES = 1e-3  # of the codes may be other ones where it is not known how they are chosen
_MOST_PAIRS = 1 << 22
_FAR = 300.0  # squares are 10^5 times a standard normal's there


@conformance("forward_is_pure")
def round_trip(s: Subject) -> str | None:
    """decode(codes, depth) is exactly the z that forward returned, in train and in eval mode."""
    for training in (False, True):
        q = s.fresh(training=training)
        if training and q.soft:
            return "train mode is soft: no code stands for z there"
        for grid, z in ((grid, s.latents(5, grid, seed=1)) for grid in GRIDS):
            out = q(z, rng(0, 5))
            equal(q.decode(out.codes, out.depth), out.z, f"{'train' if training else 'eval'} mode, grid {grid}: decode(codes) against z")
    return None


@conformance("round_trip")
def prefixes(s: Subject) -> str | None:
    """A leading part of the codes decodes to what all of them do at that depth."""
    q = s.fresh(training=False)
    counts = q.prefixes()
    if counts == (1,):
        raise Skipped("it has one map of codes")
    out = q(s.latents(5, (6,), seed=2), rng(0, 5))
    require(counts[-1] == len(out.codes), f"prefixes {counts} for {len(out.codes)} maps")
    for depth, count in enumerate(counts, 1):
        decoded = q.decode(out.codes[:count])
        if len(counts) > 1:
            equal(decoded, q.decode(out.codes, torch.full((5,), depth)), f"the first {count} maps against depth {depth}")
    equal(q.decode(out.codes[: counts[-1]]), out.z, "all maps against z")
    for count in set(range(1, len(out.codes))) - set(counts):
        try:
            q.decode(out.codes[:count])
        except (ValueError, AssertionError):
            continue
        raise Violation(f"decode takes {count} maps, which prefixes {counts} does not list")
    return None


@conformance("forward_is_pure")
def neighbours(s: Subject) -> str | None:
    """A sample's codes do not depend on its batch: whole and in chunks they are the same, but for ties that rounding decides."""
    note: str | None = None
    cells = max(8, math.ceil(min(20000, 3 * (1 << 20) // s.vocab) / SAMPLES))
    for training, z in ((False, s.latents(SAMPLES, (cells,), seed=4)), (True, s.batch(4))):
        q = s.fresh(training=training)
        out = q(z, rng(0, SAMPLES))
        known = s.traits.choices is not None and not (training and out.likely is not None)  # what is drawn is not the nearest
        total, differing, far = sum(c.numel() for c in out.codes), 0, False
        for rows in (slice(0, 1), slice(1, 7), slice(7, 12)):
            part, whole = z[rows], tuple(c[rows] for c in out.codes)
            codes = q(part, rng(0, len(part), rows.start)).codes
            for a, b in zip(codes, whole, strict=True):
                require(a.shape == b.shape, f"codes of {len(part)} samples: shape {tuple(a.shape)}; expected {tuple(b.shape)}")
            found = sum(int((a != b).sum()) for a, b in zip(codes, whole, strict=True))
            differing += found
            far = far or (found > 0 and known and not all(_all_nearest(s, q, part, each) for each in (codes, whole)))
        if differing:
            message = f"{'train' if training else 'eval'} mode: {differing} of {total} codes depend on the rest of the batch"
            require(not far and (known or differing <= math.ceil(TIES * total)), message)
            note = note or f"{message}, which " + ("rounding explains" if known else "is taken for rounding")
    return note


def _all_nearest(s: Subject, q: Quantizer, z: Tensor, codes: tuple[Tensor, ...]) -> bool:
    """Codes that matrix products of other sizes may give, as they round otherwise: equally near, within rounding."""
    return all(bool((found.excess <= 1e-6 * (found.least + found.square)).all()) for found in _compared(s, q, z, codes))


@conformance("round_trip", "neighbours")
def nearest(s: Subject) -> str | None:
    """The chosen code is the nearest in float64: to 1e-6 of its square and the latent's; 300 off the origin, to what rounding moves."""
    if s.traits.choices is None:
        raise Skipped("its codes are not known to be chosen by distance")
    z = s.latents(SAMPLES, (max(2, min(60, _MOST_PAIRS // (SAMPLES * s.vocab))),), seed=3)
    q = s.fresh(training=False)
    for found in _compared(s, q, z, q(z).codes):
        worst = float((found.excess / (found.least + found.square).clamp_min(1e-12)).max())
        require(worst <= 1e-6, f"a chosen code is farther than the nearest by {worst:.3g} (relative; at most 1e-6)")
    q, z = s.placed(_FAR), z + _FAR
    for found in _compared(s, q, z, q(z).codes):
        chosen = found.least + found.excess
        moves = 4 * torch.finfo(torch.float32).eps * (chosen * found.square).sqrt()  # as latent and codes are rounded themselves
        worst = float((found.excess - 1e-6 * (chosen + found.spread) - moves).max())
        require(worst <= 0, f"latents around {_FAR:g}: a chosen code's squared distance is {worst:.3g} more than rounding explains")
    return None


class _Compared(NamedTuple):
    """(N,) float64 of each latent of a choice by distance.

    Attributes:
        excess: by how much the chosen squared distance exceeds the least.
        least: the least squared distance.
        square: |z|^2.
        spread: |z - m|^2 + max |e - m|^2 about the codes' mean m, the least that squares can be.
    """

    excess: Tensor
    least: Tensor
    square: Tensor
    spread: Tensor


def _compared(s: Subject, q: Quantizer, z: Tensor, codes: tuple[Tensor, ...]) -> list[_Compared]:
    """One for each choice by distance that made ``codes``."""
    assert s.traits.choices is not None
    found = []
    for choice in s.traits.choices(q, z, codes):
        rows, table = choice.rows.detach().double(), choice.table.detach().double()
        distance = torch.cdist(rows, table, compute_mode="donot_use_mm_for_euclid_dist").square()
        chosen = distance.gather(1, choice.codes[:, None])[:, 0]
        least, mean = distance.amin(1), table.mean(0)
        spread = (rows - mean).square().sum(1) + (table - mean).square().sum(1).max()
        found.append(_Compared(chosen - least, least, rows.square().sum(1), spread))
    return found


@conformance("forward_is_pure")
def half_precision(s: Subject) -> str | None:
    """bf16 and fp16 latents up to 1e3 get the codes of their float32 copy, under autocast too, and decode likewise; nothing overflows."""
    for dtype in HALVES:
        z = (s.batch(5) * 300).clamp(-1000, 1000).to(dtype)
        for training in (False, True):
            q = s.fresh(training=training)
            full = q(z.float(), rng(0, SAMPLES))
            with torch.autocast("cpu", torch.bfloat16):
                half = q(z, rng(0, SAMPLES))
                decoded = q.decode(half.codes, half.depth) if s.traits.wide else None
            for a, b in zip(half.codes, full.codes, strict=True):
                equal(a, b, f"codes of {dtype} latents against those of their float32 copy")
            wide = not s.traits.wide or half.z.dtype == half.loss.dtype == torch.float32
            require(wide, f"{dtype}: z is {half.z.dtype}, the loss {half.loss.dtype}; expected float32")
            if decoded is not None:
                equal(decoded, q.decode(half.codes, half.depth), "decode under autocast against decode without")
            require(bool(torch.isfinite(half.z).all() & torch.isfinite(half.loss)), f"{dtype}: z or loss overflows")
    return None


@conformance("shapes")
def bad_codes(s: Subject) -> str | None:
    """decode refuses codes outside [0, vocab), other integer types and a wrong number of maps."""
    q = s.fresh(training=False)
    levels = q.level_specs("name", (3,))
    good = tuple(torch.zeros(2, 3, dtype=torch.int64) for _ in levels)
    q.decode(good)
    values = {"-1": -1, "vocab": levels[-1].vocab}
    cases = {f"the code {name}": (*good[:-1], torch.full_like(good[-1], value)) for name, value in values.items()}
    cases |= {"one map too many": (*good, good[0]), "int32 codes": (*good[:-1], good[-1].int())}
    for name, codes in cases.items():
        try:
            q.decode(codes)
        except ValueError:
            continue
        except Exception as error:
            raise Violation(f"{name}: {type(error).__name__} instead of a ValueError that says so") from None
        raise Violation(f"{name}: decode takes it")
    return None
