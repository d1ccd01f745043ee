"""Gate D1: a bad configuration is answered in one line that names the field and what is allowed, before any model is built."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from intarsia.cli import run_main

GOOD = "run: {run}\ndata: {{type: bundled}}\nsteps: 3\n"


class Built(BaseException):
    """Raised where a model would be built."""


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """(exit code, lines on stderr) of a training script for a configuration's text and flags; a model may not be built."""

    def ask(text: str, *flags: str, stage: str = "stage1_tokenizer", files: bool = True) -> tuple[int, list[str]]:
        train = importlib.import_module(f"{stage}.train")
        registry = train.TOKENIZERS if stage == "stage1_tokenizer" else train.PRIORS

        def build(*args, **kwargs):
            raise Built

        monkeypatch.setattr(registry, "build", build)
        path = tmp_path / "bad.yaml"
        path.write_text(text.format(run=tmp_path / "run"), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train", *(["--config", str(path)] if files else []), *flags])
        with pytest.raises(SystemExit) as stop:
            run_main(train.main)
        return int(stop.value.code or 0), capsys.readouterr().err.splitlines()

    return ask


VQVAE = "tokenizer: {{type: vqvae, quantizer: {{type: vq, "
NET = "tokenizer: {{type: vqvae, net: {{type: conv, "
CASES = {
    "unknown key": ("sede: 3", "error: sede: unknown key; did you mean 'seed'? allowed: run, seed, steps"),
    "unknown nested key": ("optim: {{lrr: 1}}", "error: optim.lrr: unknown key; did you mean 'lr'? allowed: lr, muon, betas"),
    "unknown key in a type": (VQVAE + "cods: 3}}}}", "error: tokenizer.quantizer.cods: unknown key; did you mean 'codes'?"),
    "unknown type": ("tokenizer: {{type: vqave}}", "error: tokenizer: unknown tokenizer 'vqave'; did you mean 'vqvae'? known: vqvae"),
    "unknown source": ("data: {{type: bundeld}}", "error: data: unknown data source 'bundeld'; did you mean 'bundled'? known: bundled"),
    "no such bundled set": ("data: {{type: bundled, name: fashoin}}", "error: data.name:"),
    "text for int": ("batch_size: '512'", "error: batch_size: Input should be a valid integer; got '512'"),
    "text for int below": (VQVAE + "codes: '512'}}}}", "error: tokenizer.quantizer.codes: Input should be a valid integer; got '512'"),
    "bool for int": (VQVAE + "codes: true}}}}", "error: tokenizer.quantizer.codes: Input should be a valid integer; got True"),
    "float for int": ("batch_size: 1e2", "error: batch_size: Input should be a valid integer; got 100.0"),
    "quoted number": ("optim: {{lr: '1e-4'}}", "error: optim.lr: Input should be a valid number; got '1e-4'"),
    "nan": ("optim: {{lr: .nan}}", "error: optim.lr: Input should be"),
    "inf": ("optim: {{lr: .inf}}", "error: optim.lr: Input should be"),
    "overflow": ("optim: {{clip: 1e999}}", "error: optim.clip: Input should be"),
    "word for bool": ("deterministic: no", "error: deterministic: Input should be a valid boolean; got 'no'"),
    "none of the words": ("precision: fp8", "error: precision: Input should be 'auto', 'fp32', 'bf16', 'fp16' or 'fp64'; got 'fp8'"),
    "null": ("seed: null", "error: seed: Input should be a valid integer; got None"),
    "list for a number": ("seed: [1]", "error: seed: Input should be a valid integer"),
    "number for a list": (NET + "widths: 8}}}}", "error: tokenizer.net.widths: Input should be a valid tuple; got 8"),
    "number for a mapping": ("optim: 3", "error: optim: Input should be a valid dictionary"),
    "mapping for a number": ("batch_size: {{a: 1}}", "error: batch_size: Input should be a valid integer"),
    "duplicate key": ("seed: 1\nseed: 2", "bad.yaml: line 5: the key 'seed' stands twice"),
    "alias": ("seed: &a 1\nbatch_size: *a", "bad.yaml: line 5: aliases are not allowed"),
    "no YAML": ("optim: [1", "bad.yaml: line 4: expected ',' or ']'"),
    "too deep": ("data: " + "[" * 50 + "]" * 50, "bad.yaml: line 3: nested more than 32 deep"),
    "zero": ("batch_size: 0", "error: batch_size: Input should be greater than or equal to 1; got 0"),
    "negative": ("seed: -1", "error: seed: Input should be greater than or equal to 0; got -1"),
    "out of range": ("optim: {{betas: [0.9, 1.0]}}", "error: optim.betas.1: Input should be less than 1; got 1.0"),
    "one of two": ("optim: {{betas: [0.9]}}", "error: optim.betas.1: Field required"),
    "codebook of nothing": (VQVAE + "codes: 0}}}}", "error: tokenizer.quantizer: codes 0"),
    "warm-up beyond the end": ("optim: {{warmup: 9}}", "error: optim.warmup: 9 is more than steps: 3"),
    "blocks against widths": (NET + "widths: [8, 16, 32]}}}}", "error: tokenizer.net:"),
    "size against halvings": (NET + "widths: [4, 4, 4, 4], blocks: [0, 0, 0, 0], encoder_blocks: null}}}}", "28"),
    "decoder without init": ("train: decoder", "train: 'decoder' needs init"),
}


@pytest.mark.parametrize("case", CASES)
def test_d1_a_bad_tokenizer_configuration_is_one_line(answer, case, tmp_path):
    extra, said = CASES[case]
    text = GOOD + extra
    for key in ("data", "steps"):  # a case may state these itself
        if extra.startswith(key):
            text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(key)) + "\n" + extra
    code, lines = answer(text)
    assert code == 2 and len(lines) == 1 and said in lines[0] and lines[0].startswith("error: "), lines
    if case not in ("no such bundled set", "size against halvings"):
        assert not (tmp_path / "run").exists()


PRIOR = "run: {run}\ncodes: {codes}\nsteps: 3\n"
GPT = "prior: {{type: gpt, "
PRIOR_CASES = {
    "unknown key": (GPT + "widht: 3}}", "prior.widht: unknown key; did you mean 'width'? allowed: levels, cond_dropout"),
    "key of another type": ("prior: {{type: pixelcnn, inner: 2}}", "prior.inner: unknown key of the type 'pixelcnn'; rq has it"),
    "unknown type": (
        "prior: {{type: pixelcnnn}}",
        "prior: unknown prior 'pixelcnnn'; did you mean 'pixelcnn'? known: gpt, maskgit, pixelcnn, rq",
    ),
    "text for int": (GPT + "depth: '6'}}", "prior.depth: Input should be a valid integer; got '6'"),
    "out of range": (GPT + "cond_dropout: 1.5}}", "prior.cond_dropout: Input should be less than or equal to 1; got 1.5"),
    "none of the words": (GPT + "order: depth}}", "prior.order: Input should be 'level' or 'position'; got 'depth'"),
    "even kernel": ("prior: {{type: pixelcnn, kernel: 4}}", "prior.kernel: expected an odd number; got 4"),
    "levels that are none": (GPT + "levels: 0-1}}", "prior.levels: expected \"start:stop\", such as \"0:1\"; got '0-1'"),
    "levels beyond the codes": (GPT + "levels: 0:2}}", "prior.levels: '0:2' is no range within the 1 levels of the codes, 0:1"),
    "heads against width": (GPT + "width: 10, heads: 4}}", "10"),
    "no such codes": ("codes: nowhere", "codes: 'nowhere' is no folder"),
}


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Twelve grids of 3x3 codes in two classes."""
    import torch

    from intarsia.codes import write_codes
    from intarsia.specs import LevelSpec, SignalSpec

    folder = tmp_path_factory.mktemp("codes")
    split = ([torch.arange(108).view(12, 3, 3) % 7], torch.arange(12) % 2)
    levels = [LevelSpec("codes", 7, (3, 3))]
    about = {"type": "vqvae", "fingerprint": "f" * 64}
    splits, signal = {"train": split, "validation": split}, SignalSpec("image", 1, (12, 12))
    write_codes(folder, splits, levels, signal=signal, tokenizer=about, classes=("a", "b"))
    return folder


@pytest.mark.parametrize("case", PRIOR_CASES)
def test_d1_a_bad_prior_configuration_is_one_line(answer, case, codes):
    extra, said = PRIOR_CASES[case]
    head = PRIOR.replace("{codes}", str(codes)) if not extra.startswith("codes") else PRIOR.replace("codes: {codes}\n", "")
    code, lines = answer(head + extra, stage="stage2_prior")
    assert code == 2 and len(lines) == 1 and said in lines[0] and lines[0].startswith("error: "), lines


def test_a_good_prior_configuration_gets_as_far_as_the_model(answer, codes):
    with pytest.raises(Built):
        answer(PRIOR.replace("{codes}", str(codes)), stage="stage2_prior")


FLAGS = {
    "value missing": (["--steps"], "error: --steps: a value is missing"),
    "misspelt flag": (["--max_step", "3"], "error: --max_step: unknown key; did you mean 'max_steps'?"),
    "wrong flag value": (["--optim.lr", "fast"], "error: optim.lr: Input should be a valid number; got 'fast'"),
    "wrong list index": (["--optim.betas.2", "0.5"], "error: --optim.betas.2: '2' is no index into a list of 2"),
    "bare word": (["seed=3"], "error: 'seed=3': expected --key value"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_d1_a_bad_flag_is_one_line(answer, case):
    flags, said = FLAGS[case]
    code, lines = answer(GOOD, *flags)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(said), lines


def test_d1_all_mistakes_come_at_once(answer):
    code, lines = answer(GOOD + "sede: 1\noptim: {{lr: '1'}}\n", "--batch_size", "many", "--max_steps", "x")
    assert code == 2 and len(lines) == 4 and all(line.startswith("error: ") for line in lines)


def test_d1_a_configuration_that_is_nowhere_is_answered_with_those_that_are(answer):
    code, lines = answer("", "--config", "fashoin/vqvae", files=False)
    assert code == 2 and lines[0].startswith("error: --config: 'fashoin/vqvae' is neither a file nor a shipped configuration")


def test_d1_run_is_required(answer):
    assert answer("", files=False) == (2, ["error: run: Field required"])


def test_a_good_configuration_gets_as_far_as_the_model(answer):
    with pytest.raises(Built):
        answer(GOOD)


def test_d1_a_bad_configuration_ends_the_process_with_2_and_one_line(tmp_path):
    import subprocess

    command = [sys.executable, "-m", "stage1_tokenizer.train", "--run", str(tmp_path / "run"), "--sede", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --sede: unknown key; did you mean 'seed'?") and not (tmp_path / "run").exists()
