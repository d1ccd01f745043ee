"""Our PixelCNN's incremental sampling against a full forward for each position, and against one full forward.

``python -m benchmarks.sampling_pixelcnn [SIDE ...]``. Random weights in float32, one unlabelled SIDE x SIDE level, draws at
temperature 1 from all codes. The full-forward sampler below is what most published code does: the network over the whole grid,
logits of every position, for each code that is drawn. Its positions all cost the same, so that it is timed over the first 32 of
them and scaled; its first codes are compared with ours, so that both do the same work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.common import Row, interleaved, pin, ratios, report, row

DEPTH, WIDTH, VOCAB, BATCH = 12, 64, 512, 16
REPEATS = {8: 9, 16: 7, 32: 5}  # side -> repeats
TIMED = 32  # positions of the full-forward sampler that are timed


def prepare(side: int) -> dict[str, Callable[[], object]]:
    """``ours`` draws the grid, ``full`` the first codes by a full forward each, ``forward`` is one full forward."""
    import torch
    from torch import Tensor

    from intarsia.rng import uniform
    from intarsia.specs import CodesSpec, LevelSpec
    from stage2_prior.priors.pixelcnn import PixelCNNConfig, PixelCNNPrior
    from stage2_prior.sampling import DrawOptions, draw

    torch.manual_seed(0)
    spec = CodesSpec((LevelSpec("codes", VOCAB, (side, side)),), "none")
    prior = PixelCNNPrior(PixelCNNConfig(width=WIDTH, depth=DEPTH), spec).eval()
    ids = torch.arange(BATCH)
    options, timed = DrawOptions(), min(TIMED, side * side)

    def ours() -> Tensor:
        return prior.sample(ids, micro_batch=BATCH)[0]

    @torch.no_grad()
    def full() -> Tensor:
        codes = torch.zeros(BATCH, side, side, dtype=torch.int64)
        numbers = uniform(0, "sample", ids[:, None], 0, torch.arange(timed)[None])
        for i in range(timed):
            (logits,) = prior.logits([codes])
            codes.view(BATCH, -1)[:, i] = draw(logits[:, i], numbers[:, i], options)
        return codes

    @torch.no_grad()
    def forward() -> Tensor:
        return prior.logits([torch.zeros(BATCH, side, side, dtype=torch.int64)])[0]

    same = (ours().flatten(1) == full().flatten(1))[:, :timed]
    if same.all(1).sum() < BATCH - 1:  # a draw at the very edge between two codes may fall to either
        raise AssertionError(f"the two samplers draw other codes: {(~same.all(1)).sum()} of {BATCH} samples differ")
    return {"ours": ours, "full": full, "forward": forward}


def rows(side: int) -> list[Row]:
    """Both ratios of neighbouring measurements, and codes per second."""
    seconds = interleaved(prepare(side), REPEATS.get(side, 3))
    positions = side * side
    scale = positions / min(TIMED, positions)
    full = [scale * r for r in ratios(seconds["full"], seconds["ours"])]
    name = f"batch {BATCH}, {side}x{side}"
    return [
        row("sampling_pixelcnn", f"full-forward sampler / ours, {name}", full, "times"),
        row("sampling_pixelcnn", f"ours / one full forward, {name}", ratios(seconds["ours"], seconds["forward"]), "forwards"),
        row("sampling_pixelcnn", f"PixelCNN, {name}", [BATCH * positions / s for s in seconds["ours"]], "codes/s"),
    ]


def main() -> None:
    pin()
    sides = [int(word) for word in sys.argv[1:]] or list(REPEATS)
    report("sampling_pixelcnn", [r for side in sides for r in rows(side)])


if __name__ == "__main__":
    main()
