"""The comparison of quantisers: through the ordinary commands, resumable, its table from what they wrote."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from intarsia import yaml_io
from intarsia.cli import Flags, UserError, parse, shipped_configs
from intarsia.config import ConfigError
from intarsia.meta import build_on_meta
from intarsia.specs import SignalSpec
from pipelines import compare_quantizers as module
from pipelines.compare_quantizers import CompareConfig, EntryConfig, compare
from pipelines.quantizer_report import report
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS
from stage1_tokenizer.train import TokenizerTrainConfig
from stage2_prior.train import PriorTrainConfig

SMALL = ("--tokenizer.net.widths=[8, 8]", "--tokenizer.net.blocks=[0, 0]", "--tokenizer.net.encoder_blocks=[0, 0]")
QUICK = (
    "--validation_samples=8",
    "--init_samples=64", "--log.pictures_every=0", "--log.validate_every=0", "--device=cpu",
    "--optim.warmup=1",
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the commands in this process, and says which of them ran."""
    ran: list[str] = []

    def run(arguments: Sequence[str], quiet: bool = False, log: Path | None = None, jobs: int = 1) -> float:
        ran.append(arguments[0])
        if arguments[0] == "pipelines.evaluate":
            arguments = [*arguments, "--bootstrap", "5"]
        monkeypatch.setattr(sys, "argv", list(arguments))
        importlib.import_module(arguments[0]).main()
        return 1.5

    monkeypatch.setattr(module, "run_command", run)
    monkeypatch.setattr(module, "pace", lambda training: 0.5)
    monkeypatch.setattr(module, "ratio", lambda training, reference: 1.0)
    return ran


def config(out: Path, **changes: object) -> CompareConfig:
    several = ResidualConfig(stages=2, dropout=0.5, inner=VQConfig(codes=16, dim=4))
    entries = (
        EntryConfig(name="one", quantizer=VQConfig(codes=16, dim=4)),
        EntryConfig(name="two", quantizer=several, flags=("--tokenizer.by_depth=true",)),
    )
    values = {"tokenizer": "fashion/vqvae", "quantizers": entries, "data": SMALL + QUICK, "split": "validation", "seconds": 1.0}
    return CompareConfig(**(values | {"out": str(out)} | changes))  # type: ignore[arg-type]


def test_every_quantiser_is_trained_and_evaluated_once(tmp_path: Path, called: list[str]) -> None:
    compare(config(tmp_path / "c"), Flags())
    assert called == ["stage1_tokenizer.train", "stage1_tokenizer.evaluate"] * 2
    results = {name: json.loads((tmp_path / "c" / "results" / f"{name}.json").read_text()) for name in ("one", "two")}
    assert all(r["steps"] == 2 and r["seconds"] == 1.5 for r in results.values())
    table = (tmp_path / "c" / "report.md").read_text()
    found = results["two"]["tokenizer"]
    assert f"| two | {found['reconstruction']['psnr']:.2f} |" in table
    assert len(found["prefixes"]) == 1 and len(found["codes"]["validation"]) == 2
    assert (tmp_path / "c" / "curve.png").read_bytes().startswith(b"\x89PNG")
    told = [yaml_io.load((tmp_path / "c" / name / "tokenizer/config.yaml").read_text())["tokenizer"]["by_depth"] for name in results]
    assert told == [False, True]
    called.clear()
    compare(config(tmp_path / "c"), Flags())
    assert called == []


LEVEL = {"usage": 1.0, "perplexity": 9.0, "bits_per_image": 40.0, "nominal_bits_per_image": 64.0}


def flag(arguments: Sequence[str], name: str) -> str:
    return arguments[list(arguments).index(name) + 1]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that only leave the files of the true ones, and what ran: command and quantiser, paces too."""
    ran: list[str] = []

    def run(arguments: Sequence[str], quiet: bool = False, log: Path | None = None, jobs: int = 1) -> float:
        assert (log is None) == (jobs == 1)
        name = {"stage1_tokenizer.train": "--run", "stage2_prior.train": "--run"}.get(arguments[0], "--out")
        folder = Path(flag(arguments, name))
        entry = next(part for part in folder.parts if part in ("one", "two"))
        ran.append(f"{arguments[0].split('.')[-1]} {entry}")
        folder.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "stage1_tokenizer.train":
            (folder / "model").mkdir(exist_ok=True)
            (folder / "config.yaml").write_text("data: {type: bundled, name: fashion}\n")
            validated = [{"step": i, "validation/psnr": psnr} for i, psnr in ((1, 5.0), (2, 20.0 + (entry == "one")))]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validated))
        if arguments[0].endswith("evaluate"):
            quality = {"psnr": 20.0 + (entry == "two"), "psnr_pooled": 20.0}
            samples = {"frechet": {"samples": {"value": 1.0, "low": 0.9, "high": 1.1}}, "frechet_ratio_to_baseline": {"value": 0.5}}
            found = {"reconstruction": quality, "codes": {"test": [LEVEL]}, "bits": {"total": {"bits_per_image": 30.0}}, "samples": samples}
            (folder / "evaluation.json").write_text(json.dumps(found))
        return 1.5

    def which(training: Sequence[str]) -> str:
        return "two" if "stages: 2" in str(training) or "two" in Path(training[-1]).parts else "one"

    def pace(training: Sequence[str]) -> float:
        ran.append(f"pace {which(training)}")
        return 0.05

    def ratio(training: Sequence[str], reference: Sequence[str]) -> float:
        ran.append(f"ratio {which(training)} to {which(reference)}")
        return 2.0

    monkeypatch.setattr(module, "run_command", run)
    monkeypatch.setattr(module, "pace", pace)
    monkeypatch.setattr(module, "ratio", ratio)
    return ran


BEGIN = ["pace one", "ratio two to one"]
ONE, TWO = ["train one", "evaluate one"], ["train two", "evaluate two"]
CODES = [f"{part} {name}" for name in ("one", "two") for part in ("train", "encode")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_paces_are_measured_before_any_training(tmp_path: Path, faked: list[str], jobs: int) -> None:
    compare(config(tmp_path / "c", prior="fashion_mnist/gpt", jobs=jobs), Flags())
    assert faked[:2] == faked[10:12] == BEGIN and sorted(faked[2:6]) == sorted(ONE + TWO) and faked[6:10] == CODES
    results = [json.loads((tmp_path / "c" / "results" / f"{name}.json").read_text()) for name in ("one", "two")]
    assert [(r["steps"], r["prior_steps"]) for r in results] == [(20, 12000), (10, 6000)], "1 and 600 seconds of 0.05 and 0.1 a step"
    assert sorted(faked[12:]) == sorted(f"{part} {name}" for part in ("train", "assemble", "evaluate") for name in ("one", "two"))
    assert (tmp_path / "c" / "report.md").read_text().count("| 1.000 [0.900, 1.100] | 0.500 |") == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_comparison_goes_on(tmp_path: Path, faked: list[str], monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    whole = module.run_command

    def broken(arguments: Sequence[str], **options: object) -> float:
        if "two" in str(arguments) and arguments[0] == "stage1_tokenizer.evaluate":
            raise SystemExit(143)
        return whole(arguments, **options)

    monkeypatch.setattr(module, "run_command", broken)
    with pytest.raises(SystemExit):
        compare(config(tmp_path / "c", jobs=jobs), Flags())
    assert sorted(faked) == sorted([*BEGIN, *ONE, "train two"])
    monkeypatch.setattr(module, "run_command", whole)
    faked.clear()
    compare(config(tmp_path / "c", jobs=3 - jobs), Flags())  # the number of jobs decides nothing
    assert faked == TWO  # its training resumes, and is done


def test_a_comparison_without_priors_ends_with_its_report(tmp_path: Path, faked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare(config(tmp_path / "out", prior="fashion_mnist/gpt", best=0), Flags())
    assert sorted(faked) == sorted([*BEGIN, *ONE, *TWO]) and "| one |" in capsys.readouterr().out


def test_figures_alone_go_on_elsewhere_and_tokenizers_for_priors_are_trained_again(tmp_path: Path, faked: list[str]) -> None:
    compare(config(tmp_path / "here"), Flags())
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here" / "results", there / "results")
    faked.clear()
    compare(config(there, prior="fashion_mnist/gpt", best=1), Flags())
    assert faked == ["train one", "encode one", "pace one", "train one", "assemble one", "evaluate one"]


def test_the_best_are_chosen_by_validation_and_not_by_the_split_of_the_table(tmp_path: Path, faked: list[str]) -> None:
    """Here one is better on validation, two on the split; without any validation the split decides."""
    compare(config(tmp_path / "c", prior="fashion_mnist/gpt", best=1), Flags())
    assert faked[-1] == "evaluate one"
    for file in (tmp_path / "c" / "results").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"validation_psnr": None}))
    compare(config(tmp_path / "c", prior="fashion_mnist/gpt", best=1), Flags())
    assert faked[-1] == "evaluate two"


def test_another_comparison_in_the_same_folder_is_refused(tmp_path: Path, faked: list[str]) -> None:
    compare(config(tmp_path / "c"), Flags())
    for flags in (Flags(), Flags(check=True)):
        with pytest.raises(UserError, match="holds a comparison with other seconds; take another folder"):
            compare(config(tmp_path / "c", seconds=2.0), flags)
    compare(config(tmp_path / "new"), Flags(check=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "fashion/vqvaes"}, "^tokenizer: --config: 'fashion/vqvaes' is neither a file nor a shipped configuration"),
        ({"data": ("--tokenizer.net.width=3",)}, "^tokenizer: tokenizer.net.width: unknown key"),
        ({"split": "test"}, "^split: data: no split 'test'; this source has train, validation"),
        ({"prior": "fashion_mnist/gtp"}, "^prior: --config: 'fashion_mnist/gtp' is neither a file nor a shipped configuration"),
        ({"prior": "fashion_mnist/gpt", "features": "nowhere"}, "^features: 'nowhere' is neither a folder nor a Hub id"),
    ],
)
@pytest.mark.parametrize("flags", [Flags(), Flags(check=True)])
def test_what_is_not_there_is_said_before_any_training_or_plan(
    tmp_path: Path, faked: list[str], changes: dict[str, Any], message: str, flags: Flags
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(config(tmp_path / "c", **changes), flags)
    assert faked == [] and not (tmp_path / "c" / "plan.json").exists()


def test_a_folder_that_cannot_be_written_to_is_said_of_out(tmp_path: Path, faked: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for flags in (Flags(), Flags(check=True)):
        with pytest.raises(UserError, match="^out: .*file/c lies below a file; expected a folder"):
            compare(config(tmp_path / "file" / "c"), flags)


def test_what_is_asked_of_priors_may_be_corrected_until_one_is_done(
    tmp_path: Path, faked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module.run_command

    def broken(arguments: Sequence[str], **options: object) -> float:
        if arguments[0] == "pipelines.evaluate":
            raise SystemExit(2)
        return whole(arguments, **options)

    compare(config(tmp_path / "c"), Flags())
    monkeypatch.setattr(module, "run_command", broken)
    with pytest.raises(SystemExit):
        compare(config(tmp_path / "c", prior="fashion_mnist/gpt", best=1), Flags())
    monkeypatch.setattr(module, "run_command", whole)
    faked.clear()
    asked: dict[str, Any] = {"prior": "fashion_mnist/gpt", "prior_seconds": 60.0, "samples": 100}
    compare(config(tmp_path / "c", best=1, **asked), Flags())
    assert "pace one" in faked and faked[-1] == "evaluate one"
    assert json.loads((tmp_path / "c" / "results" / "one.json").read_text())["prior_steps"] == 1200
    compare(config(tmp_path / "c", best=2, **asked), Flags())
    assert faked[-1] == "evaluate two"
    with pytest.raises(UserError, match="^out: .*holds a prior of one with other prior_seconds, samples; take another folder"):
        compare(config(tmp_path / "c", best=2, **asked | {"prior_seconds": 30.0, "samples": 50}), Flags())


def test_commands_at_once_share_the_cores_and_print_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    program = tmp_path / "shows_threads.py"
    program.write_text("import os, sys\nprint(os.environ.get('OMP_NUM_THREADS'))\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.chdir(tmp_path)
    module.run_command(["shows_threads", "0"], log=tmp_path / "log.txt", jobs=2)
    with pytest.raises(SystemExit) as stop:
        module.run_command(["shows_threads", "5"], log=tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "3\nNone\n" and stop.value.code == 5


@pytest.mark.slow
def test_the_best_get_a_prior(tmp_path: Path, called: list[str]) -> None:
    compare(config(tmp_path / "c", prior="fashion_mnist/gpt", best=1, samples=100, prior_seconds=101.0), Flags())
    assert called.count("stage2_prior.train") == 1 and called[-1] == "pipelines.evaluate"
    rows = (tmp_path / "c" / "report.md").read_text().splitlines()
    assert rows[2].split("|")[-4].strip().isdecimal() and rows[3].split("|")[-4].strip() == ""


def test_rows_are_sorted_by_quality() -> None:
    def result(name: str, psnr: float) -> dict:
        found = {"reconstruction": {"psnr": psnr, "psnr_pooled": psnr}, "codes": {"train": [], "test": [LEVEL]}, "prefixes": []}
        return {"name": name, "steps": 5, "tokenizer": found}

    rows = report([result("worse", 20.0), result("better", 21.0)]).splitlines()
    assert "better" in rows[2] and "worse" in rows[3] and "| 40 | 64 |" in rows[2]


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("compare_quantizers/")])
def test_the_shipped_comparisons_build_what_they_compare(name: str) -> None:
    loaded, _ = parse(CompareConfig, ["--config", name])
    bits = {}
    for entry in loaded.quantizers:
        words = ["--config", loaded.tokenizer, f"--tokenizer.quantizer={yaml_io.dump(entry.quantizer.to_dict())}", "--run", "none"]
        found, _ = parse(TokenizerTrainConfig, words)
        signal = SignalSpec("image", 3, (32, 32)) if loaded.tokenizer.startswith("emoji") else SignalSpec("image", 1, (28, 28))
        tokenizer: Any = build_on_meta(TOKENIZERS.get("vqvae"), found.tokenizer, signal)
        bits[entry.name] = sum(math.log2(level.vocab) for level in tokenizer.level_specs())
    assert len(bits) >= 5 and all(9 <= n <= 36 for n in bits.values()), bits
    if loaded.best:
        parse(PriorTrainConfig, ["--config", loaded.prior, "--codes", "none", "--run", "none"])
        assert all(bits[entry.name] in (9, 10, 13) for entry in loaded.quantizers if entry.ranked), "ranked ones are at like rates"


@pytest.mark.parametrize(
    "flag",
    ["--tokenizer.quantizer.type=fsq", "--tokenizer.quantizer={codes: 8}", "--tokenizer.type=vqvae2", "--run=x", "--steps", "--data.a=x"],
)
def test_flags_of_an_entry_do_not_replace_what_the_comparison_sets(flag: str) -> None:
    name = flag[2:].partition("=")[0]
    tree = {"tokenizer": "fashion_mnist/vqvae", "quantizers": [{"name": "one", "quantizer": {"type": "vq"}, "flags": [flag]}]}
    with pytest.raises(ConfigError, match=f"^quantizers.0: flags: .* of the entry 'one'; the comparison itself sets {name}$"):
        CompareConfig.from_dict(tree)


def test_check_counts_the_priors_that_will_be_trained(
    tmp_path: Path, faked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "check_parts", lambda config: None)
    entries = tuple(EntryConfig(name=name, quantizer=VQConfig(), ranked=name != "c") for name in "abc")
    compare(config(tmp_path / "c", quantizers=entries, prior="fashion_mnist/gpt", best=4), Flags(check=True))
    said = capsys.readouterr().out
    assert said.startswith("3 quantisers of ") and "2 priors of" in said
