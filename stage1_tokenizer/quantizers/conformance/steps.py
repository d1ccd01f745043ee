"""Checks of a step of training, and of what is left of it: averages, micro-batches, bad latents, saving."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import stage1_tokenizer.quantizers.conformance.codes  # noqa: F401  its checks stand before these
from intarsia.distributed import comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.conformance.compare import close, equal, gradients_of, require, same_state
from stage1_tokenizer.quantizers.conformance.kit import conformance
from stage1_tokenizer.quantizers.conformance.report import Skipped, Violation
from stage1_tokenizer.quantizers.conformance.subject import SAMPLES, Subject, restarts, rng, state, unsaved_tensors

TOLERANCE = 1e-10  # in float64; a smoothing by 1e-5 that is written back stands out


@conformance("round_trip")
def moving_averages(s: Subject) -> str | None:
    """The codebook is a reference running mean: gamma on counts and sums, smoothing for the division only."""
    t = s.traits
    if t.ema is None:
        raise Skipped("moving averages of one table of all its codes are not known of it")
    q = s.fresh(torch.float64)
    counts, sums = (q.get_buffer(name).clone() for name in (t.counts, t.sums))
    table = s.table(q)
    for step in range(20):
        z = s.batch(100 + step, torch.float64)
        rows = z.movedim(1, -1).flatten(0, -2)
        rows = rows if t.project_code is None else t.project_code(rows)
        codes = q(z, rng(step, SAMPLES)).codes[0].flatten()
        stats = q.update(rng(step, 1), comm)
        if float(stats.get("restarts", torch.zeros(()))) > 0:
            raise Skipped("a code was restarted even though the latents are those of the initialisation")
        onehot = torch.nn.functional.one_hot(codes, len(counts)).double()
        counts = t.ema * counts + (1 - t.ema) * onehot.sum(0)
        sums = t.ema * sums + (1 - t.ema) * onehot.T @ rows
        smooth = (counts + 1e-5) / (counts.sum() + len(counts) * 1e-5) * counts.sum()
        table = sums / smooth[:, None] if t.project_code is None else t.project_code(sums / smooth[:, None])
        close(s.table(q), table, f"the codebook after step {step + 1}", TOLERANCE)
        close(q.get_buffer(t.counts), counts, f"the counts after step {step + 1}", TOLERANCE)
    return None


@conformance("neighbours")
def accumulation(s: Subject) -> str | None:
    """Micro-batches of 5, 1 and 6 equal the batch of 12: loss, gradients, statistics, codebook."""
    found = []
    for splits in ((SAMPLES,), (5, 1, 6)):
        q = s.fresh(torch.float64)
        for step in range(3):
            z = s.batch(20 + step, torch.float64).requires_grad_()
            outs, start, loss = [], 0, z.new_zeros(())
            for size in splits:
                outs.append(q(z[start : start + size], rng(step, size, start)))
                loss = loss + (outs[-1].loss + outs[-1].z.square().mean()) * size / SAMPLES
                start += size
            gradients = gradients_of(loss, {"the latents": z, **dict(q.named_parameters())})
            gradients["the gradient of the latents"] *= z.numel()
            q.update(rng(step, 1), comm)
        found.append({"loss": loss.detach(), **gradients, **{f"state {k}": v for k, v in state(q).items()}})
    same_state(found[1], found[0], "three micro-batches against one", 1e-10)
    return None


@conformance("accumulation")
def inactive(s: Subject) -> str | None:
    """Samples that are not active add nothing to loss and statistics, restart no code, and are quantised all the same."""
    if not s.traits.active:
        raise Skipped("its forward takes no active samples")
    active = torch.arange(SAMPLES) % 3 > 0
    share, some = active.double().mean(), torch.arange(SAMPLES)[active]
    masked, alone = s.fresh(torch.float64), s.fresh(torch.float64)
    z, part = s.batch(30, torch.float64).requires_grad_(), s.batch(30, torch.float64)[active].requires_grad_()
    first = masked(z, rng(0, SAMPLES), active=active)
    second = alone(part, StepRng(0, 0, some))
    close(first.loss, second.loss * share, "the loss against that of the active samples times their share", 1e-10)
    given = gradients_of(first.loss, {"the latents": z, **dict(masked.named_parameters())})
    wanted = gradients_of(second.loss * share, {"the latents": part, **dict(alone.named_parameters())})
    require(not bool(given["the gradient of the latents"][~active].any()), "the loss has a gradient at samples that are not active")
    given["the gradient of the latents"] = given["the gradient of the latents"][active]
    for gradients in (given, wanted):
        gradients["the gradient of the latents"] *= z.numel()
    same_state(given, wanted, "the loss against that of the active samples", 1e-10)
    for a, b in zip(first.codes, second.codes, strict=True):
        equal(a[active], b, "codes of the active samples")
    whole = s.fresh(torch.float64)(z, rng(0, SAMPLES))
    for a, b in zip(first.codes, whole.codes, strict=True):
        equal(a, b, "codes of all samples, some of them not active, against those where all are")
    close(first.z, whole.z, "z of all samples, some of them not active, against that where all are", 1e-10)
    for q in (masked, alone):
        q.update(rng(0, 1), comm)
    same_state(state(masked), state(alone), "the statistics of all against those of the active samples", 1e-10)
    return _restarts_without(s, active) if s.traits.restart else None


def _restarts_without(s: Subject, active: Tensor) -> str | None:
    """Until a code restarts: what all samples do to the codes, against what the active ones do alone. What it leaves out, or None."""
    some = torch.arange(SAMPLES)[active]
    masked, alone = s.fresh(torch.float64), s.fresh(torch.float64)
    for step in range(1, s.most_steps + 1):
        z = s.far(30 + step, torch.float64)
        masked(z, rng(step, SAMPLES), active=active)
        alone(z[active], StepRng(0, step, some))
        stats = [q.update(rng(step, 1), comm) for q in (masked, alone)]
        moved = [restarts(each) for each in stats]
        if None in moved:
            return "its update reports no restarts: where they come from is not judged"
        if any(moved):
            same_state(state(masked), state(alone), "after restarts: codes against those that the active samples alone restart", 1e-10)
            return None
    return f"no code was restarted in {s.most_steps} steps"


@conformance("forward_is_pure")
def bad_latents(s: Subject) -> str | None:
    """An empty batch, NaN and inf are refused by an error that says so, or by the finite flag, and leave the codebook bit-equal."""
    q = s.fresh(training=False)
    before = state(q)
    z = s.batch(40)
    for bad in (float("nan"), float("inf")):
        spoiled = z.clone()
        spoiled[7, -1, 2] = bad
        _refused(partial(q.eval(), spoiled), "nan|inf", f"{bad} in eval mode")
        same_state(state(q), before, f"after {bad} in eval mode")
        train, clean = s.fresh(), s.fresh()
        train(z, rng(0, SAMPLES))
        taken = True
        try:
            train(spoiled, rng(0, SAMPLES))
            require(not bool(train.finite()), f"{bad} in training: no error, and finite() is True")
        except ValueError:
            taken = False  # an error is as good as the flag
        same_state(state(train), before, f"after {bad} in training")
        last = s.batch(41)
        train(last, rng(0, SAMPLES, SAMPLES))
        require(not (taken and bool(train.finite())), f"{bad} in training: finite() is True after the next micro-batch")
        train.update(rng(0, 1), comm)
        s.step(clean, torch.cat([z, last]), 0, splits=(SAMPLES, SAMPLES))
        same_state(state(train), state(clean), f"a step with a micro-batch of {bad}, against the step without it")
    _refused(lambda: s.fresh(training=False)(z[:0]), "empty", "an empty batch in eval mode")
    _refused(lambda: s.fresh()(z[:0], rng(0, 0)), "empty", "an empty batch in training")
    _refused(lambda: s.fresh()(torch.cat([z, z], 1), rng(0, SAMPLES)), "", "another number of channels")
    return None


def _refused(call: Callable[[], object], said: str, what: str) -> None:
    """The call raises ValueError with one of the words (a|b) in its message."""
    try:
        call()
    except ValueError as error:
        require(any(word in str(error).lower() for word in said.split("|")), f"{what}: the error does not say so: {error}")
        return
    except Exception as error:
        raise Violation(f"{what}: {type(error).__name__} instead of a ValueError that says so: {error}") from None
    raise Violation(f"{what}: it is taken")


@conformance("forward_is_pure", "initialize_once")
def save_load(s: Subject) -> str | None:
    """A state dict holds all: codes, decoding and the steps that follow are bit-equal after loading."""
    q = s.fresh()
    s.step(q, s.batch(50), 0)
    loaded = s.build(seed=1)
    unsaved = unsaved_tensors(loaded) if s.copies else []
    loaded.load_state_dict(state(q))
    loaded.train()
    for step in range(1, 3):
        for each in (q, loaded):
            s.step(each, s.far(50 + step), step)
        same_state(state(loaded), state(q), f"{step} steps after loading")
    z = s.batch(53)
    first, second = q.eval()(z), loaded.eval()(z)
    for a, b in zip(second.codes, first.codes, strict=True):
        equal(a, b, "codes after loading")
    equal(second.z, first.z, "z after loading")
    before = state(loaded)
    loaded.initialize(s.far(54).movedim(1, -1).flatten(0, -2), rng(1, SAMPLES))
    same_state(state(loaded), before, "initialize after loading")
    if unsaved:
        what = "in no state dict, and copied with the instance: give what makes one to see whether they come back"
        return f"{', '.join(unsaved)}: {what}"
    return None
