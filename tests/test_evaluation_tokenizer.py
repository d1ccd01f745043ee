"""stage1_tokenizer.evaluate: figures that do not depend on the number of processes, and pictures of the right things."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from intarsia.cli import UserError
from intarsia.config import ConfigError
from intarsia.files import finite_or_null
from intarsia.specs import SignalSpec
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import Source
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.errors import DataError
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.evaluate import EvaluateConfig, decoded_codes, draw_codebook, evaluate, main, out_folder, report, table
from stage1_tokenizer.metrics import psnr, unit
from tests import tiny_pipelines as tiny


@pytest.fixture
def ladder():
    tiny.register_ladder()
    yield tiny.Ladder(tiny.LadderConfig(), SignalSpec("image", 1, (32, 32)))
    tiny.unregister_ladder()


class Noise(Source):
    """Grey 8 x 8 images; ``validation`` has an odd number of them."""

    type_name = "noise"

    def __init__(self, train=50, validation=21):
        super().__init__(BundledConfig())
        x = torch.randint(0, 256, (train + validation, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        splits = {"train": x[:train], "validation": x[train:]}
        self.signal = SignalSpec("image", 1, (8, 8))
        self._finish({name: ArraySplit(s.numpy(), None, TransformConfig(), torch.arange(len(s))) for name, s in splits.items()}, ())


def test_the_figures_are_those_of_single_images():
    tokenizer, source = tiny.tokenizer(), Noise()
    tree, counts = report(tokenizer, source, "validation")
    x = source.split("validation").batch(torch.arange(21))["x"]
    codes = tokenizer.encode(x)
    single = [psnr(unit(x[i : i + 1]), unit(tokenizer.decode(tokenizer.encode(x[i : i + 1])))).item() for i in range(21)]
    assert tree["reconstruction"]["psnr"] == pytest.approx(sum(single) / 21, abs=1e-9) and tree["reconstruction"]["samples"] == 21
    level = tree["codes"]["validation"][0]
    assert level["codes"] == 21 * 16 and level["used"] == codes[0].unique().numel()
    train = tokenizer.encode(source.split("train").batch(torch.arange(50))["x"])[0]
    assert torch.equal(counts.tallies[0].table, torch.bincount(train.flatten(), minlength=16))
    assert tree["codes"]["train"][0]["codes"] == 800 and tree["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    text = table(tree)
    assert f"21 validation samples: PSNR {tree['reconstruction']['psnr']:.2f} dB (mean per sample)" in text
    assert "train codes, level codes:" in text and "of 64.0 bits per sample" in text


def test_the_figures_without_near_duplicates_are_those_of_the_images_that_are_left(monkeypatch):
    tokenizer, source, rows = tiny.tokenizer(), Noise(), torch.tensor([2, 5, 11])
    monkeypatch.setattr("stage1_tokenizer.evaluate.without_near_duplicates", lambda source, split: source.split(split).select(rows))
    tree, _ = report(tokenizer, source, "validation")
    x = source.split("validation").batch(rows)["x"]
    found = tree["reconstruction_without_near_duplicates"]
    assert found["samples"] == 3 and tree["reconstruction"]["samples"] == 21
    assert found["psnr"] == pytest.approx(psnr(unit(x), unit(tokenizer.decode(tokenizer.encode(x)))).mean().item(), abs=1e-9)


def test_large_signals_are_taken_a_few_at_a_time_and_give_the_same_figures(monkeypatch, ladder):
    split = ArraySplit(torch.randint(0, 256, (70, 1, 32, 32)).to(torch.uint8).numpy(), None, TransformConfig(), torch.arange(70))
    whole = evaluate(ladder, split)
    taken = []
    batch = ArraySplit.batch
    monkeypatch.setattr(ArraySplit, "batch", lambda self, rows, *given: taken.append(len(rows)) or batch(self, rows, *given))
    monkeypatch.setattr("stage1_tokenizer.sizes.NUMBERS_AT_ONCE", 40 * 32 * 32)
    parts = evaluate(ladder, split)
    assert taken == [32, 32, 32, 32, 6, 6], "each with the samples that it swaps codes with"
    assert parts.reconstruction.compute() == pytest.approx(whole.reconstruction.compute(), rel=1e-12)
    assert parts.codes.compute() == whole.codes.compute()
    quality, codes = whole.reconstruction.compute()["psnr"], whole.codes.compute()
    for some, all_ in zip(parts.levels.compute(quality, codes), whole.levels.compute(quality, codes), strict=True):
        assert [each.psnr for each in some] == pytest.approx([each.psnr for each in all_], rel=1e-12)


def test_the_same_split_twice_is_counted_once():
    tokenizer, source = tiny.tokenizer(), Noise()
    tree, counts = report(tokenizer, source, "train")
    assert set(tree["codes"]) == {"train"} and int(counts.tallies[0].table.sum()) == 800


def test_two_processes_give_the_figures_of_one(ranks):
    tokenizer, source = tiny.tokenizer(), Noise()
    alone, counts = report(tokenizer, source, "validation")

    def work(rank):
        tree, counted = report(tokenizer, source, "validation")
        return tree, [tally.table for tally in counted.tallies]

    for tree, theirs in ranks(work):
        assert tree["reconstruction"] == pytest.approx(alone["reconstruction"], rel=1e-12)
        assert tree["codes"] == alone["codes"] and torch.equal(theirs[0], counts.tallies[0].table)


def test_more_processes_than_samples_are_enough(ranks):
    tokenizer, split = tiny.tokenizer(), Noise(validation=1).split("validation")
    alone = evaluate(tokenizer, split).reconstruction.compute()
    assert ranks(lambda rank: evaluate(tokenizer, split).reconstruction.compute()) == [alone, alone]


def test_codes_are_drawn_by_falling_frequency_on_a_grid_of_their_own():
    tokenizer = tiny.tokenizer()
    counts = torch.arange(16) % 7
    tiles = decoded_codes(tokenizer, [counts], 0)
    order = counts.argsort(descending=True, stable=True)
    assert tiles.shape == (16, 1, 8, 8) and order[:2].tolist() == [6, 13]
    for place in (0, 5, 15):
        assert torch.equal(tiles[place], unit(tokenizer.decode([order[place].expand(1, 4, 4).contiguous()]))[0])
    assert torch.equal(decoded_codes(tokenizer, [counts], 0, limit=3), tiles[:3])


def test_a_code_of_one_level_is_drawn_with_the_others_at_their_most_frequent(ladder):
    tokenizer = ladder
    counts = [torch.tensor([1, 0, 5, 2, 2]), torch.tensor([0, 1, 2, 9, 4, 5, 6])]
    bottom = decoded_codes(tokenizer, counts, 1)
    assert bottom.shape == (7, 1, 8, 8)
    expected = unit(tokenizer.top[2] + tokenizer.bottom[3])  # top's favourite, and the most frequent bottom code
    assert torch.allclose(bottom[0], expected.expand(1, 8, 8))
    assert decoded_codes(tokenizer, counts, 0).shape == (5, 1, 8, 8)


def test_a_row_of_tokens_over_an_image_has_its_usage_drawn_and_no_pictures_of_codes(tmp_path, ladder):
    tokenizer = tiny.Tokens(tiny.TokensConfig(), SignalSpec("image", 1, (8, 8)))
    found = evaluate(tokenizer, Noise().split("validation"))
    draw_codebook(tmp_path / "codebook.png", tokenizer, found.codes)
    assert Image.open(tmp_path / "codebook.png").width > 100


def test_data_of_another_geometry_are_refused():
    source = Noise()
    source.signal = SignalSpec("image", 3, (8, 8))
    with pytest.raises(ValueError, match=r"data: the signals are .*channels=3.*; the tokenizer takes .*channels=1"):
        report(tiny.tokenizer(), source, "validation")


def test_infinite_figures_become_null_in_json():
    tree = finite_or_null({"psnr": float("inf"), "list": (1.5, float("nan")), "name": "x", "n": 3})
    assert tree == {"psnr": None, "list": [1.5, None], "name": "x", "n": 3}


def write_idx(path, array):
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.tobytes())


def test_the_command_writes_figures_and_pictures_into_the_run_folder(tmp_path, capsys):
    run = tmp_path / "run"
    tiny.tokenizer().save_pretrained(run / "model")
    source = Noise()
    for name, split in (("train", "train"), ("t10k", "validation")):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", source.split(split).x[:, 0].numpy())
    (run / "config.yaml").write_text(f"data: {{type: idx, root: {tmp_path}, train_labels: '', test_labels: '', holdout: 10}}\n")
    main(["--tokenizer", str(run), "--split", "test", "--device", "cpu", "--pictures", "5"])
    out = run / "evaluation" / "test"
    tree = json.loads((out / "evaluation.json").read_text())
    assert tree["reconstruction"]["samples"] == 21 and tree["split"] == "test" and "ssim" not in tree["reconstruction"]
    assert "21 test samples: PSNR" in capsys.readouterr().out
    for name in ("reconstructions.png", "codebook.png"):
        assert Image.open(out / name).width > 100


def test_a_release_without_a_run_needs_to_be_told_where_to_write_and_what_the_data_are(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "release")
    with pytest.raises(ConfigError, match="out: .* is no run folder; say where to write"):
        out_folder(EvaluateConfig(tokenizer=str(tmp_path / "release")))
    with pytest.raises(ConfigError, match=r"data: .* has no config.yaml of a run; say --data.type"):
        main(["--tokenizer", str(tmp_path / "release"), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="an evaluation has no steps"):
        main(["--tokenizer", str(tmp_path / "release"), "--max_steps", "3"])


def test_check_refuses_what_the_evaluation_would_refuse_before_its_work(tmp_path):
    run = tmp_path / "run"
    tiny.tokenizer().save_pretrained(run / "model")
    for name, split in (("train", "train"), ("t10k", "validation")):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", Noise().split(split).x[:, 0].numpy())
    (run / "config.yaml").write_text(f"data: {{type: idx, root: {tmp_path}, train_labels: '', test_labels: '', holdout: 10}}\n")
    words = ["--tokenizer", str(run), "--split", "test", "--device", "cpu", "--check"]
    main(words)
    with pytest.raises(ValueError, match="data: the signals are .*; the tokenizer takes .*"):
        main([*words, "--data.transform.size", "4"])
    with pytest.raises(DataError, match="no split 'validation'"):
        main([*words, "--data.holdout", "0", "--split", "validation"])
    for out, reason in ((run / "config.yaml", "is"), (run / "config.yaml/deep/er", "lies below")):
        with pytest.raises(UserError, match=f"^out: .*config.yaml.* {reason} a file; expected a folder"):
            main([*words, "--out", str(out)])
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "model"]
