"""Training and evaluating priors: the scripts, end to end, on small codes with a structure that can be learnt."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.checkpoint import load_checkpoint, newest_valid
from intarsia.cli import Flags, UserError
from intarsia.codes import CodesDataset, CodesError, write_codes
from intarsia.config import ConfigError
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec
from stage2_prior import evaluate, train
from stage2_prior.priors.base import Prior
from stage2_prior.priors.gpt import GPTPrior
from tests.tiny_priors import TINY

LEVELS = (LevelSpec("top", 4, (2, 2)), LevelSpec("bottom", 6, (4, 4)))


def structured(n: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Codes that follow their label, and bottom codes that follow the top one above them, both with some noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=generator)
    top = (label[:, None, None] * 2 + torch.randint(2, (n, 2, 2), generator=generator)) % 4
    bottom = (top.repeat_interleave(2, 1).repeat_interleave(2, 2) + torch.randint(2, (n, 4, 4), generator=generator)) % 6
    return [top, bottom], label


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("codes") / "codes")


def write(
    folder: Path, fingerprint: str = "a" * 64, labelled: bool = True, rows: int = 96, classes: tuple[str, ...] = ("even", "odd")
) -> Path:
    splits: dict[str, Any] = {"train": structured(rows, 0), "validation": structured(37, 1)}
    if not labelled:
        splits = {name: (c, None) for name, (c, _) in splits.items()}
    write_codes(
        folder,
        splits,
        LEVELS,
        signal=SignalSpec("image", 1, (8, 8)),
        tokenizer={"type": "vqvae", "fingerprint": fingerprint},
        classes=classes if labelled else (),
    )
    return folder


def config(folder: Path, codes: Path, prior: dict[str, Any] | None = None, **changes: Any) -> train.PriorTrainConfig:
    tree = {
        "run": str(folder),
        "codes": str(codes),
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "batch_size": 16,
        "steps": 60,
        "prior": {"type": "gpt", "levels": "0:1", **TINY["gpt"]} | (prior or {}),
        "optim": {"lr": 1e-2, "average": 0.9},
        "log": {"every": 20, "validate_every": 30, "checkpoint_every": 20},
    }
    return train.PriorTrainConfig.from_dict(tree | changes)


def state_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    path = newest_valid(folder / "checkpoints")
    assert path is not None
    _, state, _ = load_checkpoint(path)
    return {f"{stem}/{name}": tensor for stem, tensors in state.items() for name, tensor in tensors.items()}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validation_bits(folder: Path) -> list[float]:
    """Of each validation; of a bound it is marked as one."""
    return [value for line in lines_of(folder) for name, value in line.items() if name in ("validation/bits", "validation/bits_bound")]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a.values(), b.values(), strict=True) if x.numel())


@pytest.mark.parametrize(
    "prior",
    [
        {"type": "gpt", "levels": "0:1"} | TINY["gpt"],
        {"type": "pixelcnn", "levels": "1:2"} | TINY["pixelcnn"],
        {"type": "gpt", "levels": "", "positions": "rotary"} | TINY["gpt"],
        {"type": "maskgit", "levels": "0:1"} | TINY["maskgit"],
        {"type": "maskgit", "levels": "", "positions": "rotary"} | TINY["maskgit"],
    ],
    ids=["gpt", "pixelcnn-below", "gpt-joint", "maskgit", "maskgit-joint"],
)
def test_a_prior_learns_the_structure_of_its_codes_and_is_released(codes: Path, tmp_path: Path, prior: dict[str, Any]) -> None:
    given = config(tmp_path, codes, steps=150).to_dict() | {"prior": prior}
    train.train(train.PriorTrainConfig.from_dict(given), Flags())
    found = validation_bits(tmp_path)
    assert found[-1] < 1.3  # one bit of noise per code is all that cannot be known; without the label it would be two
    released = Prior.from_pretrained(tmp_path / "model")
    held = CodesDataset(codes, "validation", released.spec)
    batch = held.batch(torch.arange(len(held)))
    nll = released.nll(batch["codes"][: released.levels.stop], Cond(label=batch["label"]), StepRng(0, 0, batch["index"]))
    # The release is the last averaged weights, and validation counted each sample once.
    assert nll.mean().item() / math.log(2) == pytest.approx(found[-1], abs=1e-5)
    labels = torch.arange(64) % 2
    drawn = released.sample(
        torch.arange(64), upper=[batch["codes"][0].repeat(2, 1, 1)[:64]] if released.levels.start else (), cond=Cond(label=labels)
    )
    if prior["levels"] == "0:1":
        assert ((drawn[0] // 2) == labels[:, None, None]).float().mean() > 0.9


def test_validation_is_of_the_first_samples_where_they_are_limited(codes: Path, tmp_path: Path) -> None:
    train.train(config(tmp_path, codes, steps=2, validation_samples=5, log={"validate_every": 2}), Flags())
    prior = GPTPrior.from_pretrained(tmp_path / "model").eval()
    (top, _), label = structured(37, 1)
    bits = prior.nll([top[:5]], Cond(label=label[:5])).mean().item() / math.log(2)
    assert validation_bits(tmp_path) == pytest.approx([bits], rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt", "pixelcnn", "maskgit"])
def test_an_interrupted_run_goes_on_to_the_same_bits(codes: Path, tmp_path: Path, kind: str) -> None:
    noise = {"type": kind, "levels": "0:1", **TINY[kind], "corruption": 0.1, "dropout": 0.1}
    whole, parts = (config(tmp_path / name, codes, steps=60).to_dict() | {"prior": noise} for name in ("whole", "parts"))
    train.train(train.PriorTrainConfig.from_dict(whole), Flags())
    for stop in (25, 40, None):
        train.train(train.PriorTrainConfig.from_dict(parts), Flags(max_steps=stop))
    assert distance(state_of(tmp_path / "whole"), state_of(tmp_path / "parts")) == 0
    assert Prior.from_pretrained(tmp_path / "whole/model").weights_sha256 == Prior.from_pretrained(tmp_path / "parts/model").weights_sha256


def test_init_starts_from_a_release_and_refuses_one_that_does_not_fit(codes: Path, tmp_path: Path) -> None:
    train.train(config(tmp_path / "first", codes, steps=20), Flags())
    still = {"optim": {"lr": 1e-12, "average": 0.9}, "steps": 1}
    train.train(config(tmp_path / "second", codes, prior={"corruption": 0.1}, init=str(tmp_path / "first"), **still), Flags())
    first, second = (Prior.from_pretrained(tmp_path / name / "model") for name in ("first", "second"))
    assert distance(first.state_dict(), second.state_dict()) < 1e-9
    with pytest.raises(ConfigError, match=r"prior.width: 32, but init \(.*first\) was made with 16"):
        train.train(config(tmp_path / "third", codes, prior={"width": 32}, init=str(tmp_path / "first")), Flags())
    renamed = write(tmp_path / "renamed", classes=("odd", "even"))
    with pytest.raises(ConfigError, match=r"codes: the classes are odd, even, but init \(.*first\) was trained with even, odd"):
        train.train(config(tmp_path / "renamed-run", renamed, init=str(tmp_path / "first")), Flags())
    other = write(tmp_path / "other", "b" * 64)
    with pytest.raises(CodesError, match=f"init .*made by the tokenizer {'a' * 64}; expected {'b' * 64}"):
        train.train(config(tmp_path / "fourth", other, init=str(tmp_path / "first")), Flags())


def test_codes_whose_labels_number_other_classes_are_not_predicted(codes: Path, tmp_path: Path) -> None:
    train.train(config(tmp_path / "run", codes, steps=2), Flags())
    renamed = write(tmp_path / "renamed", classes=("odd", "even"))
    with pytest.raises(CodesError, match=r"codes: the classes are odd, even; the prior was trained with even, odd"):
        evaluate.main(["--prior", str(tmp_path / "run"), "--codes", str(renamed), "--device", "cpu"])


def test_a_run_goes_on_with_its_own_codes_alone(codes: Path, tmp_path: Path) -> None:
    train.train(config(tmp_path / "run", codes), Flags(max_steps=2))
    moved = shutil.copytree(codes, tmp_path / "moved")
    train.train(config(tmp_path / "run", moved), Flags(max_steps=4))
    for other, message in (
        (write(tmp_path / "tokenizer", "b" * 64), f"begun on codes by the tokenizer {'a' * 64}; these are by {'b' * 64}"),
        (write(tmp_path / "rows", rows=80), "begun on codes of other samples or views, by the same tokenizer"),
    ):
        with pytest.raises(CodesError, match=message):
            train.train(config(tmp_path / "run", other), Flags())


def test_codes_without_labels_make_an_unconditional_prior(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", labelled=False)
    train.train(config(tmp_path / "run", plain, steps=5), Flags())
    prior = Prior.from_pretrained(tmp_path / "run/model")
    assert not prior.conditional and prior.sample(torch.arange(2))[0].shape == (2, 2, 2)
    data = CodesDataset(plain, "validation", prior.spec)
    tree = evaluate.report(prior, data, "validation")
    assert "conditional" not in tree and tree["unconditional"]["classes"] == {}


# Command lines ---------------------------------------------------------------------------------------------------
def test_the_flags_name_levels_and_codes(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", "unused", "--codes", str(codes), "--levels", "1:2", "--prior.type", "pixelcnn", "--prior.width", "8"]
    train.main([*words, "--check"])
    out = capsys.readouterr().out
    assert "96 train rows, 37 validation rows" in out and "pixelcnn: " in out
    assert "given level top: 4 codes on a grid of 2x2" in out and "models level bottom: 6 codes on a grid of 4x4" in out
    assert "conditions: 2 classes" in out
    assert not Path("unused").exists()


def test_a_configuration_that_does_not_fit_the_codes_fails_before_training(codes: Path, tmp_path: Path) -> None:
    for prior, message in (
        ({"levels": "0:3"}, r"prior.levels: '0:3' is no range within the 2 levels of the codes, 0:2"),
        ({"width": 15}, r"prior.width: 15 is no multiple of prior.heads, 2"),
        ({"levels": "", "order": "position"}, r"prior.order: 'position' .* needs levels of one shape; got \(2, 2\), \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(config(tmp_path / "run", codes, prior=prior), Flags())
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(CodesError, match="codes.json"):
        train.train(config(tmp_path / "none", tmp_path), Flags())


# Evaluation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gpt", "maskgit"])
def test_evaluation_says_what_nll_says_and_does_not_depend_on_the_processes(
    codes: Path,
    tmp_path: Path,
    ranks: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.setattr(Prior, "nll_rows", 10)  # several batches, the last one short
    train.train(config(tmp_path, codes, prior={"type": kind, "levels": ""} | TINY[kind], steps=10), Flags())
    evaluate.main(["--prior", str(tmp_path), "--codes", str(codes), "--device", "cpu"])
    tree = json.loads((tmp_path / "evaluation/validation.json").read_text())
    prior = Prior.from_pretrained(tmp_path / "model")
    data = CodesDataset(codes, "validation", prior.spec)
    batch = data.batch(torch.arange(len(data)))
    for name, cond in (("conditional", Cond(label=batch["label"])), ("unconditional", None)):
        bits = prior.nll(batch["codes"], cond, StepRng(0, 0, batch["index"])).double() / math.log(2)
        found = tree[name]
        assert found["bits_per_code"] == pytest.approx(bits.mean().item(), abs=1e-6)
        assert found["bits_per_sample"] == pytest.approx(bits.sum(1).mean().item(), abs=1e-5)
        for c, class_name in enumerate(("even", "odd")):
            assert found["classes"][class_name] == pytest.approx(bits[batch["label"] == c].mean().item(), abs=1e-6)
        maps = [torch.tensor(level["positions"], dtype=torch.float64) for level in found["levels"]]
        for level, each, expected in zip(LEVELS, maps, bits.mean(0).split([4, 16]), strict=True):
            torch.testing.assert_close(each, expected.view(level.shape), atol=1e-6, rtol=0)
    bound = "at most " if kind == "maskgit" else ""
    assert tree["bound"] == bool(bound)
    said = f"{len(data)} validation samples, conditional: {bound}{tree['conditional']['bits_per_code']:.4f} bits per code"
    assert said in capsys.readouterr().out
    for theirs in ranks(lambda rank: evaluate.report(prior, data, "validation")):
        assert theirs["conditional"]["bits_per_code"] == pytest.approx(tree["conditional"]["bits_per_code"], abs=1e-12)
        assert theirs["codes"] == tree["codes"]


def test_evaluation_refuses_the_codes_of_another_tokenizer(codes: Path, tmp_path: Path) -> None:
    train.train(config(tmp_path / "run", codes, steps=2), Flags())
    other = write(tmp_path / "other", "b" * 64)
    with pytest.raises(CodesError, match=f"made by the tokenizer {'b' * 64}; expected {'a' * 64}"):
        evaluate.main(["--prior", str(tmp_path / "run"), "--codes", str(other), "--device", "cpu"])
    with pytest.raises(ConfigError, match="out: .* is no run folder; say which file to write"):
        evaluate.main(["--prior", str(tmp_path / "run/model"), "--codes", str(codes)])
    with pytest.raises(ValueError, match="prior: 'runs/no/such' is neither a folder nor a Hub id"):
        evaluate.main(["--prior", "runs/no/such", "--codes", str(codes)])


@pytest.mark.parametrize("flag", [[], ["--check"]])
def test_evaluation_says_where_it_cannot_write_and_what_it_cannot_measure_before_the_work(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    train.train(config(tmp_path / "run", codes, steps=2, prior={"type": "gpt", "levels": "", "cond_dropout": 0.0} | TINY["gpt"]), Flags())
    monkeypatch.setattr(evaluate, "report", lambda *a: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("mine")
    words = ["--prior", str(tmp_path / "run"), "--codes", str(codes), "--device", "cpu", *flag]
    for out, message in (("file/x.json", "file is a file; expected a folder"), ("run", "run is a folder; expected a file")):
        with pytest.raises(UserError, match=f"^out: .*{message}"):
            evaluate.main([*words, "--out", str(tmp_path / out)])

    def unlabelled(*a: Any) -> CodesDataset:
        data = CodesDataset(*a)
        data.label = None
        return data

    monkeypatch.setattr(evaluate, "CodesDataset", unlabelled)
    with pytest.raises(CodesError, match="has no labels in this split, and the prior needs them"):
        evaluate.main(words)
