"""Completion: known codes stay exactly, the rest is drawn; masks, seams, canvases and levels; what cannot be is said early."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.specs import SignalSpec
from pipelines import TwoStagePipeline
from pipelines.masks import filled, generated_share, kept_cells
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAE
from stage2_prior.priors.rq import RQConfig, RQPrior
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture
PARALLEL, RASTER = ("maskgit", "parallel", "joint parallel", "three parallel"), ("gpt", "pixelcnn", "ladder", "joint", "three")


@pytest.fixture(scope="module")
def pipelines(ladders: None) -> dict[str, TwoStagePipeline]:
    return {kind: tiny.pipeline(kind, micro_batch=8) for kind in (*PARALLEL, "ladder")}


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def spots(n: int, seed: int = 1) -> Tensor:
    """Masks of single pixels."""
    mask = torch.zeros(n, 64, dtype=torch.bool)
    mask.scatter_(1, torch.rand(n, 64, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :3], True)
    return mask.view(n, 1, 8, 8)


def below(n: int, row: int = 4) -> Tensor:
    mask = torch.zeros(n, 1, 8, 8, dtype=torch.bool)
    mask[:, :, row:] = True
    return mask


# Codes -----------------------------------------------------------------------------------------------------------------
def touched(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """By a loop over cells and pixels: what ``kept_cells`` leaves."""
    out = torch.zeros(len(mask), *grid, dtype=torch.bool)
    sizes = mask.shape[2:]
    for row, *place in mask[:, 0].nonzero().tolist():
        cells = [[c for c in range(g) if c * s // g <= p < -(-(c + 1) * s // g)] for p, g, s in zip(place, grid, sizes, strict=True)]
        for cell in torch.cartesian_prod(*map(torch.tensor, cells)).view(-1, len(grid)).tolist():
            out[(row, *cell)] = True
    return out


@pytest.mark.parametrize(("sizes", "grid"), [((12,), (3,)), ((8, 8), (2, 4)), ((28, 28), (7, 7)), ((7, 5), (3, 2)), ((4, 6, 6), (2, 3, 2))])
def test_a_cell_is_generated_if_its_patch_touches_the_mask(sizes: tuple[int, ...], grid: tuple[int, ...]) -> None:
    mask = torch.rand(20, 1, *sizes, generator=torch.Generator().manual_seed(0)) < 0.04
    assert torch.equal(kept_cells(mask, grid), ~touched(mask, grid))


@pytest.mark.parametrize("kind", ["maskgit", "gpt"])
def test_a_row_of_tokens_over_an_image_is_drawn_anew_where_the_mask_touches_the_image_at_all(kind: str) -> None:
    mask = torch.stack([below(1, 7)[0], below(1, 8)[0]])  # the last row of the first image, nothing of the second
    assert torch.equal(kept_cells(mask, (4,)), torch.tensor([[False] * 4, [True] * 4]))
    assert torch.equal(kept_cells(mask, (2, 2, 2)), torch.tensor([False, True]).view(2, 1, 1, 1).expand(2, 2, 2, 2))
    pipeline, x = tiny.tokens(kind), images(2)
    y = pipeline.complete(x, mask, n=3, label="bag", seed=0)
    assert torch.equal(y[3:], pipeline.reconstruct(x[1:]).expand(3, -1, -1, -1)) and not torch.equal(y[0], y[1])
    assert torch.equal(pipeline.inpaint(x, mask, label="bag", seed=0)[:, :, :7], x[:, :, :7])
    grown = pipeline.outpaint(x[:, :, :4], [(0, 4), (0, 0)], label="bag", seed=0)
    assert grown.shape == x.shape and torch.equal(grown[:, :, :4], x[:, :, :4])


@pytest.mark.parametrize("kind", PARALLEL)
def test_known_codes_stay_exactly_and_the_others_are_drawn(pipelines: dict[str, TwoStagePipeline], kind: str) -> None:
    pipeline, x, mask = pipelines[kind], images(12), spots(12)
    codes = pipeline.encode(filled(x, mask))
    keep = [kept_cells(mask, level.shape) for level in pipeline.spec.levels]
    drawn = pipeline.complete_codes(codes, keep, n=3, label="bag", seed=0)
    changed = 0
    for code, kept, found in zip(codes, keep, drawn, strict=True):
        code, kept = code.repeat_interleave(3, 0), kept.repeat_interleave(3, 0)
        assert torch.equal(found[kept], code[kept])
        changed += int((found[~kept] != code[~kept]).sum())
    assert changed > 30
    assert torch.equal(pipeline.complete(x, mask, n=3, label="bag", seed=0), pipeline.decode(drawn))
    garbage = [torch.where(k, c, c + 10**6) for c, k in zip(codes, keep, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(pipeline.complete_codes(garbage, keep, n=3, label="bag", seed=0), drawn, strict=True))


@pytest.mark.parametrize("kind", RASTER)
def test_autoregressive_priors_complete_a_raster_prefix(kind: str) -> None:
    pipeline, x = tiny.pipeline(kind, micro_batch=8), images(5)
    if kind == "joint":  # a mask over two levels in one sequence is no prefix of it, unless the first level is whole
        with pytest.raises(ValueError, match=r"mask: the gpt prior of top, bottom cannot complete it: .*sample 0 is no prefix"):
            pipeline.complete(x, below(5), label=0, seed=0)
        return
    codes, found = pipeline.encode(filled(x, below(5))), pipeline.complete(x, below(5), label=0, seed=0)
    drawn = pipeline.complete_codes(codes, [kept_cells(below(5), level.shape) for level in pipeline.spec.levels], label=0, seed=0)
    assert torch.equal(found, pipeline.decode(drawn))
    for code, made in zip(codes, drawn, strict=True):
        half = code.shape[1] // 2
        assert torch.equal(code[:, :half], made[:, :half]) and not torch.equal(code[:, half:], made[:, half:])


def test_an_empty_mask_is_the_reconstruction_and_a_full_one_a_sample() -> None:
    pipeline = tiny.pipeline("ladder", micro_batch=8)
    x, label = images(4), torch.tensor([0, 1, 2, 1])
    none, full = torch.zeros(4, 1, 8, 8, dtype=torch.bool), torch.ones(4, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(pipeline.complete(x, none, label=label, seed=3), pipeline.reconstruct(x))
    assert torch.equal(pipeline.complete(x, full, label=label, seed=3), pipeline.sample(4, label=label, seed=3))
    assert torch.equal(pipeline.variations(x, 0, label=label, seed=3), pipeline.sample(4, label=label, seed=3))


@pytest.mark.parametrize("kind", ["maskgit", "parallel"])
def test_nothing_of_what_is_hidden_reaches_a_completion(pipelines: dict[str, TwoStagePipeline], kind: str) -> None:
    """The encoder of the first sees across the border of a mask, and one row is hidden as a whole."""
    pipeline, x, mask = pipelines[kind], images(6), spots(6)
    mask[0] = True
    other = torch.where(mask, 1 - x, x)
    assert any(not torch.equal(a, b) for a, b in zip(pipeline.encode(x), pipeline.encode(other), strict=True))
    for method in (pipeline.complete, pipeline.inpaint):
        assert torch.equal(method(x, mask, label=0, seed=0), method(other, mask, label=0, seed=0))


def test_a_prefix_of_levels_reconstructs_and_completes_from_those_alone(pipelines: dict[str, TwoStagePipeline]) -> None:
    both = pipelines["parallel"]
    top, x = TwoStagePipeline(both.tokenizer, both.priors[:1]), images(4)
    assert torch.equal(top.reconstruct(x), both.decode(both.encode(x)[:1])) and not torch.equal(top.reconstruct(x), both.reconstruct(x))
    assert torch.equal(top.complete(x, torch.zeros(4, 1, 8, 8, dtype=torch.bool), label=0), top.reconstruct(x))


def test_what_is_drawn_depends_on_what_is_known(pipelines: dict[str, TwoStagePipeline]) -> None:
    """The upper level of a hierarchy first, then the lower one given it: another known part gives other draws."""
    pipeline = pipelines["parallel"]
    dark, bright = torch.zeros(8, 1, 8, 8), torch.ones(8, 1, 8, 8)
    mask = below(8)
    keep = [kept_cells(mask, level.shape) for level in pipeline.spec.levels]
    a, b = (pipeline.complete_codes(pipeline.encode(x), keep, label=0, seed=0) for x in (dark, bright))
    assert all(not torch.equal(p[~k], q[~k]) for p, q, k in zip(a, b, keep, strict=True))


# F4 --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ladder", "parallel"])
def test_f4_a_completion_has_the_same_bits_in_any_batch(kind: str, ranks: Any) -> None:
    pipeline, x = tiny.pipeline(kind), images(24)
    mask = below(24) if kind == "ladder" else spots(24)
    label = torch.arange(24) // 7
    whole = pipeline.complete(x, mask, n=2, label=label, seed=5)
    for size in (1, 7, 32):
        assert torch.equal(pipeline.complete(x, mask, n=2, label=label, seed=5, batch_size=size), whole)

    def part(rank: int) -> Tensor:
        rows = slice(12 * rank, 12 * rank + 12)
        return pipeline.complete(x[rows], mask[rows], n=2, first=24 * rank, label=label[rows], seed=5)

    assert torch.equal(torch.cat(ranks(part)), whole)
    assert not torch.equal(whole[::2], whole[1::2]) and not torch.equal(pipeline.complete(x, mask, n=2, label=label, seed=6), whole)


def test_with_nothing_known_a_completion_is_a_sample_of_the_rows_class(pipelines: dict[str, TwoStagePipeline]) -> None:
    pipeline, everything = pipelines["maskgit"], torch.ones(3, 1, 8, 8, dtype=torch.bool)
    found = pipeline.complete(images(3), everything, n=2, label=[0, 1, 2], seed=0)
    assert torch.equal(found, pipeline.sample(6, label=[0, 0, 1, 1, 2, 2], seed=0))


def test_without_a_seed_a_fresh_one_is_taken_and_can_be_read(pipelines: dict[str, TwoStagePipeline]) -> None:
    pipeline = pipelines["maskgit"]
    found = pipeline.complete(images(4), spots(4))
    assert torch.equal(pipeline.complete(images(4), spots(4), seed=pipeline.last_seed), found)


# Signals ---------------------------------------------------------------------------------------------------------------
def test_inpainting_puts_the_known_pixels_back_exactly(pipelines: dict[str, TwoStagePipeline]) -> None:
    pipeline, x, mask = pipelines["parallel"], images(6), spots(6)
    drawn, found = (method(x, mask, n=2, label=1, seed=0) for method in (pipeline.complete, pipeline.inpaint))
    known, open_ = (~mask).repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    assert torch.equal(found[known], x.repeat_interleave(2, 0)[known]) and torch.equal(found[open_], drawn[open_])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_is_put_back_keeps_the_bits_of_any_dtype(pipelines: dict[str, TwoStagePipeline], dtype: torch.dtype) -> None:
    x, mask, wide = images(4).double().mul(1 / 3).to(dtype), spots(4), torch.promote_types(dtype, torch.float32)
    found = pipelines["parallel"].inpaint(x, mask, label=1, seed=0)
    assert found.dtype == wide and torch.equal(found[~mask], x[~mask].to(wide)) and torch.equal(found[~mask].to(dtype), x[~mask])
    assert pipelines["parallel"].outpaint(x[:, :, :4], [(0, 4), (0, 0)], label=1, seed=0).dtype == wide


def test_a_blended_seam_falls_linearly_outside_of_the_mask_and_leaves_the_rest_exact(pipelines: dict[str, TwoStagePipeline]) -> None:
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 4] = True
    share = generated_share(mask, 3)[0, 0]
    distance = torch.maximum((torch.arange(8)[:, None] - 3).abs(), (torch.arange(8)[None] - 4).abs())
    assert torch.allclose(share, (1 - distance / 4).clamp(min=0))
    assert torch.equal(generated_share(mask, 0), mask.float())
    pipeline, x = pipelines["parallel"], images(1)
    drawn, found = pipeline.complete(x, mask, label=0, seed=0), pipeline.inpaint(x, mask, blend=3, label=0, seed=0)
    assert torch.allclose(found, x * (1 - share) + drawn * share) and torch.equal(found[0, 0][distance > 3], x[0, 0][distance > 3])


def test_outpainting_shifts_the_content_and_makes_what_lies_around_it(pipelines: dict[str, TwoStagePipeline]) -> None:
    x = images(3)[:, :, :4, :5]
    found = pipelines["parallel"].outpaint(x, [(1, 3), (2, 1)], label=0, seed=0)
    assert found.shape == (3, 1, 8, 8) and torch.equal(found[:, :, 1:5, 2:7], x)
    upper = images(3)[:, :, :4]
    rows = pipelines["ladder"].outpaint(upper, [(0, 4), (0, 0)], label=0, seed=0, n=2)
    assert rows.shape == (6, 1, 8, 8) and torch.equal(rows[::2, :, :4], upper)


def test_variations_keep_the_levels_above_and_redraw_the_others(pipelines: dict[str, TwoStagePipeline]) -> None:
    three = tiny.pipeline("three", micro_batch=8)
    x = images(6)
    codes = three.encode(x)
    for name, index, kept in (("bottom", 1, 1), ("finest", 2, 2)):
        found = three.variations(x, name, n=2, label=0, seed=0)
        assert torch.equal(found, three.variations(x, index, n=2, label=0, seed=0)) and not torch.equal(found[::2], found[1::2])
        keep = [torch.full_like(c, i < kept, dtype=torch.bool) for i, c in enumerate(codes)]
        drawn = three.complete_codes(codes, keep, n=2, label=0, seed=0)
        assert all(torch.equal(drawn[i], codes[i].repeat_interleave(2, 0)) for i in range(kept))
        assert torch.equal(three.decode(drawn), found) and not torch.equal(drawn[kept], codes[kept].repeat_interleave(2, 0))
    joint = tiny.pipeline("joint", micro_batch=8)  # one prior over both levels: the top is a prefix of its sequence
    assert joint.variations(x, "bottom", label=0, seed=0).shape == (6, 1, 8, 8)


def test_a_prior_whose_level_stays_whole_needs_no_label(ladders: None) -> None:
    whole = tiny.pipeline("parallel")
    spec = whole.priors[0].spec
    mixed = TwoStagePipeline(whole.tokenizer, [tiny.prior("gpt", spec, "0:1", cond_dropout=0.0), whole.priors[1]])
    assert mixed.variations(images(2), "bottom", seed=0).shape == (2, 1, 8, 8)
    for call in (lambda: mixed.variations(images(2), "top", seed=0), lambda: mixed.nll(images(2))):
        with pytest.raises(ValueError, match=r"^label: none; the gpt prior of top was trained with labels always present"):
            call()


# Labels ----------------------------------------------------------------------------------------------------------------
def test_without_a_label_the_learned_null_is_asked_and_one_label_may_stand_for_each_signal(pipelines: dict[str, TwoStagePipeline]) -> None:
    pipeline, x, mask = pipelines["maskgit"], images(6), spots(6)
    free = pipeline.complete(x, mask, seed=0)
    each = pipeline.complete(x, mask, seed=0, label=[0, 1, 2, 0, 1, 2])
    assert not torch.equal(free, each)
    assert torch.equal(pipeline.complete(x[:1], mask[:1], seed=0, label="shoe"), each[:1])
    strict = TwoStagePipeline(pipeline.tokenizer, [tiny.prior("maskgit", pipeline.priors[0].spec, cond_dropout=0.0)])
    with pytest.raises(ValueError, match=r"label: none; the maskgit prior of codes was trained with labels always present"):
        strict.complete(x, mask)
    guided = TwoStagePipeline(pipeline.tokenizer, pipeline.priors, micro_batch=8, defaults={"guidance": 2.0})
    assert torch.equal(guided.complete(x, mask, seed=0), free)  # there is no label to be guided to
    assert not torch.equal(guided.complete(x, mask, seed=0, label=[0, 1, 2, 0, 1, 2]), each)
    with pytest.raises(ValueError, match="guidance"):
        pipeline.complete(x, mask, seed=0, guidance=2.0)
    unlabelled = tiny.pipeline("maskgit", labelled=False)
    assert unlabelled.complete(x, mask, seed=0).shape == x.shape
    with pytest.raises(ValueError, match="label: no prior of this pipeline takes labels"):
        unlabelled.complete(x, mask, label=0)


# What is refused -------------------------------------------------------------------------------------------------------
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("complete", {"mask": np.ones((2, 1, 8, 8), bool)}, r"mask: a ndarray; expected a torch.bool tensor \(2, 1, 8, 8\)"),
    ("complete", {"mask": torch.ones(2, 1, 8, 8)}, r"mask: torch.float32 \(2, 1, 8, 8\); expected torch.bool \(2, 1, 8, 8\)"),
    ("complete", {"mask": torch.ones(2, 8, 8, dtype=torch.bool)}, r"mask: torch.bool \(2, 8, 8\); expected torch.bool \(2, 1, 8, 8\)"),
    ("complete", {"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, r"mask: torch.bool \(1, 1, 8, 8\)"),
    ("complete", {"mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, r"mask: torch.bool \(2, 1, 4, 4\)"),
    ("complete", {"x": torch.rand(2, 1, 12, 12)}, r"x: axes \(12, 12\); the priors were trained for \(8, 8\)"),
    ("complete", {"x": torch.rand(0, 1, 8, 8)}, "x: shape .*expected at least one signal"),
    ("complete", {"x": torch.rand(2, 1, 8, 8) * 2 - 1}, "x: row 0 holds values in"),
    ("complete", {"label": [0, 1, 2]}, r"label: shape \(3,\); expected one label, or 2 of them"),
    ("complete", {"n": 0}, "n: 0; expected a whole number of at least 1"),
    ("complete", {"first": -1}, "first: -1"),
    ("complete", {"outpt": "pil"}, "outpt: no prior of this pipeline has such a sampling option"),
    ("complete", {"guidance": 2.0, "label": None}, "guidance: 2.0 needs a label to guide to"),
    ("complete", {"mask": spots(2)}, r"mask: the gpt prior of top cannot complete it: known: what is kept of sample \d is no prefix"),
    ("inpaint", {"blend": -1}, "blend: -1; expected a whole number of at least 0"),
    ("outpaint", {"margins": [(0, 4)]}, r"margins: \[\(0, 4\)\]; expected \(before, after\) for each of the 2 axes"),
    ("outpaint", {"margins": [(0, 4), (0, 0)]}, r"margins: .* make \(12, 8\) of \(8, 8\); the priors were trained for \(8, 8\)"),
    ("outpaint", {"margins": [(0, -4), (0, 0)]}, r"margins\[0\]: -4; expected a whole number of at least 0"),
    ("outpaint", {"x": torch.ones(2, 1, 4, 8, dtype=torch.uint8), "margins": [(0, 4), (0, 0)]}, "^x: dtype torch.uint8; expected floating"),
    ("variations", {"x": torch.rand(0, 1, 8, 8), "redraw": 0}, "^x: shape .*expected at least one signal"),
    ("variations", {"redraw": "middle"}, "redraw: unknown level 'middle'; the levels are top, bottom"),
    ("variations", {"redraw": 2}, "redraw: 2; expected a whole number of at least 0 and at most 1"),
]


@pytest.mark.parametrize(("method", "change", "message"), BAD)
def test_a_bad_argument_is_named_before_any_draw(
    monkeypatch: Any, pipelines: dict[str, TwoStagePipeline], method: str, change: dict[str, Any], message: str
) -> None:
    pipeline = pipelines["ladder"]
    for prior in pipeline.priors:
        monkeypatch.setattr(type(prior), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    given: dict[str, Any] = {"x": images(2), "label": 0, "seed": 0}
    given |= {"complete": {"mask": below(2)}, "inpaint": {"mask": below(2)}, "outpaint": {}, "variations": {}}[method]
    with pytest.raises(ValueError, match=message):
        getattr(pipeline, method)(**given | change)


def test_the_prior_that_cannot_is_named_even_where_those_above_can(monkeypatch: Any, ladders: None) -> None:
    """A top that MaskGIT completes and a bottom that PixelCNN cannot: nothing is drawn."""
    whole = tiny.pipeline("parallel")
    mixed = TwoStagePipeline(whole.tokenizer, [whole.priors[0], tiny.prior("pixelcnn", whole.priors[0].spec, "1:2")])
    monkeypatch.setattr(type(whole.priors[0]), "sample", lambda *a, **k: pytest.fail("a sample was drawn"))
    with pytest.raises(ValueError, match="^mask: the pixelcnn prior of bottom cannot complete it"):
        mixed.complete(images(2), spots(2), label=0)
    codes, keep = mixed.encode(images(2)), [kept_cells(spots(2), level.shape) for level in mixed.spec.levels]
    with pytest.raises(ValueError, match="^keep: the pixelcnn prior of bottom cannot complete it"):
        mixed.complete_codes(codes, keep, label=0)


def test_what_cannot_be_redrawn_is_said_of_redraw() -> None:
    """Depth after depth at each position: the second depth alone is no end of the order."""
    config = tiny.tokenizer().config.replace(quantizer=ResidualConfig(stages=2, inner=VQConfig(codes=16, dim=4, init="normal")))
    stages = VQVAE(config, SignalSpec("image", 1, (8, 8)))
    pipeline = TwoStagePipeline(stages, [RQPrior(RQConfig(width=16, depth=1, heads=2, cond_dropout=0.1), tiny.codes_spec(stages)).eval()])
    assert pipeline.variations(images(2), "codes/0", label=0).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="^redraw: the rq prior of codes/0, codes/1 cannot complete it"):
        pipeline.variations(images(2), "codes/1", label=0)


@pytest.mark.parametrize(("wrong", "said"), [(np.zeros((2, 4, 4), np.int64), "a list of Tensor, ndarray"), ("x", "a list of Tensor, str")])
def test_codes_that_are_no_tensors_are_refused_by_name(pipelines: dict[str, TwoStagePipeline], wrong: Any, said: str) -> None:
    pipeline = pipelines["parallel"]
    codes = pipeline.encode(images(2))
    keep = [torch.ones_like(c, dtype=torch.bool) for c in codes]
    bad = [codes[0], wrong]
    for call in (lambda: pipeline.nll(bad, 0), lambda: pipeline.decode(bad), lambda: pipeline.complete_codes(bad, keep)):
        with pytest.raises(ValueError, match=f"^codes: {said}; expected one torch tensor for each level"):
            call()
    with pytest.raises(ValueError, match="^keep: a list of .*; expected one torch tensor for each level"):
        pipeline.complete_codes(codes, [keep[0], wrong])
    with pytest.raises(ValueError, match="^codes: a Tensor; expected one torch tensor for each level, in a list"):
        pipeline.decode(codes[0])


def test_what_cannot_be_completed_can_be_asked_before_there_are_codes(ladders: None) -> None:
    pipeline = tiny.pipeline("gpt")
    keep = [kept_cells(spots(2), level.shape) for level in pipeline.spec.levels]
    with pytest.raises(ValueError, match="^keep: the gpt prior of codes cannot complete it"):
        pipeline.check_completion(keep, label=0)
    keep = [kept_cells(below(2), level.shape) for level in pipeline.spec.levels]
    with pytest.raises(ValueError, match="^steps: no prior of this pipeline has such a sampling option"):
        pipeline.check_completion(keep, label=0, steps=3)
    pipeline.check_completion(keep, label=0)
    assert pipeline.last_seed is None


def test_codes_and_masks_of_other_levels_are_refused(pipelines: dict[str, TwoStagePipeline]) -> None:
    pipeline = pipelines["parallel"]
    codes = pipeline.encode(images(2))
    keep = [torch.ones_like(c, dtype=torch.bool) for c in codes]
    for changed in ((codes[:1], keep), (codes, keep[:1]), ([c[:1] for c in codes], keep), ([c[:0] for c in codes], [k[:0] for k in keep])):
        with pytest.raises(ValueError, match="codes, keep: rows .*; expected equally many, at least 1, for each of 2 levels"):
            pipeline.complete_codes(*changed)
    with pytest.raises(ValueError, match="the maskgit prior of bottom cannot complete it: known: the mask of level .* is torch.int64"):
        pipeline.complete_codes(codes, [keep[0], keep[1].long()])


def test_no_list_of_maps_is_said_of_the_argument() -> None:
    one = tiny.pipeline("gpt")
    codes = [torch.zeros(1, *level.shape, dtype=torch.int64) for level in one.spec.levels]
    with pytest.raises(ValueError, match="^keep: a NoneType; expected one torch tensor for each level, in a list"):
        one.complete_codes(codes, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^codes: a NoneType; expected one torch tensor for each level, in a list"):
        one.complete_codes(None, codes)  # type: ignore[arg-type]
