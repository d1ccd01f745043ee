"""Checks that all others stand on: shapes, and that nothing changes but where it may."""

from __future__ import annotations

import torch

from intarsia.distributed import comm
from stage1_tokenizer.quantizers.conformance.compare import require, same_state
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.subject import GRIDS, SAMPLES, Subject, rng, state


@conformance()
def shapes(s: Subject) -> str | None:
    """z keeps its shape; codes are int64 in [0, vocab) on the grid, one per level; 1-D to 3-D grids, one position, one sample."""
    for training, batch in ((True, 3), (True, 1), (False, 3), (False, 1)):
        q = s.fresh(training=training)
        for grid in GRIDS:
            z = s.latents(batch, grid)
            out = q(z, rng(0, batch))
            kept = out.z.shape == z.shape and out.z.dtype == z.dtype
            require(kept, f"z: {tuple(out.z.shape)} {out.z.dtype} for {tuple(z.shape)} {z.dtype}")
            require(out.loss.shape == () and bool(torch.isfinite(out.loss)), f"loss: {out.loss}; expected one finite number")
            levels = q.level_specs("name", grid)
            require(len(levels) == len(out.codes), f"{len(out.codes)} maps of codes for {len(levels)} levels")
            require(len({level.name for level in levels}) == len(levels), "two levels have the same name")
            for level, codes in zip(levels, out.codes, strict=True):
                require(level.shape == grid, f"level {level.name}: grid {level.shape}; expected {grid}")
                require(codes.shape == (batch, *grid), f"codes of {level.name}: shape {tuple(codes.shape)}; expected {(batch, *grid)}")
                require(codes.dtype == torch.int64, f"codes of {level.name}: {codes.dtype}; expected torch.int64")
                low, high = int(codes.min()), int(codes.max())
                require(low >= 0 and high < level.vocab, f"codes of {level.name}: {low} ... {high}; expected [0, {level.vocab})")
    return None


@conformance("shapes")
def forward_is_pure(s: Subject) -> str | None:
    """forward alone changes nothing, also in training; after discard nothing of it is left (frozen means frozen)."""
    q = s.fresh()
    before = state(q)
    q(s.far(12), rng(0, SAMPLES))
    same_state(state(q), before, "after a forward in training")
    q.discard()
    same_state(state(q), before, "after discard")
    s.step(q, s.batch(13), 1)
    fresh = s.fresh()
    s.step(fresh, s.batch(13), 1)
    same_state(state(q), state(fresh), "a step after a discarded one, against that step alone")
    return None


@conformance("forward_is_pure")
def evaluation_is_pure(s: Subject) -> str | None:
    """In eval mode nothing changes, neither the state nor the statistics of the step."""
    q = s.fresh(training=False)
    before = state(q)
    q(s.far(14))
    q.decode(q(s.batch(15)).codes)
    same_state(state(q), before, "after forward in eval mode")
    q.train()
    q(s.batch(16), rng(2, SAMPLES))
    q.eval()(s.far(17))
    q.train()
    q.update(rng(2, 1), comm)
    fresh = s.fresh()
    s.step(fresh, s.batch(16), 2)
    same_state(state(q), state(fresh), "a step with an evaluation inside, against that step alone")
    return None


@conformance("shapes")
def randomness(s: Subject) -> str | None:
    """Draws come from StepRng alone: the same twice, and torch's own generator is left as it is."""
    found = []
    for _ in range(2):
        torch_state = torch.get_rng_state()
        q = s.build()
        q.initialize(s.batch(9).movedim(1, -1).flatten(0, -2), rng(0, SAMPLES))
        q.train()
        s.step(q, s.batch(10), 1)
        require(torch.equal(torch.get_rng_state(), torch_state), "torch's generator was drawn from outside of the constructor")
        found.append(state(q))
        torch.rand(3)
    same_state(found[0], found[1], "the same steps twice")
    return None


@conformance("shapes")
def initialize_once(s: Subject) -> str | None:
    """initialize is idempotent: a second call, with other latents, changes nothing."""
    q = s.fresh()
    before = state(q)
    q.initialize(s.far(11).movedim(1, -1).flatten(0, -2), rng(1, SAMPLES))
    same_state(state(q), before, "after a second initialize")
    return None
