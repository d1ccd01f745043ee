"""The comparison of quantisers: through the ordinary commands, resumable, its table from what they wrote."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from intarsia.cli import Flags, UserError, parse, shipped_configs
from pipelines import compare_quantizers as module
from pipelines.compare_quantizers import CompareConfig, EntryConfig, compare
from pipelines.quantizer_report import report
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig

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

    def run(arguments: Sequence[str], quiet: bool = False) -> float:
        ran.append(arguments[0])
        if arguments[0] == "pipelines.evaluate":
            arguments = [*arguments, "--bootstrap", "5"]
        monkeypatch.setattr(sys, "argv", list(arguments))
        importlib.import_module(arguments[0]).main()
        return 1.5

    monkeypatch.setattr(module, "run_command", run)
    monkeypatch.setattr(module, "pace", lambda training: 0.5)
    return ran


def config(out: Path, **changes: object) -> CompareConfig:
    entries = (
        EntryConfig(name="one", quantizer=VQConfig(codes=16, dim=4)),
        EntryConfig(name="two", quantizer=ResidualConfig(stages=2, dropout=0.5, inner=VQConfig(codes=16, dim=4))),
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
    called.clear()
    compare(config(tmp_path / "c"), Flags())
    assert called == []


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path: Path, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.run_command

    def broken(arguments: Sequence[str], quiet: bool = False) -> float:
        if len(called) == 3:
            raise KeyboardInterrupt
        return whole(arguments, quiet)

    monkeypatch.setattr(module, "run_command", broken)
    with pytest.raises(KeyboardInterrupt):
        compare(config(tmp_path / "c"), Flags())
    monkeypatch.setattr(module, "run_command", whole)
    called.clear()
    compare(config(tmp_path / "c"), Flags())
    assert called == ["stage1_tokenizer.train", "stage1_tokenizer.evaluate"]  # of the second one; its training resumes, and is done


def test_another_comparison_in_the_same_folder_is_refused(tmp_path: Path, called: list[str]) -> None:
    compare(config(tmp_path / "c"), Flags())
    with pytest.raises(UserError, match="holds a comparison with other seconds; take another folder"):
        compare(config(tmp_path / "c", seconds=2.0), Flags())


@pytest.mark.slow
def test_the_best_get_a_prior(tmp_path: Path, called: list[str]) -> None:
    compare(config(tmp_path / "c", prior="fashion_mnist/gpt", best=1, samples=100, prior_seconds=101.0), Flags())
    assert called.count("stage2_prior.train") == 1 and called[-1] == "pipelines.evaluate"
    rows = (tmp_path / "c" / "report.md").read_text().splitlines()
    assert rows[2].split("|")[-4].strip().isdecimal() and rows[3].split("|")[-4].strip() == ""


def test_rows_are_sorted_by_quality() -> None:
    def result(name: str, psnr: float) -> dict:
        level = {"usage": 1.0, "perplexity": 9.0, "bits_per_image": 40.0, "nominal_bits_per_image": 64.0}
        found = {"reconstruction": {"psnr": psnr, "psnr_pooled": psnr}, "codes": {"train": [], "test": [level]}, "prefixes": []}
        return {"name": name, "steps": 5, "tokenizer": found}

    rows = report([result("worse", 20.0), result("better", 21.0)]).splitlines()
    assert "better" in rows[2] and "worse" in rows[3] and "| 40 | 64 |" in rows[2]


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("compare_quantizers/")])
def test_the_shipped_comparisons_load(name: str) -> None:
    loaded, _ = parse(CompareConfig, ["--config", name])
    assert len(loaded.quantizers) >= 10
