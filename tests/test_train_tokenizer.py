"""The training script of stage 1: exact resumption, fine-tuning, validation, release, and its command line."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from intarsia import cli, yaml_io
from intarsia.config import ConfigError
from intarsia.metrics_log import read_metrics
from intarsia.order import Order
from intarsia.run import Run
from stage1_tokenizer import train as script
from stage1_tokenizer.data import decoded
from stage1_tokenizer.data.base import SOURCES
from stage1_tokenizer.data.errors import DataError
from stage1_tokenizer.metrics import psnr, unit
from stage1_tokenizer.objectives.base import Objective
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage1_tokenizer.tokenizers.vqvae import VQVAE
from stage1_tokenizer.tokenizers.vqvae2 import LevelConfig
from tests.training import HIERARCHY, TOKENIZER, Left, Toy, ToyConfig, augmented, run_training, tiny

EVERY = {"validate_every": 5, "pictures_every": 5, "checkpoint_every": 5}
UNTRAINED = ReconstructionConfig(prefix_weight=0.0)
DEPTHS = TOKENIZER.replace(quantizer=ResidualConfig(stages=2, dropout=0.5, inner=VQConfig(codes=8, dim=4)), prefix_decoders=(1,))


def left(config, **flags) -> Left:
    run_training(config, **flags)
    return Left.of(config.run)


def stop_at(monkeypatch, step: int) -> None:
    """Sends SIGTERM in the given step of the next training."""
    real = Run.parts

    def parts(self, loader, at):
        if at == step:
            monkeypatch.setattr(Run, "parts", real)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, loader, at)

    monkeypatch.setattr(Run, "parts", parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_a4_a_run_with_augmentation_resumed_in_mid_epoch_ends_as_if_never_stopped(tmp_path, monkeypatch, workers):
    changes = {"steps": 15, "data": augmented(), "workers": workers, "optim": {"average": 0.9}, "log": {"checkpoint_every": 4}}
    whole = left(tiny(tmp_path / "whole", **changes))
    stop_at(monkeypatch, 8)  # sample 72 of epochs of 50
    with pytest.raises(SystemExit) as end:
        left(tiny(tmp_path / "cut", **changes))
    assert end.value.code == 143 and Left.of(tmp_path / "cut").step == 9
    assert left(tiny(tmp_path / "cut", **changes)).differences(whole) == []


def test_a4_the_comparison_sees_other_augmentation_and_another_order(tmp_path, monkeypatch):
    """The negative control: a resumed run that starts its epochs, or its order, anew."""
    changes = {"steps": 12, "data": augmented(), "log": {"checkpoint_every": 8}}
    whole = left(tiny(tmp_path / "whole", **changes))
    for name in ("epochs", "indices"):
        left(tiny(tmp_path / name, **changes), max_steps=8)
        with monkeypatch.context() as patch:
            real = getattr(Order, name)
            patch.setattr(Order, name, lambda self, step, real=real: real(self, step - 8))
            found = left(tiny(tmp_path / name, **changes)).differences(whole)
        assert "module/to_codes.weight" in found and "module/quantizer.codebook" in found


def test_f3_the_same_command_twice_leaves_the_same_bits_whatever_the_workers(tmp_path):
    first = left(tiny(tmp_path / "a", steps=10, data=augmented()))
    assert first.differences(left(tiny(tmp_path / "b", steps=10, data=augmented(), workers=3))) == []


def test_validation_pictures_and_releases_change_nothing_in_what_is_trained(tmp_path):
    changes = {"steps": 15, "optim": {"average": 0.9}}
    plain = left(tiny(tmp_path / "plain", **changes))
    looked_at = left(tiny(tmp_path / "looked", **changes, log=EVERY))
    assert [name for name in looked_at.differences(plain) if name not in ("facts", "metrics")] == []
    assert not (tmp_path / "plain" / "curves.png").exists()
    with Image.open(tmp_path / "looked" / "curves.png") as curves:
        assert curves.width > 1000 and curves.height > 1000
    assert (tmp_path / "looked" / "reconstructions.png").exists() and looked_at.facts["best"] is not None


def test_bf16_trains_too(tmp_path):
    end = left(tiny(tmp_path, steps=6, precision="bf16"))
    assert end.tensors["module/quantizer.codebook"].dtype == torch.float32 and end.facts["precision"] == "bf16"


# Validation and release ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0, 4])
def test_validation_figures_are_those_of_the_released_tokenizer_over_the_split_or_its_first_samples(tmp_path, limit):
    config = tiny(tmp_path, steps=10, log=EVERY, validation_samples=limit)
    run_training(config)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation/psnr" in line]
    best = max(lines, key=lambda line: line["validation/psnr"])
    assert [line["step"] for line in lines] == [5, 10] and best["step"] == 10
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    x = SOURCES.build(config.data).split("validation").batch(torch.arange(limit or 11))["x"]
    codes = tokenizer.encode(x)
    assert psnr(unit(x), unit(tokenizer.decode(codes))).mean() == pytest.approx(best["validation/psnr"], abs=1e-9)
    assert best["validation/usage"] == len(codes[0].unique()) / 24
    newest = Left.of(tmp_path).tensors
    assert all(torch.equal(value, newest[f"module/{name}"]) for name, value in tokenizer.state_dict().items())


def test_the_release_holds_averaged_weights_and_a_codebook_moved_under_them(tmp_path):
    run_training(tiny(tmp_path, steps=10, optim={"average": 0.9}))
    release, trained = Tokenizer.from_pretrained(tmp_path / "model").state_dict(), Left.of(tmp_path).tensors
    assert torch.equal(release["to_codes.weight"], trained["average/to_codes.weight"])
    assert not torch.equal(release["quantizer.codebook"], trained["module/quantizer.codebook"])


@pytest.mark.parametrize("changes", [{"grow": (9,), "restart": 0.0}, {"restart": 0.9, "decay": 0.5}])
def test_averages_take_over_the_codes_of_a_gradient_codebook_that_are_set_anew(tmp_path, monkeypatch, changes):
    set_anew, real = [], VQ.update

    def update(self, rng, comm):
        before = self.codebook.detach().clone()
        stats = real(self, rng, comm)
        set_anew.append((self.codebook != before).any(1).detach())
        return stats

    monkeypatch.setattr(VQ, "update", update)
    quantizer = VQConfig(codes=24, dim=4, update="gradient", **changes)
    trained = left(tiny(tmp_path, steps=10, tokenizer=TOKENIZER.replace(quantizer=quantizer), optim={"average": 0.9, "lr": 1e-4})).tensors
    rows = set_anew[8]  # before the last step but one ended
    assert rows.any()
    average, codebook = (trained[f"{of}/quantizer.codebook"][rows] for of in ("average", "module"))
    apart = torch.where(set_anew[9][rows][:, None], 0.0, average - codebook)  # set anew once more: equal
    assert apart.abs().max() < 1e-3 < codebook.abs().mean()


def test_the_averaged_codebook_is_estimated_from_as_many_signals_as_the_first_one(tmp_path, monkeypatch):
    seen, real = [], VQVAE.reestimate

    def reestimate(self, batches, comm):
        batches = list(batches)
        seen.append(torch.cat([rng.index for _, rng in batches]).unique().numel())
        return real(self, batches, comm)

    monkeypatch.setattr(VQVAE, "reestimate", reestimate)
    run_training(tiny(tmp_path, steps=2, optim={"average": 0.9}))
    assert seen == [32]


def test_the_best_has_the_least_mean_error_whatever_the_mean_psnr(tmp_path, monkeypatch):
    planned = iter([{"psnr": 20.0, "mse": 0.1}, {"psnr": 30.0, "mse": 0.2}])
    monkeypatch.setattr(script.ReconstructionMetrics, "compute", lambda self: next(planned))
    assert left(tiny(tmp_path, steps=10, log=EVERY)).facts["best"] == 0.1


def test_without_a_validation_split_the_last_step_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr("stage1_tokenizer.data.base.Source.splits", ("train",))
    end = left(tiny(tmp_path, steps=6, log=EVERY))
    assert end.facts["best"] is None and (tmp_path / "model" / "config.json").exists() and (tmp_path / "reconstructions.png").exists()


# Fine-tuning -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_training(tiny(folder, steps=10))
    return folder


def test_init_starts_from_a_release_codebook_included(tmp_path, trained):
    config = tiny(tmp_path, steps=1, init=str(trained), optim={"lr": 1e-9, "warmup": 0})
    run_training(config)
    first, second = (Tokenizer.from_pretrained(f / "model") for f in (trained, tmp_path))
    torch.testing.assert_close(first.net.encoder[0].weight, second.net.encoder[0].weight, rtol=0, atol=1e-8)
    old, new = first.quantizer.counts, second.quantizer.counts
    assert (new >= 0.9 * old - 1e-5).all() and not torch.equal(new, old)  # one step of the moving averages, no fresh k-means


def test_averages_start_from_the_weights_of_init(tmp_path, trained):
    run_training(tiny(tmp_path, steps=1, init=str(trained), optim={"lr": 1e-9, "warmup": 0, "average": 0.9}))
    first, second = (Tokenizer.from_pretrained(f / "model").net for f in (trained, tmp_path))
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=1e-7)


def test_training_the_decoder_alone_keeps_codes_and_fingerprint(tmp_path, trained):
    config = tiny(tmp_path, steps=10, init=str(trained), train="decoder", optim={"average": 0.9, "weight_decay": 0.1})
    run_training(config)
    before, after = (Tokenizer.from_pretrained(f / "model") for f in (trained, tmp_path))
    assert after.fingerprint == before.fingerprint and after.weights_sha256 != before.weights_sha256
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert {"from_codes.weight", "net.decoder.4.weight"} <= changed and not any("encoder" in n or "quantizer" in n for n in changed)
    assert not any("encoder" in name for name in Left.of(tmp_path).tensors if name.startswith("optimizer/"))


def test_the_decoders_of_a_hierarchy_are_trained_alone_and_its_run_resumes_exactly(tmp_path, monkeypatch):
    run_training(tiny(tmp_path / "first", steps=8, tokenizer=HIERARCHY, optim={"average": 0.9}, log=EVERY))
    config = tiny(tmp_path / "second", steps=8, tokenizer=HIERARCHY, init=str(tmp_path / "first"), train="decoder")
    run_training(config)
    before, after = (Tokenizer.from_pretrained(tmp_path / f / "model") for f in ("first", "second"))
    assert after.fingerprint == before.fingerprint
    changed = {name.split(".")[0] for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {"net", "from_codes", "heads"}
    whole = left(tiny(tmp_path / "whole", steps=12, tokenizer=HIERARCHY, optim={"average": 0.9}))
    stop_at(monkeypatch, 7)
    cut = tiny(tmp_path / "cut", steps=12, tokenizer=HIERARCHY, optim={"average": 0.9})
    with pytest.raises(SystemExit):
        run_training(cut)
    assert left(cut).differences(whole) == []
    figures = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "perplexity/top" in line]
    assert figures and {"perplexity/bottom", "quantization_error/bottom", "restarts/top"} <= figures[-1].keys()


class Blind(Objective):
    """Forgets ``out.prefixes``."""

    def tokenizer_loss(self, out, x, step, rng):
        return (out.x - x).square().mean() + out.loss, {}


def test_an_objective_that_forgets_the_decoders_of_prefixes_is_refused_before_any_weight_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.OBJECTIVES, "build", lambda config: Blind())
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda: run_training(tiny(tmp_path / "run", tokenizer=HIERARCHY)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([line for line in lines if line.startswith("error: parameters heads.0.")]) == 1, lines
    assert not any((tmp_path / "run" / "checkpoints").glob("step-*"))
    run_training(tiny(tmp_path / "none", steps=2, tokenizer=HIERARCHY.replace(prefix_blocks=None)))


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, monkeypatch):
    run_training(tiny(tmp_path, steps=6), max_steps=2)
    begun, config = json.loads((tmp_path / "data.json").read_text()), (tmp_path / "config.yaml").read_text()
    assert begun["train"]["count"] == 50
    real, samples = Toy.split, r"50 train samples \(sha256 \w{8}\)"
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "split", lambda self, name: real(self, name).select(torch.arange(len(real(self, name))).flip(0)))
        with pytest.raises(DataError, match=f"was begun on {samples}, these are {samples}: it goes on with the same data"):
            run_training(tiny(tmp_path, steps=6, workers=3))
    assert (tmp_path / "config.yaml").read_text() == config  # by which encode and evaluate find the data
    run_training(tiny(tmp_path, steps=6))
    assert Left.of(tmp_path).step == 6 and json.loads((tmp_path / "data.json").read_text()) == begun


def test_a_run_that_left_nothing_begins_on_any_data(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("stage1_tokenizer.train.start", lambda *a: pytest.fail("stopped before the first step"))
        with pytest.raises(pytest.fail.Exception):
            run_training(tiny(tmp_path, steps=2))
        assert json.loads((tmp_path / "data.json").read_text())["train"]["count"] == 50
    real = Toy.split
    monkeypatch.setattr(Toy, "split", lambda self, name: real(self, name).select(torch.arange(40)) if name == "train" else real(self, name))
    run_training(tiny(tmp_path, steps=2))
    assert json.loads((tmp_path / "data.json").read_text())["train"]["count"] == 40


def test_a_fine_tuned_run_resumes_without_its_release(tmp_path, trained):
    copy = tmp_path / "copy"
    copy.mkdir()
    os.rename(trained / "model", copy / "model")
    try:
        run_training(tiny(tmp_path / "run", steps=8, init=str(copy)), max_steps=5)
        whole = left(tiny(tmp_path / "whole", steps=8, init=str(copy)))
    finally:
        os.rename(copy / "model", trained / "model")
    assert [n for n in left(tiny(tmp_path / "run", steps=8, init=str(copy))).differences(whole) if n != "metrics"] == []


def test_a_release_of_another_configuration_is_refused_with_both_values(tmp_path, trained):
    other = TOKENIZER.replace(quantizer=TOKENIZER.quantizer.replace(codes=12))
    with pytest.raises(ConfigError, match=r"tokenizer.quantizer.codes: 12, but init \(.*\) was made with 24"):
        run_training(tiny(tmp_path, tokenizer=other, init=str(trained)))
    with pytest.raises(ConfigError, match="train: 'decoder' needs init"):
        tiny(tmp_path).replace(train="decoder")


# The command line ------------------------------------------------------------------------------------------------
def command(monkeypatch, *words: str) -> int:
    """The exit code of the script's main with these arguments."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    try:
        cli.run_main(script.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


CODES = ["--tokenizer.quantizer.codes", "40"]
SMALL = ["--tokenizer.net.widths", "[8, 8]", "--tokenizer.net.blocks", "[0, 0]", "--tokenizer.net.encoder_blocks", "[0, 0]", *CODES]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log": {"patience": 3}}, "log.patience: 3, but nothing is validated: log.validate_every is 0, the splits are train, validation"),
        ({"tokenizer": HIERARCHY, "objective": UNTRAINED}, "tokenizer.prefix_blocks: 1 makes some; use tokenizer.prefix_blocks: null"),
        ({"tokenizer": DEPTHS, "objective": UNTRAINED}, r"tokenizer.prefix_decoders: \[1\] makes some; use .*: \[\]"),
    ],
)
def test_settings_that_do_nothing_are_refused_before_training(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(script, "start", lambda *a: pytest.fail("training has begun"))
    with pytest.raises(ConfigError, match=message):
        run_training(tiny(tmp_path, **changes))


def test_patience_needs_a_validation_split_and_prefixes_without_weight_none(tmp_path, monkeypatch):
    run_training(tiny(tmp_path / "a", steps=2, tokenizer=HIERARCHY.replace(prefix_blocks=None), objective=UNTRAINED))
    run_training(tiny(tmp_path / "b", steps=2, log={"patience": 3, "validate_every": 1}))
    monkeypatch.setattr("stage1_tokenizer.data.base.Source.splits", ("train",))
    with pytest.raises(ConfigError, match="log.patience: 3, .* log.validate_every is 1, the splits are train; expected 0"):
        run_training(tiny(tmp_path / "c", steps=2, log={"patience": 3, "validate_every": 1}))


def test_an_image_that_goes_bad_under_way_can_be_replaced_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    root, draw = tmp_path / "images", torch.Generator().manual_seed(0)
    root.mkdir()
    for i in range(12):
        Image.fromarray(torch.randint(0, 256, (8, 8), generator=draw, dtype=torch.uint8).numpy()).save(root / f"{i:02}.png")
    monkeypatch.setattr(decoded, "DIGEST_SAMPLES", 2)
    words = ["--run", str(tmp_path / "run"), "--data.type", "folder", "--data.root", str(root), "--data.memory", "0", "--device", "cpu"]
    words += [*SMALL, "--steps", "4", "--batch_size", "12", "--log.checkpoint_every", "1", "--data.holdout", "0"]
    assert command(monkeypatch, *words, "--max_steps", "2") == 0
    good = (root / "05.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(script, "same_data", lambda run, source: (root / "05.png").write_bytes(good[:-40]))
        assert command(patch, *words) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "05.png: " in shown and "step 3" in shown and "(replace the file, and the same command goes on)" in shown
    (root / "05.png").write_bytes((root / "00.png").read_bytes())
    assert command(monkeypatch, *words) == 0 and Left.of(tmp_path / "run").step == 4


def test_check_looks_at_the_data_and_dry_run_counts_without_making_a_folder(tmp_path, monkeypatch, capsys):
    run = str(tmp_path / "run")
    assert command(monkeypatch, "--run", run, "--data.type", "toy", *SMALL, "--check") == 0
    out = capsys.readouterr().out
    assert "train: 50 samples" in out and "level codes: 40 codes on a grid of " in out
    assert command(monkeypatch, "--run", run, "--data.type", "toy", *SMALL, "--dry_run", "--optim.average", "0.9") == 0
    out = capsys.readouterr().out
    tokenizer = script.on_meta(tiny(run, tokenizer=TOKENIZER), SOURCES.build(ToyConfig()))
    assert all(p.is_meta for p in tokenizer.parameters()) and "parameters" in out and "bytes per checkpoint" in out
    assert not (tmp_path / "run").exists()
    assert command(monkeypatch, "--run", run, "--data.type", "toy", *SMALL, "--check", "--log.patience=2", "--log.validate_every=0") == 2
    monkeypatch.setenv("RANK", "1")
    for flag in ("--check", "--dry_run"):
        assert command(monkeypatch, "--run", run, "--data.type", "toy", *SMALL, flag) == 0 and capsys.readouterr().out == ""


def test_dry_run_tells_parts_bits_and_prefixes(tmp_path):
    lines = list(script.describe(tiny(tmp_path, tokenizer=HIERARCHY), SOURCES.build(ToyConfig())))
    tokenizer = script.on_meta(tiny(tmp_path, tokenizer=HIERARCHY), SOURCES.build(ToyConfig()))
    assert lines[0].startswith(f"vqvae2: {sum(p.numel() for p in tokenizer.parameters()):,} parameters: net.encoder ")
    assert lines[1:4] == [
        "level top: 12 codes on a grid of 2x2",
        "level bottom: 12 codes on a grid of 4x4",
        "codes: 72 bits per sample, 1.120 per number of the signal",
    ]
    assert lines[4] == "decode alone: top"


def test_the_checkpoint_is_as_large_as_dry_run_says(tmp_path):
    config = tiny(tmp_path, steps=1, optim={"average": 0.9, "warmup": 0})
    said = next(line for line in script.describe(config, SOURCES.build(config.data)) if line.startswith("disk"))
    run_training(config)
    tensors = Left.of(tmp_path).tensors.values()
    assert int(said.split()[1].replace(",", "")) == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer.net.widhts", "[8]"], "tokenizer.net.widhts: unknown key; did you mean 'widths'"),
        (["--batch_size", "0"], "batch_size: Input should be greater than or equal to 1; got 0"),
        (["--data.type", "tyo"], "data: unknown data source 'tyo'; did you mean 'toy'"),
        (["--precision", "fp8"], "precision: Input should be"),
        (["--resume", "nowhere"], "resume: 'nowhere' holds no manifest.json; expected a checkpoint"),
        (["--init", "nowhere"], "init: 'nowhere' is neither a folder nor a Hub id"),
        (["--init", "", "--check"], "init: '' is neither a folder nor a Hub id"),
        (["--batch_size", "1000000000000"], "batch_size: Input should be less than or equal to 16777216"),
        (["--timeout", "1e15"], "timeout: Input should be less than or equal to 100000000"),
        (["--tokenizer.quantizer.dim", "1" + 22 * "0"], "VQVAE: the configuration has a size that no tensor can have"),
    ],
)
def test_d1_mistakes_end_with_exit_code_2_and_one_line(tmp_path, monkeypatch, capsys, words, message):
    assert command(monkeypatch, "--run", str(tmp_path / "run"), "--data.type", "toy", "--device", "cpu", *SMALL, *words) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and "Traceback" not in err and err.count("\n") == 1


def test_a_run_through_the_command_line_leaves_a_folder_that_resumes_and_refuses_another_configuration(tmp_path, monkeypatch, capsys):
    words = ["--run", str(tmp_path), "--data.type", "toy", "--device", "cpu", *SMALL, "--steps", "4", "--batch_size", "8"]
    assert command(monkeypatch, *words, "--max_steps", "2") == 0
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "reconstructions.png"} <= {p.name for p in tmp_path.iterdir()}
    assert command(monkeypatch, *words) == 0 and "at step 2" in capsys.readouterr().err
    assert command(monkeypatch, *words, "--seed", "3") == 2 and "seed: 3, but" in capsys.readouterr().err
    written = script.TokenizerTrainConfig.from_dict(yaml_io.load((tmp_path / "config.yaml").read_text()))
    assert (written.steps, written.batch_size, written.tokenizer.net.widths) == (4, 8, (8, 8))


def test_growth_that_a_run_never_reaches_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    growing = VQConfig(codes=16, dim=4, grow=(2, 8))
    config = tiny(tmp_path / "run", steps=8, tokenizer=TOKENIZER.replace(quantizer=growing))
    said = r"tokenizer.quantizer.grow: \[2, 8\], but steps is 8: some of the 16 codes would never be in use; expected steps below 8"
    with pytest.raises(ConfigError, match=said):
        run_training(config)
    script.check_fit(config.replace(steps=9), Toy(ToyConfig()))
    script.check_fit(config.replace(init="a/release"), Toy(ToyConfig()))  # grown already; its steps stay in the configuration
    deep = HIERARCHY.replace(levels=(HIERARCHY.levels[0], LevelConfig(quantizer=ResidualConfig(stages=2, inner=growing))))
    with pytest.raises(ConfigError, match=r"tokenizer.levels.1.quantizer.inner.grow: \[2, 8\], but steps is 8"):
        script.check_fit(config.replace(tokenizer=deep), Toy(ToyConfig()))


@pytest.mark.parametrize("flag", [[], ["--check"]])
def test_a_run_among_images_is_refused_and_one_at_home_is_made_there(tmp_path, monkeypatch, capsys, flag):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--data.type", "toy", "--device", "cpu", *SMALL, "--steps", "1", "--batch_size", "8", *flag]
    assert command(monkeypatch, "--run", "~/photos", *words) == 2
    found = "holds images in 'cats', but no config.yaml; expected a new or empty folder, or one that this command wrote"
    assert capsys.readouterr().err == f"error: run: {tmp_path}/photos {found}\n"
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cats"]
    assert command(monkeypatch, "--run=~/tok", *words) == 0 and (tmp_path / "tok").exists() is not bool(flag)
