"""TwoStagePipeline: samples that depend on seed and index alone, bounded memory, ranges, likelihood, placement."""

from __future__ import annotations

import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.specs import Cond, SignalSpec
from pipelines import TwoStagePipeline
from tests import tiny_pipelines as tiny

ladders, gpt, ladder = tiny.ladders, tiny.gpt, tiny.ladder  # fixtures

KINDS = ("gpt", "pixelcnn", "maskgit", "ladder", "top pixelcnn", "joint", "joint parallel", "three")


def streamed(pipeline: TwoStagePipeline, n: int, **arguments: Any) -> Tensor:
    return torch.stack([x for _, x in pipeline.stream(n, **arguments)])


def test_defaults_hold_where_a_call_gives_none() -> None:
    greedy = tiny.pipeline("gpt", defaults={"temperature": 0.0}, micro_batch=8)
    free = tiny.pipeline("gpt", micro_batch=8)
    assert torch.equal(greedy.sample(8, seed=0, label=1), free.sample(8, seed=3, label=1, temperature=0.0))
    assert torch.equal(greedy.sample(8, seed=3, label=1, temperature=1.0), free.sample(8, seed=3, label=1))


# F4: seed and index decide, nothing else -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_f4_a_sample_has_the_same_bits_in_any_batch_order_and_process(kind: str, ranks: Any) -> None:
    pipeline = tiny.pipeline(kind)
    reference = pipeline.sample(256, seed=5, batch_size=256)
    assert len(reference.flatten(1).unique(dim=0)) > 200
    assert torch.equal(streamed(pipeline, 256, seed=5), reference)
    assert torch.equal(pipeline.sample(70, seed=5, batch_size=7), reference[:70])
    assert torch.equal(pipeline.sample(6, seed=5, batch_size=1), reference[:6])
    for first, n in ((250, 6), (101, 1), (33, 40), (0, 1)):  # backwards, and starting anywhere
        assert torch.equal(streamed(pipeline, n, first=first, seed=5, batch_size=32), reference[first : first + n])
    halves = ranks(lambda rank: streamed(pipeline, 128, first=128 * rank, seed=5, batch_size=50 + rank))
    assert torch.equal(torch.cat(halves), reference)


def test_f4_labels_given_per_sample_move_with_their_samples(ladder: TwoStagePipeline) -> None:
    label = torch.arange(30) % 4
    whole = ladder.sample(30, seed=1, label=label)
    assert torch.equal(streamed(ladder, 11, first=7, seed=1, label=label[7:18].tolist(), batch_size=4), whole[7:18])


def test_another_seed_gives_other_samples(gpt: TwoStagePipeline) -> None:
    assert not torch.equal(gpt.sample(4, seed=0, label=0), gpt.sample(4, seed=1, label=0))


def test_without_a_seed_each_call_takes_a_fresh_one_that_can_be_read_afterwards(gpt: TwoStagePipeline) -> None:
    first, seed = gpt.sample(4), gpt.last_seed
    second = gpt.sample(4)
    assert seed is not None and gpt.last_seed != seed
    assert not torch.equal(first, second) and torch.equal(gpt.sample(4, seed=seed), first)


def test_sampling_leaves_modes_and_gradients_as_they_were(gpt: TwoStagePipeline) -> None:
    gpt.tokenizer.train()
    rows = gpt.stream(20, seed=0, batch_size=5)
    _, x = next(rows)
    assert torch.is_grad_enabled() and not x.requires_grad and gpt.tokenizer.training and not gpt.priors[0].training
    gpt.tokenizer.eval()


# Memory ----------------------------------------------------------------------------------------------------------------
def live_bytes() -> int:
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if issubclass(type(t), Tensor)}
    return sum(storages.values())


def test_f5_a_stream_holds_one_batch_however_long_it_is(monkeypatch: Any, gpt: TwoStagePipeline) -> None:
    drawn: list[int] = []
    original = type(gpt.priors[0]).sample

    def counted(self: Any, ids: Tensor, **arguments: Any) -> list[Tensor]:
        drawn.append(len(ids))
        return original(self, ids, **arguments)

    monkeypatch.setattr(type(gpt.priors[0]), "sample", counted)
    seen = []
    for i, x in gpt.stream(10**12, seed=0, batch_size=8):
        assert x.untyped_storage().nbytes() == x.nbytes, "a row that is kept keeps no batch alive"
        assert sum(drawn) == (i // 8 + 1) * 8, "nothing is drawn ahead"
        if i in (11, 99, 203):
            seen.append(live_bytes())
        if i == 203:
            break
    assert max(seen[1:]) <= seen[0]


def test_a_progress_bar_shows_on_request_and_not_on_short_calls(capsys: Any, gpt: TwoStagePipeline) -> None:
    gpt.sample(4, seed=0)
    assert capsys.readouterr().err == ""
    gpt.sample(4, seed=0, progress=True)
    assert "0/4" in capsys.readouterr().err


# Ranges and forms ------------------------------------------------------------------------------------------------------
def test_outputs_are_tensors_arrays_or_pictures_of_the_same_samples(gpt: TwoStagePipeline) -> None:
    x, array = gpt.sample(3, seed=0), gpt.sample(3, seed=0, output="np")
    pictures = gpt.sample(3, seed=0, output="pil")
    assert x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1
    assert np.array_equal(array, x.numpy())
    assert [p.mode for p in pictures] == ["L"] * 3
    assert np.abs(np.stack([np.asarray(p) for p in pictures]) / 255 - array[:, 0]).max() <= 0.5 / 255 + 1e-6


def test_signals_are_in_0_1_outside_and_minus_1_1_inside(ladder: TwoStagePipeline) -> None:
    x = torch.rand(5, 1, 8, 8)
    codes = ladder.encode(x)
    inside = ladder.tokenizer.encode(x * 2 - 1)
    assert all(torch.equal(a, b) for a, b in zip(codes, inside, strict=True))
    assert torch.equal(ladder.reconstruct(x), ladder.decode(codes))
    assert torch.equal(ladder.decode(codes), (ladder.tokenizer.decode(codes) + 1) / 2)
    assert torch.equal(ladder.decode(codes[:1]), (ladder.tokenizer.decode(codes[:1]) + 1) / 2), "the top alone"
    brightest = [torch.full((1, 2, 2), 4), torch.full((1, 4, 4), 6)]
    assert ladder.tokenizer.decode(brightest).max() > 1 and ladder.decode(brightest).max() == 1


def test_audio_stays_in_minus_1_1() -> None:
    from pipelines.outputs import check_output, from_public, to_public

    signal = SignalSpec("audio", 1, (4,))
    x = torch.tensor([[[-1.0, -0.5, 0.5, 1.0]]])
    assert torch.equal(to_public(x, signal), x) and torch.equal(from_public(x, signal), x)
    with pytest.raises(ValueError, match="output: 'pil' holds images of 1 or 3 channels; these are audio of 1"):
        check_output("pil", signal)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 1, 8, 8) * 2 - 1, r"x: row 0 holds values in \[-0\.\d+, 0\.\d+\]; expected \[0, 1\]"),
        (torch.cat([torch.rand(1, 1, 8, 8), torch.full((1, 1, 8, 8), 200.0)]), r"x: row 1 holds values in \[200, 200\]; expected \[0, 1\]"),
        (torch.full((1, 1, 8, 8), math.nan), "x: row 0 holds values in .nan, nan."),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "x: dtype torch.uint8; expected floating point"),
        (torch.rand(2, 3, 8, 8), r"x: shape \(2, 3, 8, 8\); expected \(batch, 1, 8, 8\)"),
        (np.zeros((2, 1, 8, 8)), "x: a ndarray; expected a tensor"),
    ],
)
def test_signals_of_another_range_or_shape_are_refused(gpt: TwoStagePipeline, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt.reconstruct(x)


# Likelihood ------------------------------------------------------------------------------------------------------------
def test_nll_is_the_sum_of_what_the_priors_say(ladder: TwoStagePipeline) -> None:
    x, label = torch.rand(11, 1, 8, 8), torch.arange(11) % 4
    codes = ladder.encode(x)
    expected = sum(prior.nll(codes[: prior.levels.stop], Cond(label=label)).double().sum(1) for prior in ladder.priors)
    found = ladder.nll(x, label)
    assert found.dtype == torch.float64 and torch.allclose(found, expected, rtol=1e-5)
    assert torch.equal(ladder.nll(codes, label), found)
    assert torch.allclose(ladder.bits_per_image(x, label), found / math.log(2))
    assert not ladder.nll_is_bound


def test_a_bound_of_one_prior_makes_the_sum_a_bound(ladder: TwoStagePipeline) -> None:
    parallel = tiny.pipeline("parallel")
    mixed = TwoStagePipeline(ladder.tokenizer, [parallel.priors[0], ladder.priors[1]])
    assert mixed.nll_is_bound and mixed.priors[0].nll_is_bound and not mixed.priors[1].nll_is_bound


def test_every_row_of_a_bound_has_masks_of_its_own() -> None:
    codes = [torch.zeros(8, 4, 4, dtype=torch.int64)]
    assert tiny.pipeline("maskgit").nll(codes, 1).unique().numel() > 1


def test_nll_of_an_image_does_not_depend_on_its_batch(gpt: TwoStagePipeline) -> None:
    x, label = torch.rand(13, 1, 8, 8), torch.arange(13) % 4
    whole = gpt.nll(x, label)
    assert torch.equal(torch.cat([gpt.nll(x[i : i + 3], label[i : i + 3]) for i in range(0, 13, 3)]), whole)


def test_nll_without_a_label_asks_for_the_learned_null(gpt: TwoStagePipeline) -> None:
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(gpt.nll(x), gpt.priors[0].nll(gpt.encode(x), None).double().sum(1), rtol=1e-5)
    tok = tiny.tokenizer()
    strict = TwoStagePipeline(tok, [tiny.prior("gpt", tiny.codes_spec(tok), cond_dropout=0.0)])
    with pytest.raises(ValueError, match="^label: none; the gpt prior of codes was trained with labels always present"):
        strict.nll(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:1], "codes: 1 levels of codes; expected 2"),
        (lambda c: [c[0] + 9, c[1]], r"codes: level 'top' holds values in \[\d+, \d+\]; expected \[0, 4\]"),
        (lambda c: [c[0], c[1].int()], "codes: level 'bottom' is torch.int32"),
        (lambda c: [], "codes: 0 levels of codes"),
    ],
)
def test_codes_that_are_none_are_refused(ladder: TwoStagePipeline, change: Any, message: str) -> None:
    codes = ladder.encode(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=message):
        ladder.nll(change(codes), 0)


# Placement -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_to_casts_all_parts(kind: str) -> None:
    pipeline = tiny.pipeline(kind, micro_batch=8)
    single = pipeline.sample(8, seed=0, label=1)
    assert pipeline.to(torch.float64) is pipeline and pipeline.dtype == torch.float64
    assert all(prior.dtype == torch.float64 for prior in pipeline.priors)
    double = pipeline.sample(8, seed=0, label=1)
    assert double.dtype == torch.float64
    assert ((double - single).abs().flatten(1).amax(1) < 1e-4).sum() >= 6, "the same draws, but for codes at the edge of two"
    assert pipeline.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    half = pipeline.sample(8, seed=0, label=1)
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert pipeline.reconstruct(half).isfinite().all() and pipeline.nll(half, 1).isfinite().all()


@pytest.mark.gpu
def test_a_pipeline_on_the_gpu_gives_its_samples_on_the_cpu() -> None:
    pipeline = tiny.pipeline("ladder").to("cuda")
    assert pipeline.device.type == "cuda"
    x = pipeline.sample(8, seed=0)
    assert x.device.type == "cpu" and torch.equal(streamed(pipeline, 3, first=5, seed=0), x[5:8])
    assert torch.equal(pipeline.labels(8, seed=0), tiny.pipeline("ladder").labels(8, seed=0))
    assert pipeline.reconstruct(x).device.type == "cuda" and pipeline.nll(x, 0).isfinite().all()
