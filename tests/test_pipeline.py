"""TwoStagePipeline: parts that fit, samples that depend on seed and index alone, labels, ranges, likelihood."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.specs import CodesSpec, Cond, LevelSpec
from pipelines import TwoStagePipeline
from tests import tiny_pipelines as tiny

KINDS = ("gpt", "pixelcnn", "ladder")


@pytest.fixture(autouse=True, scope="module")
def _ladder() -> Iterator[None]:
    tiny.register_ladder()
    yield
    tiny.unregister_ladder()


@pytest.fixture(scope="module")
def gpt(_ladder: None) -> TwoStagePipeline:
    return tiny.pipeline("gpt", micro_batch=8)


@pytest.fixture(scope="module")
def ladder(_ladder: None) -> TwoStagePipeline:
    return tiny.pipeline("ladder", micro_batch=8)


def streamed(pipeline: TwoStagePipeline, n: int, **arguments: Any) -> Tensor:
    return torch.stack([x for _, x in pipeline.stream(n, **arguments)])


# D6: parts that do not fit are refused at construction ---------------------------------------------------------------
def parts(case: str) -> tuple[Any, Any]:
    tok = tiny.pipeline("ladder").tokenizer
    spec = tiny.codes_spec(tok)
    top, bottom = tiny.prior("gpt", spec, "0:1"), tiny.prior("pixelcnn", spec, "1:2")
    if case == "another tokenizer":
        with torch.no_grad():
            tok.get_parameter("bottom")[0] += 0.125
        return tok, [top, bottom]
    if case == "a prior of other levels":
        other = CodesSpec((spec.levels[0], LevelSpec("bottom", 9, (4, 4))), spec.fingerprint, spec.classes, spec.class_counts)
        return tok, [top, tiny.prior("pixelcnn", other, "1:2")]
    if case == "other classes":
        other = CodesSpec(spec.levels, spec.fingerprint, ("a", "b"), (1, 1))
        return tok, [top, tiny.prior("pixelcnn", other, "1:2")]
    if case == "top prior with the tokenizer of a single level":
        return tiny.tokenizer(), [top]
    if case == "another device":
        return tok, [top, bottom.to("meta")]
    given = {"none": [], "bottom alone": [bottom], "bottom first": [bottom, top], "top twice": [top, top], "no prior": [tok]}
    return (top, [top]) if case == "no tokenizer" else (tok, given[case])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another tokenizer", r"priors\[0\]: trained on the codes of a tokenizer of fingerprint [0-9a-f]{64}; this one has [0-9a-f]{64}"),
        ("a prior of other levels", r"priors\[1\]: trained on 'bottom' \(9 codes on \(4, 4\)\) where the tokenizer has 'bottom' \(7 codes"),
        ("other classes", r"priors\[1\]: the classes \('a', 'b'\) differ from those of priors\[0\]"),
        ("top prior with the tokenizer of a single level", r"priors\[0\]: trained on 2 levels where the tokenizer has 1"),
        ("another device", r"priors\[1\]: lies on meta, the tokenizer on cpu; expected one device"),
        ("none", "priors: none; expected at least one"),
        ("bottom alone", "priors: the levels are 1:2; expected ranges that follow each other from 0 to 1 or 2"),
        ("bottom first", "priors: the levels are 1:2, 0:1; expected"),
        ("top twice", "priors: the levels are 0:1, 0:1; expected"),
        ("no prior", r"priors\[0\]: a Ladder; expected a Prior"),
        ("no tokenizer", "tokenizer: a GPTPrior; expected a Tokenizer"),
    ],
)
def test_d6_parts_that_do_not_fit_are_refused(case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStagePipeline(*parts(case))


def test_priors_may_cover_leading_levels_that_the_tokenizer_decodes_alone() -> None:
    tok, (top, _) = parts("bottom first")[0], tiny.pipeline("ladder").priors
    coarse = TwoStagePipeline(tok, [top], micro_batch=8)
    x = coarse.sample(4, seed=0, label=0)
    assert torch.equal(x, x[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)), "one grey per top code"


def test_one_prior_may_take_labels_and_the_next_none() -> None:
    whole = tiny.pipeline("ladder")
    unlabelled = tiny.prior("pixelcnn", whole.priors[1].spec, "1:2", cond_dropout=1.0)
    mixed = TwoStagePipeline(whole.tokenizer, [whole.priors[0], unlabelled], micro_batch=8)
    assert mixed.classes == tiny.CLASSES
    assert mixed.sample(3, label="bag", seed=0).shape == (3, 1, 8, 8)
    assert mixed.nll(torch.rand(2, 1, 8, 8), "bag").isfinite().all()


# D5: arguments ---------------------------------------------------------------------------------------------------------
BAD: list[tuple[str, Any]] = [
    ("n", 0), ("n", -3), ("n", 2.0), ("n", True), ("n", "4"), ("n", None), ("seed", -1), ("seed", 0.5), ("seed", 2**63),
    ("temperature", -0.5), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"), ("guidance", math.nan),
    ("top_k", 0), ("top_k", 17), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("batch_size", 0),
    ("label", 4), ("label", -1), ("label", "boot"), ("label", 1.0), ("label", True), ("label", [0, 1]), ("label", {"a": 1}),
    ("label", ["bag", "bag", "bag", "bog"]), ("label", torch.tensor([0.0] * 4)), ("label", torch.tensor([0, 1, 2, 9])),
    ("label", torch.zeros(4, 1, dtype=torch.int64)), ("steps", 3), ("temprature", 1.0), ("batch_size", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
@pytest.mark.parametrize("method", ["sample", "stream"])
def test_d5_a_bad_argument_is_named_before_any_work(monkeypatch: Any, gpt: TwoStagePipeline, method: str, name: str, value: Any) -> None:
    monkeypatch.setattr(type(gpt.priors[0]), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    with pytest.raises(ValueError, match=rf"^{name}: "):
        getattr(gpt, method)(**({"n": 4} | {name: value}))


@pytest.mark.parametrize(("name", "value"), [("output", "jpg"), ("output", None), ("first", -1), ("first", 1.0)])
def test_d5_arguments_of_one_method(gpt: TwoStagePipeline, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: {value!r}"):
        gpt.stream(4, first=value) if name == "first" else gpt.sample(4, output=value)


def test_an_option_that_one_prior_refuses_is_refused_before_the_first_draws(monkeypatch: Any, ladder: TwoStagePipeline) -> None:
    monkeypatch.setattr(type(ladder.priors[0]), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    with pytest.raises(ValueError, match="top_k: 6; expected at most the vocabulary, 5"):
        ladder.sample(4, top_k=6)


def test_bad_settings_are_refused_at_construction() -> None:
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"^micro_batch: {size!r}; expected a whole number of at least 1"):
            tiny.pipeline("gpt", micro_batch=size)
    with pytest.raises(ValueError, match="^temperature: -1"):
        tiny.pipeline("gpt", defaults={"temperature": -1})
    with pytest.raises(ValueError, match="^heat: a gpt prior has no such sampling option; it has temperature"):
        tiny.pipeline("gpt", defaults={"heat": 1})


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


# Labels ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "label",
    [
        2, "Shirt", "shirt", [2] * 5, ("Shirt", 2, "shirt", 2, 2), torch.tensor(2), torch.full((5,), 2, dtype=torch.int32),
        np.full(5, 2), np.int64(2),
    ],
    ids=repr,
)
def test_labels_come_as_indices_names_sequences_and_tensors(gpt: TwoStagePipeline, label: Any) -> None:
    assert torch.equal(gpt.sample(5, seed=0, label=label), gpt.sample(5, seed=0, label=torch.tensor([2] * 5)))
    assert not torch.equal(gpt.sample(5, seed=0, label=label), gpt.sample(5, seed=0, label=1))


def test_an_unknown_name_is_answered_with_the_nearest(gpt: TwoStagePipeline) -> None:
    with pytest.raises(ValueError, match="label: unknown class 'shrit'; did you mean 'Shirt'. known: shoe, bag, Shirt, dress"):
        gpt.sample(1, label="shrit")


def test_without_training_frequencies_a_label_is_asked_for() -> None:
    tok = tiny.tokenizer()
    unseen = TwoStagePipeline(tok, [tiny.prior("gpt", CodesSpec(tok.level_specs(), tok.fingerprint, ("a", "b"), (0, 0)))])
    for call in (lambda: unseen.stream(1), lambda: unseen.labels(1, seed=0)):
        with pytest.raises(ValueError, match="label: the training frequencies of the classes are all 0"):
            call()
    assert unseen.sample(1, label="b").shape == (1, 1, 8, 8)


def test_a_name_of_two_classes_is_refused_with_their_indices() -> None:
    tok = tiny.tokenizer()
    spec = CodesSpec(tok.level_specs(), tok.fingerprint, ("crane", "bag", "crane"), (1, 1, 1))
    with pytest.raises(ValueError, match="label: 'crane' is the name of classes 0, 2; give the index"):
        TwoStagePipeline(tok, [tiny.prior("gpt", spec)]).sample(1, label="crane")


def test_without_a_label_classes_are_drawn_by_the_training_frequencies_from_the_sample_alone(gpt: TwoStagePipeline) -> None:
    label = gpt.labels(6000, seed=0)
    counts = torch.bincount(label, minlength=4).double()
    expected = 6000 * torch.tensor([10, 20, 30]).double() / 60
    assert counts[3] == 0 and ((counts[:3] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees, p = 0.001
    assert torch.equal(gpt.labels(100, first=17, seed=0), label[17:117])
    assert torch.equal(gpt.sample(12, seed=0), gpt.sample(12, seed=0, label=label[:12]))


def test_without_labels_in_training_a_label_is_refused() -> None:
    plain = tiny.pipeline("gpt", labelled=False)
    assert plain.classes == () and plain.sample(2, seed=0).shape == (2, 1, 8, 8)
    for call in (lambda: plain.sample(2, label=0), lambda: plain.nll(torch.rand(2, 1, 8, 8), 0), lambda: plain.labels(2, seed=0)):
        with pytest.raises(ValueError, match="no prior of this pipeline takes labels"):
            call()


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
    from intarsia.specs import SignalSpec
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


def test_nll_of_an_image_does_not_depend_on_its_batch(gpt: TwoStagePipeline) -> None:
    x, label = torch.rand(13, 1, 8, 8), torch.arange(13) % 4
    whole = gpt.nll(x, label)
    assert torch.equal(torch.cat([gpt.nll(x[i : i + 3], label[i : i + 3]) for i in range(0, 13, 3)]), whole)


def test_nll_without_a_label_asks_for_the_learned_null(gpt: TwoStagePipeline) -> None:
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(gpt.nll(x), gpt.priors[0].nll(gpt.encode(x), None).double().sum(1), rtol=1e-5)
    tok = tiny.tokenizer()
    strict = TwoStagePipeline(tok, [tiny.prior("gpt", tiny.codes_spec(tok), cond_dropout=0.0)])
    with pytest.raises(ValueError, match="cond: None.*give labels"):
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


@pytest.mark.gpu
def test_a_pipeline_on_the_gpu_gives_its_samples_on_the_cpu() -> None:
    pipeline = tiny.pipeline("ladder").to("cuda")
    assert pipeline.device.type == "cuda"
    x = pipeline.sample(8, seed=0)
    assert x.device.type == "cpu" and torch.equal(streamed(pipeline, 3, first=5, seed=0), x[5:8])
    assert torch.equal(pipeline.labels(8, seed=0), tiny.pipeline("ladder").labels(8, seed=0))
    assert pipeline.reconstruct(x).device.type == "cuda" and pipeline.nll(x, 0).isfinite().all()
