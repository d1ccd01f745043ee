"""The quickstart leaves what it promises, and a second call goes on from what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.cli import UserError, parse
from pipelines import TwoStagePipeline
from pipelines import quickstart as module
from pipelines.evaluate import EvaluateConfig
from pipelines.quickstart import QuickstartConfig, stages
from pipelines.sampling_config import ALIASES
from stage1_tokenizer.data.bundled import BundledConfig

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("samples.png", "reconstructions.png", "curves.png", "codebook.png")


TOKENIZER = """
data: {type: bundled, name: fashion}
tokenizer:
  type: vqvae
  net: {type: conv, patch: 4, widths: [16], blocks: [1], encoder_blocks: [0]}
  quantizer: {type: vq, codes: 512, dim: 8}
"""
PRIOR = "prior: {type: pixelcnn, width: 16, depth: 2}"


def quickstart(run: Path, steps: int) -> subprocess.CompletedProcess[str]:
    """The command with small nets: what it promises does not depend on them, the minutes of this test do."""
    words = [sys.executable, "-m", "pipelines.quickstart", "--run", str(run), "--samples", "40", "--max_steps", str(steps)]
    for option, text in (("--tokenizer", TOKENIZER), ("--prior", PRIOR)):
        file = run.with_name(f"{option.strip('-')}.yaml")
        file.write_text(text)
        words += [option, str(file)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)


def test_the_quickstart_leaves_pictures_figures_and_a_pipeline_that_loads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = quickstart(run, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["evaluation"]["reconstruction"]["samples"] == 2000
    assert set(figures["seconds"]) == {name for name, _ in stages(QuickstartConfig(), None)}
    pipeline = TwoStagePipeline.from_pretrained(run / "pipeline")
    assert pipeline.sample(2, seed=0).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("flag", ["--check", "--dry_run"])
def test_the_commands_are_shown_and_nothing_is_run(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "run"), flag]))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in shown] == [f"[{name}" for name, _ in stages(QuickstartConfig(), None)]
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--resume"):
        module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "run"), "--resume", "x"]))


def test_samples_are_compared_with_the_data_of_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[str, list[str]] = {}
    monkeypatch.setattr(module, "run_stage", lambda name, arguments: done.update({name: list(arguments)}))
    monkeypatch.setattr(module, "gather", lambda run, seconds: None)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.yaml").write_text("data: {type: bundled, name: emoji}")
    module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path)]))
    config, _ = parse(EvaluateConfig, done["samples"][1:], ALIASES)
    assert config.data == BundledConfig(name="emoji")


def test_a_failing_stage_ends_the_whole_and_names_itself(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer").write_text("in the way")
    done = quickstart(tmp_path / "run", 2)
    assert done.returncode == 2
    assert "error: tokenizer ended with exit code 2" in done.stderr and "is a file" in done.stderr
    assert not (tmp_path / "run" / "codes").exists()
