"""The dump of codes: it holds what the tokenizer gives for each sample, and no byte of it depends on the number of processes."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.cli import UserError, run_main
from intarsia.codes import CodesDataset, CodesError
from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.hub_files import HubError
from intarsia.rng import StepRng
from intarsia.specs import SignalSpec
from stage1_tokenizer import encode
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import Source, SourceConfig
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.encode import dump_codes, main
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.run_data import with_run_data
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig

SIGNALS = {1: SignalSpec("audio", 1, (16,)), 2: SignalSpec("image", 1, (8, 8)), 3: SignalSpec("video", 1, (4, 8, 8))}
NET = ConvConfig(widths=(4, 8), blocks=(0, 1), encoder_blocks=None, patch=1)
CONFIG = VQVAEConfig(micro_batch=4, net=NET, quantizer=VQConfig(codes=16, dim=4))


def tokenizer(axes: int = 2, seed: int = 0) -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = VQVAE(CONFIG, SIGNALS[axes])
    made.initialize([signals(SIGNALS[axes], 64)], StepRng(seed, 0, torch.arange(64)), comm)
    return made.eval()


def signals(signal: SignalSpec, n: int, seed: int = 0) -> Tensor:
    return StepRng(seed, 0, torch.arange(n)).uniform("x", signal.channels, *signal.shape) * 2 - 1


class Plain(SourceConfig):
    """Never built from a file."""


class Memory(Source):
    """Signals in memory."""

    type_name = "memory"

    def __init__(self, axes: int = 2, train: int = 21, labelled: bool = True, **transform: Any) -> None:
        made = Plain.model_construct(transform=TransformConfig(**transform), holdout=0)
        super().__init__(made)
        self.signal = SIGNALS[axes]
        splits = {}
        for number, (name, n) in enumerate((("train", train), ("validation", 6))):
            splits[name] = ArraySplit(signals(self.signal, n, number), torch.arange(n) % 3 if labelled else None, made.transform)
        self._finish(splits, ("a", "b", "c") if labelled else ())


# What stands in the dump ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_dump_holds_the_codes_of_every_sample(tmp_path: Path, axes: int) -> None:
    model, source = tokenizer(axes), Memory(axes)
    manifest = dump_codes(model, source, tmp_path / "codes", shard_rows=8)
    assert manifest.spec.fingerprint == model.fingerprint and manifest.level_specs == model.spec.levels
    assert manifest.spec.classes == ("a", "b", "c") and manifest.signal_spec == source.signal
    for name in source.splits:
        data, split = CodesDataset(tmp_path / "codes", name, model.spec), source.split(name)
        everything = split.batch(torch.arange(len(split)))
        found = data.batch(torch.arange(len(data)))
        assert torch.equal(found["codes"][0], model.encode(everything["x"])[0])
        assert torch.equal(found["label"], everything["label"])


def test_unlabelled_data_are_dumped_without_labels(tmp_path: Path) -> None:
    manifest = dump_codes(tokenizer(), Memory(labelled=False), tmp_path / "codes")
    assert manifest.spec.classes == () and CodesDataset(tmp_path / "codes", "train").label is None


def test_captions_reach_the_codes_for_every_row_and_view(tmp_path: Path) -> None:
    source = Memory(train=11, flip=True)
    for name in source.splits:
        split = source.split(name)
        split.captions = tuple(f"{name} {i}" for i in range(len(split)))
    dump_codes(tokenizer(), source, tmp_path / "codes", shard_rows=4, views=2)
    train = CodesDataset(tmp_path / "codes", "train")
    assert train.caption == [f"train {i}" for i in train.index.tolist()] and len(train) == 22
    assert CodesDataset(tmp_path / "codes", "validation").caption == [f"validation {i}" for i in range(6)]
    dump_codes(tokenizer(), Memory(), tmp_path / "plain")
    assert CodesDataset(tmp_path / "plain", "train").caption is None


def test_augmented_views_follow_the_samples_themselves(tmp_path: Path) -> None:
    model, source = tokenizer(), Memory(shift=2, flip=True)
    dump_codes(model, source, tmp_path / "codes", views=3, seed=5, shard_rows=8)
    data, split = CodesDataset(tmp_path / "codes", "train"), source.split("train")
    for view in range(3):
        rows = torch.from_numpy(np.flatnonzero(data.view == view))
        expected = model.encode(split.batch(torch.arange(21), seed=5, view=view)["x"])[0]
        assert torch.equal(data.batch(rows)["codes"][0], expected)
        assert torch.equal(data.batch(rows)["label"], torch.arange(21) % 3)
    plain = model.encode(split.batch(torch.arange(21))["x"])[0]
    assert torch.equal(data.batch(torch.arange(21))["codes"][0], plain)
    assert not torch.equal(data.batch(torch.arange(21, 42))["codes"][0], plain), "the augmentation does something"
    assert len(CodesDataset(tmp_path / "codes", "validation")) == 6


@pytest.mark.parametrize(("rows", "chunk"), [(5, 256), (8, 3), (21, 4), (4096, 7)])
def test_codes_do_not_depend_on_shards_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int) -> None:
    dump_codes(tokenizer(), Memory(), tmp_path / "a")
    monkeypatch.setattr(encode, "CHUNK", chunk)
    dump_codes(tokenizer(), Memory(), tmp_path / "b", shard_rows=rows)
    a, b = (CodesDataset(tmp_path / name, "train") for name in "ab")
    assert np.array_equal(a.codes[0], b.codes[0]) and np.array_equal(a.label, b.label)


def test_large_signals_are_encoded_a_few_at_a_time_into_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = tokenizer(), list[int]()
    dump_codes(model, Memory(), tmp_path / "a", shard_rows=16)
    encoded = model.encode
    monkeypatch.setattr(model, "encode", lambda x: taken.append(len(x)) or encoded(x))
    monkeypatch.setattr("stage1_tokenizer.sizes.NUMBERS_AT_ONCE", 10 * 8 * 8)  # two micro-batches of 4 fit
    dump_codes(model, Memory(), tmp_path / "b", shard_rows=16)
    assert sorted(taken) == [5, 6, 8, 8], "of 21 and 6 samples in shards of at most 16"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_ranks_write_the_bytes_of_one(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    model = tokenizer()
    dump_codes(model, Memory(shift=1), tmp_path / "one", views=2, shard_rows=8)

    def both(rank: int) -> int:
        dump_codes(model, Memory(shift=1), tmp_path / "two", views=2, shard_rows=8)
        return comm.world_size

    assert ranks(both) == [2, 2]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Refusals -----------------------------------------------------------------------------------------------------------
def test_signals_of_another_geometry_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: the signals are SignalSpec\(kind='audio'.*the tokenizer takes SignalSpec\(kind='image'"):
        dump_codes(tokenizer(2), Memory(1), tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_a_dump_of_another_tokenizer_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    first, second = tokenizer(seed=0), tokenizer(seed=1)
    dump_codes(first, Memory(), tmp_path / "codes")
    with pytest.raises(CodesError, match=f"fingerprint is '{first.fingerprint}' there and '{second.fingerprint}' here"):
        dump_codes(second, Memory(), tmp_path / "codes")


@pytest.mark.parametrize("other", [{"train": 20}, {"shift": 1}], ids=["data", "transform"])
def test_a_dump_of_other_data_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    dump_codes(tokenizer(), Memory(), tmp_path / "codes")
    with pytest.raises(CodesError, match="holds a complete dump of something else: (splits|data)"):
        dump_codes(tokenizer(), Memory(**other), tmp_path / "codes")


def test_an_error_in_the_data_ends_the_dump_and_leaves_it_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Memory()
    split = source.split("train")
    batch = split.batch
    monkeypatch.setattr(split, "batch", lambda index, **kw: batch(index, **kw) | ({"x": torch.full((len(index), 1, 8, 8), 9.0)}))
    with pytest.raises(ValueError, match="x: row 0 holds 9"):
        dump_codes(tokenizer(), source, tmp_path / "codes")
    with pytest.raises(CodesError, match="incomplete"):
        CodesDataset(tmp_path / "codes", "train")


# The script ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer, and 40 + 10 little images in idx files."""
    folder = tmp_path_factory.mktemp("run")
    for name, n in (("train", 40), ("t10k", 10)):
        images = (np.arange(n * 64) * 37 % 256).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 8, 8) + images.tobytes())
        with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 0x801, n) + bytes(i % 3 for i in range(n)))
    tokenizer().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(f"data:\n  type: idx\n  root: {folder}\n  holdout: 8\n  transform:\n    shift: 1\nseed: 3\n")
    return folder


def test_the_script_takes_the_data_of_the_run(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tokenizer", str(run_folder), "--out", str(tmp_path / "codes"), "--views", "2"])
    counts = {name: len(CodesDataset(tmp_path / "codes", name)) for name in ("train", "validation", "test")}
    assert counts == {"train": 64, "validation": 8, "test": 10}
    shown = capsys.readouterr().out
    assert "32 train, 8 validation, 10 test; 1 process(es)" in shown
    assert "train: 32 samples in 2 views" in shown and "of 16 codes used, perplexity" in shown
    main(["--tokenizer", str(run_folder / "model"), "--out", str(tmp_path / "codes"), "--views=2"])  # complete: nothing to do


def test_data_flags_change_the_data_of_the_run(tmp_path: Path, run_folder: Path) -> None:
    words = ["--tokenizer", str(run_folder), "--out", str(tmp_path / "codes"), "--data.type", "idx"]  # what it is already
    words += ["--data.holdout", "4", "--data.transform.flip", "true"]
    main(words)
    data = CodesDataset(tmp_path / "codes", "train")
    assert len(data) == 36
    assert data.manifest.data["transform"]["flip"] is True and data.manifest.data["transform"]["shift"] == 1


def test_check_and_dry_run_write_nothing(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--check", "--dry_run"):
        main(["--tokenizer", str(run_folder), "--out", str(tmp_path / "codes"), flag])
        assert "32 train" in capsys.readouterr().out
    assert not (tmp_path / "codes").exists()


def test_check_refuses_what_the_dump_would_refuse(tmp_path: Path, run_folder: Path) -> None:
    run, codes = ["--tokenizer", str(run_folder), "--check"], tmp_path / "codes"
    main([*run[:2], "--out", str(codes), "--shard_rows", "8"])
    main([*run, "--out", str(codes), "--shard_rows", "8"])
    with pytest.raises(CodesError, match="holds a complete dump of something else: shard_rows is 8 there and 16 here"):
        main([*run, "--out", str(codes), "--shard_rows", "16"])
    (codes / "codes.json").unlink()
    with pytest.raises(CodesError, match="holds 'test' and 2 more, but no codes.json"):
        main([*run, "--out", str(codes), "--shard_rows", "8"])
    with pytest.raises(CodesError, match="is a file; expected a folder"):
        main([*run, "--out", str(codes / "train/00000.parquet")])
    with pytest.raises(CodesError, match="lies below a file; expected a folder"):
        main([*run, "--out", str(codes / "train/00000.parquet/x")])
    with pytest.raises(ValueError, match=r"data: the signals are .*4, 4.*; the tokenizer takes .*8, 8"):
        main([*run, "--out", str(tmp_path / "new"), "--data.transform.size", "4"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "tokenizer: Field required"),
        (["--tokenizer", "RUN", "--out", "OUT", "--viws", "2"], "--viws: unknown key; did you mean 'views'"),
        (["--tokenizer", "RUN", "--out", "OUT", "--views", "0"], "views: .*greater than or equal to 1"),
        (["--tokenizer", "RUN", "--out", "OUT", "--views", "2", "--data.transform.shift", "0"], "views: 2 of data that are not augmented"),
        (["--tokenizer", "RUN", "--out", "OUT", "--max_steps", "2"], "a dump has no steps"),
        (["--tokenizer", "nobody/none", "--out", "OUT"], "data: nobody/none has no config.yaml of a run; say --data.type"),
        (["--tokenizer", "runs/no/such", "--out", "OUT"], "tokenizer: 'runs/no/such' is neither a folder nor a Hub id"),
        (["--tokenizer", "RUN", "--out", "OUT", "--device", "tpu"], "device: "),
        (["--tokenizer", "RUN", "--out", "OUT", "--seed", str(2**63)], "seed: .*less than 9223372036854775808"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_built(
    tmp_path: Path, run_folder: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode.Tokenizer, "from_pretrained", lambda *a: pytest.fail("built"))
    with pytest.raises((ConfigError, HubError), match=message):
        main([{"RUN": str(run_folder), "OUT": str(tmp_path / "codes")}.get(word, word) for word in words])


def test_too_little_space_is_refused_before_encoding(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = encode.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda path: usage._replace(free=100))
    words = ["--tokenizer", str(run_folder), "--out", str(tmp_path / "deep/er/codes")]
    with pytest.raises(UserError, match=r"out: .*codes: \d+ bytes are needed, 100 are free; --allow_low_space"):
        main(words)
    main([*words, "--allow_low_space"])
    assert len(CodesDataset(tmp_path / "deep/er/codes", "test")) == 10
    main(words)  # what is there already needs no room


def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["encode", "--tokenizer", str(run_folder), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        f"error: out: {tmp_path} holds 'thesis.txt', but no codes.json; expected a new or empty folder, or one that this command wrote\n"
    )


@pytest.mark.faults
def test_real_processes_write_the_bytes_of_one(tmp_path: Path, run_folder: Path, root: Path) -> None:
    """Gate C0 and the dump's promise, by the launcher that users use."""
    words = ["-m", "stage1_tokenizer.encode", "--tokenizer", str(run_folder), "--views", "2", "--shard_rows", "8", "--device", "cpu"]
    main([*words[2:], "--out", str(tmp_path / "one")])
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launch = [accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *words]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "--out", str(tmp_path / "two")], cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("of 16 codes used") == 3, "two ranks, of which one speaks"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# The data of the run -------------------------------------------------------------------------------------------------
def test_the_runs_data_stand_aside_for_what_the_caller_says(run_folder: Path, tmp_path: Path) -> None:
    run = str(run_folder)
    (tmp_path / "c.yaml").write_text(f"tokenizer: {run}\n")
    (tmp_path / "d.yaml").write_text(f"tokenizer: {run}\ndata:\n  type: bundled\n")

    def added(*words: str) -> bool:
        found = with_run_data(list(words))
        assert found[-len(words) :] == list(words)
        return len(found) > len(words) and found[0].startswith("--data=")

    assert added("--tokenizer", run) and added(f"--tokenizer={run}/model") and added("--config", str(tmp_path / "c.yaml"))
    assert added("--tokenizer", run, "--data.type", "idx", "--data.holdout", "3")
    assert not added("--tokenizer", run, "--data.type", "bundled") and not added("--tokenizer", run, "--data={type: bundled}")
    assert not added("--config", str(tmp_path / "d.yaml"))
    assert not added("--tokenizer", "user/name") and not added("--tokenizer", str(tmp_path))
    (tmp_path / "model").mkdir()  # a run may be called what its release is
    (tmp_path / "model" / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert added("--tokenizer", str(tmp_path / "model"))


def test_a_prior_in_the_place_of_a_tokenizer_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("codes: x\n")
    words = ["--tokenizer", str(tmp_path), "--out", str(tmp_path / "new")]
    with pytest.raises(ConfigError, match=r"data: .*/config\.yaml is of no tokenizer's run: it names no data"):
        main(words)
    (tmp_path / "model/config.json").write_text('{"kind": "prior"}')
    for name in (tmp_path, tmp_path / "model"):
        with pytest.raises(HubError, match=f"^tokenizer: {name} holds a 'prior'; expected a 'tokenizer'"):
            main(["--tokenizer", str(name), *words[2:]])


def test_a_tilde_is_the_home_folder(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").symlink_to(run_folder)
    main(["--tokenizer=~/tok", "--out", "~/codes"])  # the data are those of the run
    (tmp_path / "config.yaml").write_text("tokenizer: ~/tok\nout: ~/also\n")
    main(["--config", "~/config.yaml"])
    assert (tmp_path / "codes/codes.json").is_file() and (tmp_path / "also/codes.json").is_file() and not (tmp_path / "~").exists()
