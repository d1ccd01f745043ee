"""Sampling options through a pipeline: every prior gets what is for it, and what no prior has is refused before any draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.cli import parse
from intarsia.config import ConfigError
from pipelines import TwoStagePipeline
from pipelines.evaluate import EvaluateConfig
from pipelines.options import merged_options, route_options
from pipelines.sample import SampleConfig
from pipelines.sampling_config import ALIASES, SamplingConfig
from stage2_prior.priors.base import PRIORS, Prior
from stage2_prior.priors.gpt import GPTConfig, GPTPrior
from stage2_prior.sampling import DrawOptions, Guidance
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture


@pytest.fixture(scope="module")
def three(ladders: None) -> TwoStagePipeline:
    """GPT over PixelCNN over MaskGIT."""
    return tiny.pipeline("three", micro_batch=8)


def test_a_plain_value_goes_to_every_prior_that_has_the_option(three: TwoStagePipeline) -> None:
    top, middle, bottom = route_options(three.priors, {"temperature": 0.5, "steps": 3})
    assert top == {"temperature": {"top": 0.5}} and middle == {"temperature": {"bottom": 0.5}}
    assert bottom == {"temperature": {"finest": 0.5}, "steps": {"finest": 3}}


def test_a_mapping_goes_to_the_priors_of_its_levels_and_lies_over_what_was_given_before(three: TwoStagePipeline) -> None:
    defaults = {"temperature": 0.9, "min_p": {"top": 0.1}}
    top, middle, bottom = route_options(three.priors, defaults, {"temperature": {"bottom": 0.5}, "min_p": {"finest": 0.2}})
    assert top == {"temperature": {"top": 0.9}, "min_p": {"top": 0.1}}
    assert middle == {"temperature": {"bottom": 0.5}}
    assert bottom == {"temperature": {"finest": 0.9}, "min_p": {"finest": 0.2}}
    joint = tiny.pipeline("joint")
    assert route_options(joint.priors, {"top_k": {"top": 2, "bottom": 3}}) == ({"top_k": {"top": 2, "bottom": 3}},)


def test_what_options_come_to_is_told_as_briefly_as_it_can(three: TwoStagePipeline) -> None:
    defaults = {"temperature": {"top": 0.5}, "min_p": 0.1}
    assert merged_options(three.priors, defaults, {"temperature": {"bottom": 0.8}, "steps": 3}) == {
        "temperature": {"top": 0.5, "bottom": 0.8},
        "min_p": 0.1,
        "steps": 3,
    }
    assert merged_options(three.priors, defaults, {"temperature": 0.9, "guidance": {"start": 1, "stop": 2}}) == {
        "temperature": 0.9,
        "min_p": 0.1,
        "guidance": {"start": 1, "stop": 2},
    }


def test_an_order_without_noise_takes_the_default_noise_away_and_an_explicit_one_is_refused(three: TwoStagePipeline) -> None:
    noisy = TwoStagePipeline(three.tokenizer, three.priors, micro_batch=8, defaults={"noise": 3.0, "steps": 4})
    plain = TwoStagePipeline(three.tokenizer, three.priors, micro_batch=8, defaults={"steps": 4})
    assert torch.equal(noisy.sample(4, seed=0, order="halton"), plain.sample(4, seed=0, order="halton"))
    assert merged_options(three.priors, noisy.defaults, {"order": "halton"}) == {"steps": 4, "order": "halton"}
    assert merged_options(three.priors, noisy.defaults, {"order": "confidence"})["noise"] == 3.0
    with pytest.raises(ValueError, match="noise: 2.0; order 'halton' has no use for it"):
        noisy.sample(4, order="halton", noise=2.0)
    parallel = tiny.pipeline("joint parallel", defaults={"noise": 3.0})
    assert merged_options(parallel.priors, parallel.defaults, {"order": {"top": "raster"}}) == {
        "noise": {"bottom": 3.0},
        "order": {"top": "raster"},
    }
    assert parallel.sample(2, seed=0, label=0, order={"top": "raster"}).shape == (2, 1, 8, 8)


def drawn(pipeline: TwoStagePipeline, **options: Any) -> list[Tensor]:
    """The codes of 16 samples of one class."""
    keep = [torch.zeros(16, *level.shape, dtype=torch.bool) for level in pipeline.spec.levels]
    return pipeline.complete_codes([k.long() for k in keep], keep, seed=0, label=1, **options)


def test_options_of_a_level_change_that_level_and_what_is_below_it_alone(three: TwoStagePipeline) -> None:
    plain, greedy = drawn(three), drawn(three, temperature={"bottom": 0.0})
    assert torch.equal(greedy[0], plain[0]) and not torch.equal(greedy[1], plain[1])
    assert not torch.equal(drawn(three, temperature={"top": 0.0})[0], plain[0])


def test_the_label_and_guidance_reach_all_levels(three: TwoStagePipeline) -> None:
    x = torch.rand(8, 1, 8, 8)
    assert not torch.equal(drawn(three, guidance=1.0)[0], drawn(three, guidance=4.0)[0])
    for level in ("bottom", "finest"):  # the top is kept: it is the guidance of this level that changes it
        calm, strong = (three.variations(x, level, seed=0, label=2, guidance=g) for g in (1.0, 4.0))
        other = three.variations(x, level, seed=0, label=1)
        assert not torch.equal(calm, strong) and not torch.equal(calm, other)


def test_guidance_goes_where_the_label_goes() -> None:
    whole = tiny.pipeline("ladder")
    unlabelled = tiny.prior("pixelcnn", whole.priors[1].spec, "1:2", cond_dropout=1.0)
    mixed = TwoStagePipeline(whole.tokenizer, [whole.priors[0], unlabelled], micro_batch=8)
    assert route_options(mixed.priors, {"guidance": 2.0}) == ({"guidance": {"top": 2.0}}, {})
    assert mixed.sample(2, seed=0, label=0, guidance=2.0).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"guidance: 2.0; a prior without conditions has only 1 .*the pixelcnn prior of bottom"):
        mixed.sample(2, label=0, guidance={"bottom": 2.0})


def test_a_schedule_of_guidance_is_one_value_for_all_levels_or_a_level_of_a_mapping(three: TwoStagePipeline) -> None:
    as_object = three.sample(4, seed=0, label=1, guidance=Guidance(1, 3))
    assert torch.equal(as_object, three.sample(4, seed=0, label=1, guidance={"start": 1.0, "stop": 3.0}))
    each = {level: {"start": 1.0, "stop": 3.0} for level in ("top", "bottom", "finest")}
    assert torch.equal(as_object, three.sample(4, seed=0, label=1, guidance=each))
    assert not torch.equal(as_object, three.sample(4, seed=0, label=1))
    kept = tiny.pipeline("ladder", defaults={"guidance": Guidance(1, 3, "cosine")}).defaults
    assert kept == {"guidance": {"start": 1, "stop": 3, "shape": "cosine"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heat": 1}, r"^heat: no prior of this pipeline has such a sampling option; the gpt prior of top has temperature, .*steps"),
        ({"steps": {"top": 3}}, r"^steps.top: no sampling option of its prior; the gpt prior of top has temperature, top_k"),
        ({"temperature": {"middle": 1}}, "^temperature.middle: unknown level; the levels are top, bottom, finest"),
        ({"temperature": {"botom": 1}}, "^temperature.botom: unknown level; did you mean 'bottom'. the levels are"),
        ({"top_k": 5}, r"^top_k: 5; expected at most the vocabulary of level 'finest', 3 \(the maskgit prior of finest\)"),
        ({"top_k": {"bottom": 8}}, r"^top_k: 8; expected at most the vocabulary of level 'bottom', 7"),
        ({"steps": 65}, "^steps: 65; level 'finest' has 64 positions"),
        ({"min_p": 2}, "^min_p: 2; expected a number in"),
        ({"guidance": {"stop": 2}}, "^guidance: .*expected a number, or start, stop and shape"),
        ({"temperature": {}}, "^temperature: an empty mapping; expected a value, or one for at least one of top, bottom, finest"),
        ({"text": "a red shoe"}, "^text: no prior of this pipeline takes text"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_draw(
    monkeypatch: Any, three: TwoStagePipeline, options: dict[str, Any], message: str
) -> None:
    for prior in three.priors:
        monkeypatch.setattr(type(prior), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    x, keep = torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    for call in (lambda: three.sample(2, label=0, **options), lambda: three.complete(x, keep, label=0, **options)):
        with pytest.raises(ValueError, match=message):
            call()


def test_guidance_without_dropout_of_the_condition_in_training_is_refused() -> None:
    whole = tiny.pipeline("ladder")
    sure = tiny.prior("pixelcnn", whole.priors[1].spec, "1:2", cond_dropout=0.0)
    pipeline = TwoStagePipeline(whole.tokenizer, [whole.priors[0], sure])
    with pytest.raises(ValueError, match=r"guidance: 2.0; this prior was trained with cond_dropout 0 .*\(the pixelcnn prior of bottom\)"):
        pipeline.sample(1, label=0, guidance=2.0)
    assert pipeline.sample(1, label=0, seed=0, guidance={"top": 2.0}).shape == (1, 1, 8, 8)


def test_a_bottom_prior_without_the_upper_codes_is_refused(three: TwoStagePipeline) -> None:
    with pytest.raises(ValueError, match=r"upper: 0 levels of codes; expected 1 \(top\)"):
        three.priors[1].sample(torch.arange(2))


# Flags -----------------------------------------------------------------------------------------------------------------
def sampling(*argv: str) -> dict[str, Any]:
    config, _ = parse(SampleConfig, argv, ALIASES)
    assert parse(EvaluateConfig, argv, ALIASES)[0].sampling == config.sampling, "both scripts read the same words"
    return config.sampling.given()


def test_flags_say_options_for_all_levels_or_one() -> None:
    assert sampling("--temperature", "0.9", "--steps", "8", "--order", "halton", "--min_p", "0.1") == {
        "temperature": 0.9, "steps": 8, "order": "halton", "min_p": 0.1,
    }  # fmt: skip
    assert sampling("--temperature.top", "0.9", "--temperature.bottom", "1") == {"temperature": {"top": 0.9, "bottom": 1}}
    assert sampling("--guidance.start", "1", "--guidance.stop", "4") == {"guidance": {"start": 1, "stop": 4}}
    assert sampling("--guidance.top.start", "1", "--guidance.top.stop", "4", "--guidance.bottom", "2") == {
        "guidance": {"top": {"start": 1, "stop": 4}, "bottom": 2}
    }
    assert sampling() == {}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--temperature", "warm"], "sampling.temperature: expected a number, or a mapping from names of levels to such; got 'warm'"),
        (["--steps", "2.5"], "sampling.steps: expected a whole number, or a mapping from names of levels to such; got 2.5"),
        (["--top_k.top", "all"], "sampling.top_k: expected a whole number, or a mapping from names of levels to such"),
        (
            ["--guidance.start", "x"],
            "sampling.guidance: expected a number, or start, stop and shape, or a mapping from names of",
        ),
        (["--temperature", ".nan"], "sampling.temperature: expected a number"),
    ],
)
def test_a_flag_that_says_no_option_is_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sampling(*argv)
    assert len(caught.value.errors) == 1 and caught.value.errors[0].startswith(line), caught.value.errors


def test_every_option_of_every_prior_has_a_flag() -> None:
    from dataclasses import fields

    names = {field.name for kind in PRIORS.names() for field in fields(PRIORS.get(kind).Options)}
    assert names == set(SamplingConfig.model_fields)


def test_a_prior_may_have_words_of_its_own_and_a_foreign_class_of_options_is_refused_where_it_is_defined() -> None:
    @dataclass(frozen=True)
    class Sharper(DrawOptions):
        power: int = 1

    class Own(GPTPrior):
        Options = Sharper

    tokenizer = tiny.tokenizer()
    prior = Own(GPTConfig(width=16, depth=1, heads=2), tiny.codes_spec(tokenizer))
    pipeline = TwoStagePipeline(tokenizer, [prior], defaults={"power": 3})
    assert prior.check_options({"power": 2})[0].power == 2 and pipeline.sample(1, seed=0, power=2).shape == (1, 1, 8, 8)

    @dataclass(frozen=True)
    class Foreign:
        power: int = 1

    for kind, name in ((Foreign, "Foreign"), (Sharper(), "Sharper")):
        with pytest.raises(ValueError, match=rf"Wrong.Options: .*{name}.*; expected stage2_prior.sampling.DrawOptions, or a dataclass"):
            type("Wrong", (Prior,), {"Options": kind})
