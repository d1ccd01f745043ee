"""The quickstart leaves what it promises, and a second call goes on from what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from intarsia.cli import UserError, parse
from intarsia.config import ConfigError
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


@pytest.mark.slow
def test_more_steps_in_the_same_folder_go_on_from_a_short_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short, longer = (quickstart(run, steps) for steps in (2, 4))
    assert short.returncode == longer.returncode == 0, longer.stdout + longer.stderr
    assert f"{run}/codes: of the tokenizer " in longer.stdout and f"{run}/prior: of the tokenizer " in longer.stdout
    last = [json.loads(line)["step"] for line in (run / "prior" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last == 4 and TwoStagePipeline.from_pretrained(run / "pipeline").sample(2, seed=0).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("flag", ["--check", "--dry_run"])
def test_the_commands_are_shown_and_nothing_is_run(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "run"), flag]))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in shown] == [f"[{name}" for name, _ in stages(QuickstartConfig(), None)]
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--resume"):
        module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "run"), "--resume", "x"]))


@pytest.mark.parametrize("flag", [[], ["--check"]])
@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_a_configuration_that_is_not_there_is_said_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str], name: str
) -> None:
    monkeypatch.setattr(module, "run_stage", lambda *a: pytest.fail("a stage ran"))
    with pytest.raises(ConfigError, match=f"^{name}: .*nowhere"):
        module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "run"), f"--{name}", "nowhere", *flag]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [[], ["--check"]])
def test_a_run_that_cannot_be_written_to_is_said_before_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]) -> None:
    monkeypatch.setattr(module, "run_stage", lambda *a: pytest.fail("a stage ran"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="^run: .*file is a file; expected a folder"):
        module.quickstart(*parse(QuickstartConfig, ["--run", str(tmp_path / "file"), *flag]))


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


class Stages:
    """The stages without the work: each takes a second; codes and prior refuse what another tokenizer began, as the real ones do."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.fingerprint, self.stop, self.now, self.done = run, "a" * 64, "", 0.0, list[str]()
        self.seconds: dict[str, float] = {}
        monkeypatch.setattr(module, "run_stage", self.stage)
        monkeypatch.setattr(module, "gather", lambda run, seconds: self.seconds.update(seconds))
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def stage(self, name: str, arguments: list[str]) -> None:
        self.now += 1
        self.done.append(name)
        if name == self.stop:
            raise SystemExit(3)
        if name == "tokenizer":
            self.tell("tokenizer/model/config.json", {"fingerprint": self.fingerprint})
            (self.run / "tokenizer/config.yaml").write_text("data: {type: bundled, name: fashion}")
        if name in ("codes", "prior"):
            facts = {"tokenizer": {"fingerprint": self.fingerprint}, "spec": {"fingerprint": self.fingerprint}}
            path = self.run / name / "codes.json"
            if path.exists() and json.loads(path.read_text()) != facts:
                raise SystemExit(2)
            self.tell(f"{name}/codes.json", facts)
            (self.run / name / "work").touch()

    def tell(self, name: str, tree: dict[str, object]) -> None:
        (self.run / name).parent.mkdir(parents=True, exist_ok=True)
        (self.run / name).write_text(json.dumps(tree))

    def __call__(self) -> None:
        module.quickstart(*parse(QuickstartConfig, ["--run", str(self.run)]))


def test_codes_and_prior_of_a_tokenizer_that_has_gone_on_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Stages(tmp_path, monkeypatch)
    call()
    (tmp_path / "notes").mkdir()
    call()
    assert "removed" not in capsys.readouterr().out, "the same tokenizer: nothing is made anew"
    call.fingerprint, call.stop = "b" * 64, "codes"
    with pytest.raises(SystemExit):
        call()
    shown = capsys.readouterr().out
    for name in ("codes", "prior"):
        assert f"{tmp_path / name}: of the tokenizer aaaaaaaaaaaa, which is bbbbbbbbbbbb now: removed" in shown
    assert not (tmp_path / "codes").exists() and not (tmp_path / "prior").exists() and (tmp_path / "notes").exists()
    call.stop = ""
    call()
    assert "removed" not in capsys.readouterr().out
    assert call.seconds == {"tokenizer": 4.0, "codes": 2.0, "prior": 1.0, "pipeline": 3.0, "reconstructions": 3.0, "samples": 3.0}


def test_seconds_add_up_over_attempts_that_fail_and_calls_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Stages(tmp_path, monkeypatch)
    for call.stop in ("prior", "samples", "", ""):
        with pytest.raises(SystemExit) if call.stop else nullcontext():
            call()
    assert call.seconds == {"tokenizer": 4.0, "codes": 4.0, "prior": 4.0, "pipeline": 3.0, "reconstructions": 3.0, "samples": 3.0}
    assert capsys.readouterr().out.rpartition("Done in")[2].startswith(" 0.3 minutes: tokenizer 4 s, codes 4 s")
    (tmp_path / "seconds.json").write_text("[]")
    with pytest.raises(UserError, match=r"seconds\.json: holds no seconds of stages"):
        call()
