"""What a pipeline refuses, before any work, and every form that a label may take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.specs import CodesSpec, LevelSpec
from pipelines import TwoStagePipeline
from pipelines.labels import known_classes
from tests import tiny_pipelines as tiny

ladders, gpt, ladder = tiny.ladders, tiny.gpt, tiny.ladder  # fixtures


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
    with pytest.raises(ValueError, match="top_k: 6; expected at most the vocabulary of level .top., 5"):
        ladder.sample(4, top_k=6)


def test_bad_settings_are_refused_at_construction() -> None:
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"^micro_batch: {size!r}; expected a whole number of at least 1"):
            tiny.pipeline("gpt", micro_batch=size)
    with pytest.raises(ValueError, match="^temperature: -1"):
        tiny.pipeline("gpt", defaults={"temperature": -1})
    with pytest.raises(ValueError, match="^heat: no prior of this pipeline has such a sampling option; the gpt prior of codes has temp"):
        tiny.pipeline("gpt", defaults={"heat": 1})


# Labels ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "label",
    [
        2,
        "Shirt",
        "shirt",
        [2] * 5,
        ("Shirt", 2, "shirt", 2, 2),
        torch.tensor(2),
        torch.full((5,), 2, dtype=torch.int32),
        np.full(5, 2),
        np.array(["Shirt"] * 5),
        np.int64(2),
    ],
    ids=repr,
)
def test_labels_come_as_indices_names_sequences_and_tensors(gpt: TwoStagePipeline, label: Any) -> None:
    assert torch.equal(gpt.sample(5, seed=0, label=label), gpt.sample(5, seed=0, label=torch.tensor([2] * 5)))
    assert not torch.equal(gpt.sample(5, seed=0, label=label), gpt.sample(5, seed=0, label=1))


def test_an_unknown_name_is_answered_with_the_nearest(gpt: TwoStagePipeline) -> None:
    with pytest.raises(ValueError, match="label: unknown class 'shrit'; did you mean 'Shirt'. known: shoe, bag, Shirt, dress"):
        gpt.sample(1, label="shrit")
    assert known_classes(("cat", "dog, big")) == "cat, 'dog, big'"


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
