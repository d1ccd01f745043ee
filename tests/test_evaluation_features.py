"""Feature models: the bundled one is the pinned one and good, others are named apart, images are adapted in the open."""

import shutil

import pytest
import torch

from intarsia.cli import UserError
from intarsia.specs import SignalSpec
from pipelines.evaluation import features, train_features
from pipelines.evaluation.features import BUNDLED, CLASSIFIERS, Classifier, ClassifierSpec, ConvClassifierConfig, adapt, load_features
from pipelines.evaluation.train_features import TrainFeaturesConfig, accuracy, train
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, Source
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.metrics import unit

FASHION = SignalSpec("image", 1, (28, 28))


@pytest.fixture(scope="module")
def fashion():
    return SOURCES.build(BundledConfig())


def test_the_bundled_model_is_small_pinned_and_right_about_held_out_images(fashion):
    model = load_features(BUNDLED, fashion.signal)
    folder = features.BUNDLED_FOLDER
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    assert model.name == BUNDLED and model.sha256 == features.BUNDLED_SHA256 and model.classes == fashion.classes
    held = fashion.split("validation")
    found, predicted = model(unit(held.batch(torch.arange(len(held)))["x"]))
    assert found.shape == (2000, 96) and found.dtype == torch.float32
    assert (predicted == held.labels).float().mean() >= 0.9
    assert predicted[:300].tolist() == model(unit(held.batch(torch.arange(300))["x"]))[1].tolist()


def test_features_of_an_image_do_not_depend_on_its_batch(fashion):
    model = load_features(BUNDLED, fashion.signal)
    x = unit(fashion.split("validation").batch(torch.arange(200))["x"])
    whole = model(x)[0]
    assert torch.equal(whole[150:157], model(x[150:157])[0]) and torch.equal(whole.flip(0), model(x.flip(0))[0])


def test_other_weights_under_the_bundled_name_are_refused(tmp_path, monkeypatch):
    shutil.copytree(features.BUNDLED_FOLDER, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(features, "BUNDLED_FOLDER", tmp_path / "model")
    with pytest.raises(ValueError, match=r"sha256 is [0-9a-f]{64}; fashion-cnn-v1 is [0-9a-f]{64}"):
        load_features(BUNDLED, FASHION)
    with pytest.raises(ValueError, match="the fingerprint is"):  # the release says so, too
        load_features(str(tmp_path / "model"), FASHION)


def test_a_saved_classifier_is_named_by_its_hash_and_says_what_it_adapts(tmp_path):
    spec = ClassifierSpec(SignalSpec("image", 3, (16, 20)), ("a", "b"))
    torch.manual_seed(0)
    made = CLASSIFIERS.build(ConvClassifierConfig(name="photos", widths=(4, 4, 4, 8), features=5), spec).eval()
    made.save_pretrained(tmp_path)
    same = load_features(str(tmp_path), spec.signal)
    assert same.name == f"photos {made.weights_sha256[:8]}" and same.sha256 == made.weights_sha256 and same.classes == ("a", "b")
    x = torch.rand(3, 3, 16, 20)
    assert torch.equal(same(x)[0], made.features(torch.cat([x, torch.zeros(125, 3, 16, 20)]) * 2 - 1)[:3])
    other = load_features(str(tmp_path), SignalSpec("image", 1, (28, 28)))
    assert other.name == f"{same.name}, images of 1x28x28 adapted to 3x16x20"
    assert other(torch.rand(2, 1, 28, 28))[0].shape == (2, 5)
    with pytest.raises(ValueError, match="takes images; the signals are audio"):
        load_features(str(tmp_path), SignalSpec("audio", 1, (100,)))


@pytest.mark.parametrize("size", [8, 12, 20, 28, 32, 64, 96, 256])
def test_the_network_fits_any_image_size_and_ends_at_about_seven_cells(size):
    spec = ClassifierSpec(SignalSpec("image", 3, (size, size)), ("a", "b", "c"))
    with torch.device("meta"):
        model = CLASSIFIERS.build(ConvClassifierConfig(), spec)
        grid = model.body(torch.empty(1, 3, size, size)).shape[2]
        assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert 4 <= grid <= 10


def test_adapting_converts_channels_and_size_and_refuses_others():
    x = torch.rand(2, 3, 10, 10)
    grey = adapt(x, SignalSpec("image", 1, (10, 10)))
    assert torch.allclose(grey[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    assert torch.equal(adapt(x[:, :1], SignalSpec("image", 3, (10, 10))), x[:, :1].expand(-1, 3, -1, -1))
    flat = adapt(torch.full((1, 1, 40, 30), 0.3), SignalSpec("image", 1, (12, 9)))
    assert flat.shape == (1, 1, 12, 9) and torch.allclose(flat, torch.tensor(0.3))
    with pytest.raises(ValueError, match="images of 4 channels for a model of 3"):
        adapt(torch.rand(1, 4, 8, 8), SignalSpec("image", 3, (8, 8)))


def test_images_that_cannot_be_adapted_are_refused_as_the_model_is_loaded():
    with pytest.raises(ValueError, match="features: images of 4 channels for a model of 1; only 1 and 3 are converted"):
        load_features(BUNDLED, SignalSpec("image", 4, (16, 16)))


class Stripes(Source):
    """Images with horizontal or vertical stripes."""

    def __init__(self, n=200, labelled=True, **transform):
        super().__init__(BundledConfig())
        labels = torch.arange(n) % 2
        line = torch.arange(12) % 4 // 2 * 200
        x = torch.stack([line.view(1, 1, 12).expand(1, 12, 12) if c else line.view(1, 12, 1).expand(1, 12, 12) for c in labels])
        x = (x + torch.randint(0, 50, x.shape, generator=torch.Generator().manual_seed(0))).to(torch.uint8).numpy()
        split = ArraySplit(x, labels if labelled else None, TransformConfig(**transform), torch.arange(n))
        self.signal = SignalSpec("image", 1, (12, 12))
        self._finish({"train": split, "validation": split}, ("across", "down") if labelled else ())


def test_training_learns_and_the_same_command_gives_the_same_weights():
    config = TrainFeaturesConfig(out="x", classifier=ConvClassifierConfig(widths=(4, 4, 4, 8), features=6), steps=40, batch_size=16)
    source = Stripes()
    first, second = train(config, source), train(config, source)
    assert accuracy(first, source.split("validation")) > 0.95
    assert first.weights_sha256 == second.weights_sha256 != train(config.replace(seed=1), source).weights_sha256
    assert isinstance(first, Classifier) and not first.training and first.spec.classes == ("across", "down")


def test_the_augmentation_of_the_data_is_trained_on():
    config = TrainFeaturesConfig(out="x", classifier=ConvClassifierConfig(widths=(4, 4, 4, 8), features=6), steps=3, batch_size=16)
    plain, shifted = Stripes(), Stripes(shift=2)
    assert train(config, plain).weights_sha256 != train(config, shifted).weights_sha256


def test_unlabelled_data_train_no_feature_model():
    with pytest.raises(UserError, match="labels of at least 2 classes"):
        train(TrainFeaturesConfig(out="x", steps=2), Stripes(labelled=False))


def test_any_labelled_source_trains_one_and_figures_are_called_after_it(tmp_path, monkeypatch):
    """64 px in colour, with a class that has five images, by the ordinary flags."""
    words = ["--data.name", "emoji", "--data.transform.shift", "3", "--name", "emoji-cnn", "--out", str(tmp_path / "emoji")]
    words += ["--classifier.widths", "[2, 2, 2, 4]", "--classifier.features", "5", "--steps", "3", "--batch_size", "8"]
    monkeypatch.setattr("sys.argv", ["train_features", *words])
    train_features.main()
    source = SOURCES.build(BundledConfig(name="emoji"))
    model = load_features(str(tmp_path / "emoji"), source.signal)
    assert model.name == f"emoji-cnn {model.sha256[:8]}" and model.classes == source.classes
    x = unit(source.split("validation").batch(torch.arange(3))["x"])
    assert x.shape == (3, 3, 64, 64) and model(x)[0].shape == (3, 5)
    assert load_features(str(tmp_path / "emoji"), FASHION).name.endswith(", images of 1x28x28 adapted to 3x64x64")


@pytest.mark.parametrize("flag", ["--check", "--dry_run"])
def test_check_and_dry_run_train_nothing(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr(train_features, "train", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr("sys.argv", ["train_features", "--name", "new", "--out", str(tmp_path / "out"), flag])
    train_features.main()
    assert "10 classes" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_where_it_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_features, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    for out, what in (("file", "is"), ("file/below", "lies below")):
        monkeypatch.setattr("sys.argv", ["train_features", "--name", "new", "--out", str(tmp_path / out)])
        with pytest.raises(UserError, match=f"^out: {tmp_path / out} {what} a file; expected a folder"):
            train_features.main()
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["train_features", "--name", "new", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="^WORLD_SIZE: 2 processes; a feature model is trained by one"):
        train_features.main()
    assert not (tmp_path / "out").exists()
