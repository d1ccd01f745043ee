"""pipelines.evaluate: the whole of it on a tiny pipeline, against its parts and by its command line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from intarsia.config import ConfigError
from pipelines.evaluate import EvaluateConfig, check_fit, evaluate_pipeline, main
from pipelines.evaluation import train_features
from pipelines.evaluation.baseline import IndependentCodes
from pipelines.evaluation.bits import prior_bits
from pipelines.evaluation.bootstrap import mean_estimate, ratio_of_means
from pipelines.evaluation.distances import fit_gaussian, frechet
from pipelines.evaluation.features import CLASSIFIERS, ClassifierSpec, ConvClassifierConfig, FeatureModel
from pipelines.evaluation.passes import baseline_batches
from pipelines.evaluation.report import sample_figures, table
from pipelines.evaluation.sets import ImageSet, balanced_labels, choose_rows, in_batches, measure, real_batches
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import Source
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.metrics import psnr, unit
from tests import tiny_pipelines as tiny

ladders = tiny.ladders  # a fixture


def blobs(n, seed, classes=4):
    """(n, 1, 8, 8) uint8 images of ``classes`` kinds, and their labels."""
    labels = torch.arange(n) % classes
    u = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    place = (torch.arange(8)[None] // 2 == labels[:, None]).float()
    return ((u * 0.4 + 0.6 * place[:, None, None, :]) * 255).to(torch.uint8), labels


class Blobs(Source):
    type_name = "blobs"

    def __init__(self, train=120, validation=40, labelled=True, classes=tiny.CLASSES, labels=None):
        super().__init__(BundledConfig())
        made = {"train": blobs(train, 0), "validation": blobs(validation, 1)}
        if labels is not None:
            made["train"] = (made["train"][0][: len(labels)], torch.tensor(labels))
        splits = {
            name: ArraySplit(x.numpy(), labels if labelled else None, TransformConfig(), torch.arange(len(x)))
            for name, (x, labels) in made.items()
        }
        self.signal = tiny.tokenizer().signal
        self._finish(splits, classes if labelled else ())


def feature_model(classes=tiny.CLASSES):
    torch.manual_seed(3)
    spec = ClassifierSpec(tiny.tokenizer().signal, classes)
    made = CLASSIFIERS.build(ConvClassifierConfig(name="tiny", widths=(4, 4, 4, 8), features=6), spec).eval()
    return FeatureModel(made, "tiny 0000", "0" * 64)


def config(**changes):
    return EvaluateConfig(n=60, bootstrap=10, k=3, **changes)


@pytest.fixture(scope="module")
def evaluated(ladders):
    pipeline, source = tiny.pipeline("gpt", micro_batch=16), Blobs()
    return pipeline, source, evaluate_pipeline(pipeline, source, feature_model(), config())


def test_the_figures_of_reconstruction_and_usage_are_those_of_the_parts(evaluated):
    pipeline, source, found = evaluated
    x = source.split("validation").batch(torch.arange(40))["x"]
    codes = pipeline.tokenizer.encode(x)
    y = unit(pipeline.tokenizer.decode(codes))
    assert found.tree["reconstruction"]["psnr"] == pytest.approx(psnr(unit(x), y).mean().item(), abs=1e-9)
    assert found.tree["codes"]["validation"][0]["used"] == codes[0].unique().numel()
    assert found.tree["codes"]["train"][0]["codes"] == 120 * 16


def test_the_bits_are_the_pipelines_likelihood_and_the_baselines(evaluated):
    pipeline, source, found = evaluated
    batch = source.split("validation").batch(torch.arange(40))
    codes = pipeline.tokenizer.encode(batch["x"])
    total = found.tree["bits"]["total"]
    assert total["bits_per_image"] == pytest.approx(pipeline.bits_per_image(codes, batch["label"]).mean().item(), rel=1e-6)
    assert total["bits_per_code"]["value"] == pytest.approx(total["bits_per_image"] / 16)
    assert total["bits_per_dimension"] == pytest.approx(total["bits_per_image"] / 64)
    train = source.split("train").batch(torch.arange(120))
    baseline = IndependentCodes(pipeline.spec.levels, pipeline.tokenizer.encode(train["x"]), train["label"], 4)
    expected = baseline.bits(codes, batch["label"])[0].mean().item()
    assert total["baseline_bits_per_code"]["value"] == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distances_are_those_of_the_very_samples(evaluated):
    pipeline, source, found = evaluated
    model, asked = feature_model(), balanced_labels(60, 4)
    drawn = pipeline.sample(60, label=asked, seed=0)
    rows = choose_rows(source.split("train"), 60, 0, 4)
    real = fit_gaussian(model(unit(source.split("train").batch(rows)["x"]))[0])
    figures = found.tree["samples"]
    assert figures["frechet"]["samples"]["value"] == pytest.approx(frechet(real, fit_gaussian(model(drawn)[0])), rel=1e-5)
    assert figures["frechet_ratio_to_baseline"]["value"] == pytest.approx(
        figures["frechet"]["samples"]["value"] / figures["frechet"]["baseline"]["value"]
    )
    right = (model(drawn)[1] == asked).double().mean().item()
    assert figures["agreement"]["samples"]["value"] == pytest.approx(right)
    assert set(figures["agreement"]) == {"samples", "baseline", "reconstructions", "real"}


def plain_precision_recall(real: torch.Tensor, drawn: torch.Tensor, k: int) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019: the share of each set within the k-NN balls of the other."""
    real, drawn = real.double(), drawn.double()
    radius = {name: torch.cdist(x, x).sort(1).values[:, k] for name, x in (("real", real), ("drawn", drawn))}
    apart = torch.cdist(drawn, real)
    return (apart <= radius["real"]).any(1).double().mean().item(), (radius["drawn"] >= apart.T).any(1).double().mean().item()


def test_precision_agreement_and_nearest_images_are_those_of_plain_code(evaluated):
    pipeline, source, found = evaluated
    model, asked = feature_model(), balanced_labels(60, 4)
    train, held = (unit(source.split(name).batch(torch.arange(n))["x"]) for name, n in (("train", 120), ("validation", 40)))
    drawn = pipeline.sample(60, label=asked, seed=0)
    back = pipeline.decode(pipeline.encode(held))
    real = train[choose_rows(source.split("train"), 60, 0, 4)]
    precision, recall = plain_precision_recall(model(real)[0], model(drawn)[0], 3)
    figures = found.tree["samples"]["precision_recall"]["samples"]
    assert precision != recall and (figures["precision"]["value"], figures["recall"]["value"]) == pytest.approx((precision, recall))
    for space, vectors in (("features", lambda x: model(x)[0]), ("pixels", lambda x: x.flatten(1))):
        near = {
            name: torch.cdist(vectors(x).double(), vectors(train).double()).min(1).values.quantile(0.5).item()
            for name, x in (("samples", drawn), ("reconstructions", back))
        }
        middle = found.tree["memorisation"][space]["quantiles"]["0.5"]
        assert {name: middle[name] for name in near} == pytest.approx(near, rel=1e-4)
        assert middle["ratio"]["value"] == pytest.approx(middle["samples"] / middle["reconstructions"])


def test_the_nearest_train_images_are_those_of_plain_code_and_the_closest_samples_come_first(evaluated):
    pipeline, source, found = evaluated
    drawn = pipeline.sample(60, label=balanced_labels(60, 4), seed=0).flatten(1)
    distance = torch.cdist(drawn.double(), unit(source.split("train").batch(torch.arange(120))["x"]).flatten(1).double())
    assert torch.equal(found.nearest["pixels"], distance.argmin(1))
    assert torch.equal(distance.amin(1)[found.order], distance.amin(1).sort().values)


def test_the_baseline_has_the_labels_that_its_samples_are_asked_for():
    pipeline, source = tiny.pipeline("gpt", micro_batch=16), Blobs()
    train = source.split("train").batch(torch.arange(120))
    baseline = IndependentCodes(pipeline.spec.levels, pipeline.tokenizer.encode(train["x"]), train["label"], 4)
    asked = torch.arange(300) // 75  # more than one batch
    batches = list(baseline_batches(pipeline, baseline, 300, asked, 3))
    assert len(batches) > 1 and torch.equal(torch.cat([label for _, label in batches]), asked)
    expected = pipeline.decode(baseline.sample(torch.arange(300), asked, 3))
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)


def test_agreement_is_a_share_of_that_of_the_reconstructions():
    draw = torch.Generator().manual_seed(0)

    def made(name: str, right: int) -> ImageSet:
        labels = torch.arange(20) % 4
        predicted = torch.where(torch.arange(20) < right, labels, (labels + 1) % 4)
        return ImageSet(name, torch.randn(20, 6, generator=draw), predicted, labels, balanced=name == "samples")

    sets = {name: made(name, right) for name, right in (("samples", 9), ("baseline", 5), ("reconstructions", 15), ("real", 18))}
    figures = sample_figures(feature_model(), made("reference", 20), sets, classes=tiny.CLASSES, k=3, replicates=5, seed=0)
    assert {name: found["value"] for name, found in figures["agreement"].items()} == pytest.approx(
        {"samples": 0.45, "baseline": 0.25, "reconstructions": 0.75, "real": 0.9}
    )
    assert figures["agreement_ratio_to_reconstructions"]["value"] == pytest.approx(0.6)
    labels, right = torch.arange(20) % 4, torch.arange(20)
    for name, count, kept in (("samples", 9, labels), ("real", 18, None)):  # resampled as the set was made
        assert figures["agreement"][name] == mean_estimate(right < count, 5, 0, name, kept).to_dict()
    share = ratio_of_means(right < 9, right < 15, 5, 0, ("samples", "reconstructions"), (labels, None))
    assert figures["agreement_ratio_to_reconstructions"] == share.to_dict()


def test_every_figure_says_which_features_how_many_images_and_which_seed(evaluated):
    _, _, found = evaluated
    tree = found.tree
    assert tree["samples"]["features"] == {"name": "tiny 0000", "sha256": "0" * 64}
    assert tree["samples"]["counts"] == {"reference": 60, "samples": 60, "baseline": 60, "reconstructions": 40, "real": 40}
    assert tree["samples"]["precision_recall"]["count"] == 60 and tree["samples"]["precision_recall"]["k"] == 3
    assert (tree["seed"], tree["split"], tree["reference"], tree["balanced"]) == (0, "validation", "train", True)
    assert tree["memorisation"]["train_images"] == 120 and tree["memorisation"]["reconstructions"] == 40
    json.dumps(tree, allow_nan=False)
    text = table(tree)
    manifolds = "precision, recall (tiny 0000, k = 3, 60 against 60), baseline"
    for words in ("FD (tiny 0000)", manifolds, "label agreement (tiny 0000)", "60 train images"):
        assert words in text


def test_the_same_seed_gives_the_same_figures_and_another_does_not(evaluated):
    pipeline, source, found = evaluated
    again = evaluate_pipeline(pipeline, source, feature_model(), config())
    assert again.tree == found.tree
    other = evaluate_pipeline(pipeline, source, feature_model(), config(seed=1))
    assert other.tree["samples"]["frechet"] != found.tree["samples"]["frechet"]
    assert other.tree["reconstruction"] == found.tree["reconstruction"]


def test_two_levels_and_two_priors_add_up(evaluated):
    pipeline = tiny.pipeline("ladder", micro_batch=16)
    source = Blobs()
    found = evaluate_pipeline(pipeline, source, feature_model(), config(split="validation", reference="validation", balanced=False))
    parts = found.tree["bits"]["priors"]
    assert [part["levels"] for part in parts] == ["top", "bottom"] and [part["codes"] for part in parts] == [4, 16]
    train = source.split("train").batch(torch.arange(120))
    baseline = IndependentCodes(pipeline.spec.levels, pipeline.tokenizer.encode(train["x"]), train["label"], 4)
    held = source.split("validation").batch(torch.arange(40))
    independent = [level.sum(1).mean().item() for level in baseline.bits(pipeline.tokenizer.encode(held["x"]), held["label"])]
    assert [part["baseline_bits_per_code"]["value"] * part["codes"] for part in parts] == pytest.approx(independent)
    assert sum(part["bits_per_image"] for part in parts) == pytest.approx(found.tree["bits"]["total"]["bits_per_image"])
    batch = source.split("validation").batch(torch.arange(40))
    codes = pipeline.tokenizer.encode(batch["x"])
    bits = torch.stack(prior_bits(pipeline, codes, batch["label"])).sum(0)
    assert torch.allclose(bits, pipeline.nll(codes, batch["label"]) / math.log(2), rtol=1e-6)
    assert "real" not in found.tree["samples"]["frechet"]  # the same images as the reference
    assert found.tree["samples"]["counts"]["reference"] == 40


def test_of_leading_levels_reconstructions_are_of_those_as_samples_are():
    both = tiny.pipeline("ladder", micro_batch=16)
    top, source = tiny.TwoStagePipeline(both.tokenizer, both.priors[:1], micro_batch=16), Blobs()
    found = evaluate_pipeline(top, source, feature_model(), config())
    x = source.split("validation").batch(torch.arange(40))["x"]
    y = unit(top.tokenizer.decode(top.tokenizer.encode(x)[:1]))
    assert found.tree["reconstruction"]["psnr"] == pytest.approx(psnr(unit(x), y).mean().item(), abs=1e-9)
    assert found.tree["reconstruction"]["levels"] == ["top"] and "images from top alone: PSNR" in table(found.tree)
    near = torch.cdist(y.flatten(1).double(), unit(source.split("train").batch(torch.arange(120))["x"]).flatten(1).double()).min(1).values
    assert found.tree["memorisation"]["pixels"]["quantiles"]["0.5"]["reconstructions"] == pytest.approx(near.quantile(0.5).item(), rel=1e-4)


def test_balance_without_labels_is_refused():
    with pytest.raises(ConfigError, match="^balanced: True, but no prior of the pipeline takes labels"):
        evaluate_pipeline(tiny.pipeline("gpt", labelled=False), Blobs(), feature_model(), config(balanced=True))


def test_unlabelled_data_and_a_prior_without_labels_leave_out_agreement():
    pipeline = tiny.pipeline("gpt", labelled=False, micro_batch=16)
    found = evaluate_pipeline(pipeline, Blobs(labelled=False), feature_model(), config())
    assert "agreement" not in found.tree["samples"] and found.tree["balanced"] is False
    labelled = evaluate_pipeline(pipeline, Blobs(), feature_model(), config())
    assert "agreement" not in labelled.tree["samples"]
    assert "frechet" in found.tree["samples"] and math.isfinite(found.tree["bits"]["total"]["bits_per_image"])


def test_a_feature_model_of_other_classes_leaves_out_agreement(evaluated):
    pipeline, source, _ = evaluated
    found = evaluate_pipeline(pipeline, source, feature_model(("x", "y")), config())
    assert "agreement" not in found.tree["samples"] and "recall" in found.tree["samples"]["precision_recall"]["samples"]


def test_data_of_another_pipeline_are_refused():
    pipeline = tiny.pipeline("gpt")
    with pytest.raises(ValueError, match="data: the classes are a, b, c, d; the pipeline knows shoe, bag, Shirt, dress"):
        check_fit(pipeline, Blobs(classes=("a", "b", "c", "d")))
    source = Blobs()
    source.signal = source.signal.__class__("image", 1, (12, 8))
    with pytest.raises(ValueError, match="data: the signals are"):
        check_fit(pipeline, source)


def test_more_neighbours_than_images_are_refused_before_the_work(capsys):
    with pytest.raises(ConfigError, match="k: 40; expected fewer than the 60 samples and the 40 validation images"):
        evaluate_pipeline(tiny.pipeline("gpt"), Blobs(), feature_model(), EvaluateConfig(n=60, k=40, reference="validation", bootstrap=2))
    assert "drawing" not in capsys.readouterr().out


def test_one_held_out_image_is_refused_before_the_work(capsys):
    with pytest.raises(ConfigError, match=r"split: validation has 1 image\(s\); figures need at least 2"):
        evaluate_pipeline(tiny.pipeline("gpt"), Blobs(validation=1), feature_model(), EvaluateConfig(n=60, bootstrap=2))
    assert "drawing" not in capsys.readouterr().out


def test_reference_rows_hold_the_classes_in_turn_and_too_few_are_named():
    split = Blobs().split("train")
    rows = choose_rows(split, 30, 0, 4)
    assert split.labels[rows].tolist() == balanced_labels(30, 4).tolist() and rows.unique().numel() == 30
    assert not torch.equal(rows, choose_rows(split, 30, 1, 4))
    assert choose_rows(split, 500, 0, 4).sort().values.tolist() == list(range(120))
    with pytest.raises(ValueError, match="reference: 100 balanced images need 20 of class 4, there are 0"):
        choose_rows(split, 100, 0, 5)


def test_sets_are_measured_in_batches_and_keep_only_what_they_are_asked_for(monkeypatch):
    model, split = feature_model(), Blobs(train=300).split("train")
    x = unit(split.batch(torch.arange(300))["x"])
    found = measure("real", real_batches(split), model, pixels=True, images=7)
    assert isinstance(found, ImageSet) and len(found) == 300 and torch.equal(found.features, model(x)[0])
    assert found.images.dtype == torch.uint8 and torch.equal(found.images, (x[:7] * 255).round().to(torch.uint8))
    kept = measure("real", real_batches(split), model, images=290).images
    assert torch.equal(kept, (x[:290] * 255).round().to(torch.uint8)), "several batches"
    streamed = measure("samples", in_batches(enumerate(x), split.labels, split.signal), model)
    assert torch.equal(streamed.features, found.features) and torch.equal(streamed.labels, split.labels)
    assert streamed.pixels is None and streamed.images is None
    monkeypatch.setattr("stage1_tokenizer.sizes.NUMBERS_AT_ONCE", 100 * x[0].numel())
    for batches in (real_batches(split), in_batches(enumerate(x), split.labels, split.signal)):
        images, labels = zip(*batches, strict=True)
        assert [len(part) for part in images] == [100, 100, 100], "large images come a few at a time"
        assert torch.equal(torch.cat(images), x) and torch.equal(torch.cat(labels), split.labels)
    with pytest.raises(ValueError, match="the set holds no images"):
        measure("none", [], model)


def write_idx(path, array):
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.tobytes())


def test_the_commands_work_end_to_end_on_other_data(tmp_path, capsys, monkeypatch):
    for name, n in (("train", 120), ("t10k", 40)):
        x, labels = blobs(n, n)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", x[:, 0].numpy())
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels.numpy().astype(np.uint8))
    data = ["--data.type", "idx", "--data.root", str(tmp_path), "--data.classes", "[shoe, bag, Shirt, dress]"]
    small = ["--classifier.widths", "[4, 4, 4, 8]", "--classifier.features", "6", "--steps", "20", "--batch_size", "16"]
    monkeypatch.setattr("sys.argv", ["train_features", *data, *small, "--name", "blobs", "--out", str(tmp_path / "features")])
    train_features.main()
    tiny.pipeline("pixelcnn", micro_batch=16).save_pretrained(tmp_path / "pipeline")
    few = ["--n", "40", "--bootstrap", "5", "--split", "test", "--temperature", "0.9", "--device", "cpu"]
    place = ["--pipeline", str(tmp_path / "pipeline"), "--features", str(tmp_path / "features"), "--out", str(tmp_path / "out")]
    main([*place, *data, *few])
    shown = capsys.readouterr().out
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert tree["sampling"] == {"temperature": 0.9} and tree["samples"]["features"]["name"].startswith("blobs ")
    assert f"FD ({tree['samples']['features']['name']})" in shown and tree["reconstruction"]["samples"] == 40
    for name in ("samples.png", "baseline.png", "nearest.png"):
        assert Image.open(tmp_path / "out" / name).width > 100
    with pytest.raises(ConfigError, match="an evaluation has no steps"):
        main([*place, *data, "--max_steps", "2"])
