"""Trains a feature model on labelled images.

The one that ships with the package was made by

    OMP_NUM_THREADS=1 python -m pipelines.evaluation.train_features --name fashion-cnn-v1 --out pipelines/evaluation/fashion_cnn_v1

on the bundled train images alone. Any labelled source will do, grey or colour, from 8 pixels a side: ``--data.name emoji --name
emoji-cnn --data.transform.shift 3 --out features/emoji``, or ``--data.type folder --data.root PHOTOS --name photos --out
features/photos``; then ``python -m pipelines.evaluate --features features/photos ...``. Every figure is called after the name and
the first digits of the weights' sha256. The same command gives the same weights on the same machine with the same number of threads.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from intarsia.cli import UserError, parse, run_main
from intarsia.config import Budget, Config, ConfigError, Place, Seed
from intarsia.files import writable_folder
from intarsia.hub_files import CONFIG, WEIGHTS
from intarsia.order import Order
from pipelines.evaluation.features import CLASSIFIERS, Classifier, ClassifierConfig, ClassifierSpec, ConvClassifierConfig
from pipelines.evaluation.settings import check_alone
from pipelines.sample import device_of
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig, Split
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.transform import TransformConfig


class TrainFeaturesConfig(Config):
    """What a feature model is trained on and how long."""

    out: Place[Annotated[str, Field(min_length=1)]]
    """The folder to write: the classifier's release."""
    data: SourceConfig = BundledConfig(transform=TransformConfig(shift=1))
    """Labelled images; the train split trains, the validation split is only measured on."""
    classifier: ClassifierConfig = ConvClassifierConfig()
    """The network, and the name that figures are called after."""
    steps: Budget[Annotated[int, Field(ge=2)]] = 4400
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step."""
    lr: Annotated[float, Field(gt=0)] = 4e-3
    """Peak learning rate: AdamW, one cycle."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of AdamW."""
    seed: Seed = 0
    """Of the first weights, the order and the augmentation."""
    device: Place[str] = "cpu"
    """auto, cpu, cuda, cuda:1, ..."""


def train(config: TrainFeaturesConfig, source: Source) -> Classifier:
    """A classifier in eval mode, on the CPU, trained on the train split with the augmentation of the source's transform."""
    split, device = source.split("train"), device_of(config.device)
    if split.labels is None or len(source.classes) < 2:
        raise UserError("data: a feature model is trained on labels of at least 2 classes; give a labelled set, or use a trained model")
    spec = ClassifierSpec(source.signal, source.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = CLASSIFIERS.build(config.classifier, spec).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.15)
    order = Order(len(split), config.batch_size, config.seed)
    for step in range(config.steps):
        batch = split.batch(order.indices(step), order.epochs(step), config.seed)
        loss = F.cross_entropy(model(batch["x"].to(device)), batch["label"].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, config.steps // 10) == 0:
            print(f"step {step + 1} of {config.steps}: loss {loss.item():.3f}", flush=True)
    return model.eval().cpu()


@torch.no_grad()
def accuracy(model: Classifier, split: Split, batch_size: int = 500) -> float:
    """The share of a labelled split that is called right."""
    assert split.labels is not None
    right = 0
    for rows in torch.arange(len(split)).split(batch_size):
        batch: dict[str, Tensor] = split.batch(rows)
        right += int((model(batch["x"]).argmax(1) == batch["label"]).sum())
    return right / len(split)


def main() -> None:
    config, flags = parse(TrainFeaturesConfig, aliases={"name": "classifier.name"}, program="python -m pipelines.evaluation.train_features")
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: the training of a feature model has neither; see steps"])
    check_alone("a feature model is trained by one")
    source = SOURCES.build(config.data)
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=(CONFIG, WEIGHTS))
    if checked:
        print(f"data: {source.signal}, {len(source.classes)} classes, splits {', '.join(source.splits)}")
        return
    model = train(config, source)
    figures = {f"accuracy on {name}": accuracy(model, source.split(name)) for name in ("train", "validation") if name in source.splits}
    model.save_pretrained(out, metrics=figures)
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")
    print(f"{config.out}: {config.classifier.name}, {sum(p.numel() for p in model.parameters())} parameters, sha256 {model.weights_sha256}")


if __name__ == "__main__":
    run_main(main)
