"""Feature models: small classifiers whose penultimate layer is the space in which samples and real images are compared.

A Frechet distance means something only together with the network that it was measured in, so every figure carries the
model's name: "FD (fashion-cnn-v1)". One model ships with the package: ``fashion-cnn-v1``, trained by
``python -m pipelines.evaluation.train_features`` on the 10,000 bundled training images alone, its weights pinned by sha256;
it calls 92.0 % of the 2,000 bundled validation images right. It has no part in any training. For other data the same script
trains another from labelled images of that data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.config import Config
from intarsia.hub import Pretrained
from intarsia.hub_files import model_card
from intarsia.inference import exact_arithmetic
from intarsia.padded import run_padded
from intarsia.registry import Registry
from intarsia.specs import SignalSpec, to_plain

BUNDLED = "fashion-cnn-v1"
BUNDLED_FOLDER = Path(__file__).parent / "fashion_cnn_v1"
BUNDLED_SHA256 = "45ca45f4d7270464a221e89d06b322d1f52480213b1ecb97a0b612e559437fba"
MICRO_BATCH = 128

CLASSIFIERS: Registry[Classifier] = Registry("classifier")


class ClassifierConfig(Config, registry=CLASSIFIERS):
    """Base of the classifiers' configurations."""

    name: str = "cnn"
    """What the figures measured with it are called after."""


class ConvClassifierConfig(ClassifierConfig):
    """A plain convolutional classifier; the number of stages follows from the image size."""

    widths: tuple[int, int, int, int] = (16, 32, 48, 96)
    """Channels at full size, after the first halving, inside the first stage, and of the others."""
    features: int = 96
    """Width of the penultimate layer: the dimension of the feature space."""


@dataclass(frozen=True)
class ClassifierSpec:
    """What a classifier takes and tells apart: images of one geometry, and the names of the classes."""

    signal: SignalSpec
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.signal.kind != "image" or min(self.signal.shape) < 8:
            raise ValueError(f"signal: {self.signal.kind} of shape {self.signal.shape}; expected images of at least 8 pixels a side")
        if len(self.classes) < 2:
            raise ValueError(f"classes: {len(self.classes)}; a feature model needs labelled images of at least 2 classes")


class Classifier(Pretrained, nn.Module):
    """Base class: ``__init__(config, spec)``. A release of it (``save_pretrained``) is what ``features`` may name."""

    registry: ClassVar[Registry[Any]] = CLASSIFIERS
    kind: ClassVar[str] = "classifier"
    config: ClassifierConfig
    spec: ClassifierSpec

    def _spec_dict(self) -> dict[str, Any]:
        return to_plain(self.spec)

    @classmethod
    def _spec_from_dict(cls, tree: Mapping[str, Any]) -> ClassifierSpec:
        return ClassifierSpec(SignalSpec.from_dict(tree["signal"]), tuple(tree["classes"]))

    def _card(self, metrics: Mapping[str, float] | None, license: str | None) -> str:
        figures = "".join(f"\n- {name}: {value:.4f}" for name, value in (metrics or {}).items())
        body = (
            f"A small classifier whose penultimate layer is a feature space to compare images in.\n{figures}\n\n"
            f"`python -m pipelines.evaluate --features PATH_OR_REPO ...`\n\n```yaml\n{self.config.to_yaml()}```"
        )
        return model_card(f"{self.config.name}: feature model", body, tags=["intarsia", self.kind, self.type_name], license=license)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to (B, F)."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) to (B, classes)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


def _block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


@CLASSIFIERS.register("conv", ConvClassifierConfig)
class ConvClassifier(Classifier):
    """3x3 convolutions down to a grid of about 7x7, the mean over it, a linear layer. The mean is the feature vector."""

    def __init__(self, config: ConvClassifierConfig, spec: ClassifierSpec) -> None:
        super().__init__()
        if min(*config.widths, config.features) < 1:
            raise ValueError(f"classifier: widths {config.widths} and features {config.features} must be positive")
        self.config, self.spec = config, spec
        full, width, first, other = config.widths
        blocks = [_block(spec.signal.channels, full), _block(full, width, 2)]
        halvings = max(1, round(math.log2(min(spec.signal.shape) / 7)))
        for stage in range(halvings - 1):
            inner = first if stage == 0 else other
            blocks += [_block(width, inner), _block(inner, other, 2)]
            width = other
        self.body = nn.Sequential(*blocks, _block(width, config.features))
        self.head = nn.Linear(config.features, len(spec.classes))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)


@dataclass(frozen=True)
class FeatureModel:
    """A classifier in use: images of any size and 1 or 3 channels in, features and predicted classes out.

    Attributes:
        name: what figures are called after; it says so where images are adapted to another geometry.
        sha256: of the model: of the weights file for the bundled one, else of configuration and weights.
        classes: that it tells apart.
    """

    classifier: Classifier
    name: str
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.classifier.spec.classes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) in [0, 1] to features (n, F) float32 and predicted classes (n,) int64.

        In fixed, padded micro-batches on the classifier's device: a row's result does not depend on its batch.
        """
        device = next(self.classifier.parameters()).device
        x = adapt(images.to(device, torch.float32), self.classifier.spec.signal)

        def run(part: Tensor) -> list[Tensor]:
            features = self.classifier.features(part * 2 - 1)
            return [features, self.classifier.logits(features).argmax(1)]

        with exact_arithmetic(device.type):
            features, predicted = run_padded(run, [x], MICRO_BATCH)
        return features, predicted


def adapt(images: Tensor, signal: SignalSpec) -> Tensor:
    """(n, C, H, W) to the geometry of ``signal``: grey repeated, colour weighted to luma (BT.601), resized by antialiased bilinear."""
    channels = images.shape[1]
    if channels != signal.channels:
        if (channels, signal.channels) == (1, 3):
            images = images.expand(-1, 3, -1, -1)
        elif (channels, signal.channels) == (3, 1):
            images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        else:
            raise ValueError(f"features: images of {channels} channels for a model of {signal.channels}; only 1 and 3 are converted")
    if tuple(images.shape[2:]) != signal.shape:
        images = F.interpolate(images, size=signal.shape, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return images


def load_features(name: str, signal: SignalSpec, device: torch.device | str = "cpu") -> FeatureModel:
    """The feature model called ``name`` for images of ``signal``.

    Args:
        name: "fashion-cnn-v1", or a folder or Hub id with a classifier that the training script saved.

    Raises ValueError for signals that are no images or cannot be adapted, and where the bundled weights are not the pinned ones.
    """
    if signal.kind != "image":
        raise ValueError(f"features: {name!r} takes images; the signals are {signal.kind}")
    if name == BUNDLED:
        sha256 = hashlib.sha256((BUNDLED_FOLDER / "model.safetensors").read_bytes()).hexdigest()
        if sha256 != BUNDLED_SHA256:
            raise ValueError(f"{BUNDLED_FOLDER / 'model.safetensors'}: sha256 is {sha256}; {BUNDLED} is {BUNDLED_SHA256}")
        classifier, label = Classifier.from_pretrained(BUNDLED_FOLDER), BUNDLED
    else:
        classifier = Classifier.from_pretrained(name)
        sha256 = classifier.weights_sha256
        label = f"{classifier.config.name} {sha256[:8]}"
    taken = classifier.spec.signal
    adapt(torch.zeros(1, signal.channels, *signal.shape), taken)  # or it says why not
    if (taken.channels, taken.shape) != (signal.channels, signal.shape):
        label += f", images of {_geometry(signal)} adapted to {_geometry(taken)}"
    return FeatureModel(classifier.to(device).eval(), label, sha256)


def _geometry(signal: SignalSpec) -> str:
    return "x".join(map(str, (signal.channels, *signal.shape)))
