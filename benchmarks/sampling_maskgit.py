"""MaskGIT's parallel decoding against one full forward, and against our cached GPT of the same trunk.

``python -m benchmarks.sampling_maskgit``. Random weights in float32, and in bfloat16 beside; one unlabelled 8x8 level, 8 steps, no
guidance, draws at temperature 1 from all codes. A full forward is ``logits``: those of all positions, with the weights packed for
this one call; the decoder packs once, and asks for logits only where it may reveal codes. Batch 16 is there to show where which
wins: few rows favour few steps, many rows favour the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.common import Row, interleaved, pin, ratios, report, row

if TYPE_CHECKING:
    import torch

DEPTH, WIDTH, HEADS, VOCAB, SIDE, STEPS = 8, 320, 8, 8192, 8, 8
REPEATS = {1: 9, 16: 5}  # batch -> repeats
ORDERS = ("confidence", "halton")


def prepare(batch: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """MaskGIT in each order, one full forward of it, and the GPT."""
    import torch
    from torch import Tensor

    from intarsia.specs import CodesSpec, LevelSpec
    from stage2_prior.priors.gpt import GPTConfig, GPTPrior
    from stage2_prior.priors.maskgit import MaskGITConfig, MaskGITPrior

    torch.manual_seed(0)
    spec = CodesSpec((LevelSpec("codes", VOCAB, (SIDE, SIDE)),), "none")
    maskgit = MaskGITPrior(MaskGITConfig(width=WIDTH, depth=DEPTH, heads=HEADS), spec).eval().to(dtype)
    gpt = GPTPrior(GPTConfig(width=WIDTH, depth=DEPTH, heads=HEADS), spec).eval().to(dtype)
    ids = torch.arange(batch)
    codes = torch.zeros(batch, SIDE, SIDE, dtype=torch.int64)
    masked = torch.ones_like(codes, dtype=torch.bool)

    def decode(order: str) -> Callable[[], Tensor]:
        return lambda: maskgit.sample(ids, micro_batch=batch, steps=STEPS, order=order)[0]

    @torch.no_grad()
    def forward() -> Tensor:
        return maskgit.logits([codes], masked)

    def cached() -> Tensor:
        return gpt.sample(ids, micro_batch=batch)[0]

    return {**{order: decode(order) for order in ORDERS}, "forward": forward, "gpt": cached}


def rows(batch: int, dtype: torch.dtype) -> list[Row]:
    """Ratios of neighbouring measurements, and codes per second of both priors."""
    import torch

    seconds = interleaved(prepare(batch, dtype), REPEATS[batch])
    name, positions = f"batch {batch}, {SIDE}x{SIDE}" + ("" if dtype == torch.float32 else ", bf16"), batch * SIDE * SIDE
    out = []
    for order in ORDERS:
        mine = seconds[order]
        out += [
            row("sampling_maskgit", f"MaskGIT / one full forward, {order}, {name}", ratios(mine, seconds["forward"]), "forwards"),
            row("sampling_maskgit", f"cached GPT / MaskGIT, {order}, {name}", ratios(seconds["gpt"], mine), "times"),
            row("sampling_maskgit", f"MaskGIT, {order}, {name}", [positions / s for s in mine], "codes/s"),
        ]
    return [*out, row("sampling_maskgit", f"GPT, {name}", [positions / s for s in seconds["gpt"]], "codes/s")]


def main() -> None:
    pin()
    import torch

    report("sampling_maskgit", [r for dtype in (torch.float32, torch.bfloat16) for batch in REPEATS for r in rows(batch, dtype)])


if __name__ == "__main__":
    main()
