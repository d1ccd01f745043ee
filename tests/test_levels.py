"""What each level is worth: prefixes alone and swapped codes, equal to a plain computation and to that of several processes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from intarsia.specs import SignalSpec
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import Source
from stage1_tokenizer.data.bundled import BundledConfig
from stage1_tokenizer.data.transform import TransformConfig
from stage1_tokenizer.evaluate import draw_reconstructions, draw_swapped, report, table
from stage1_tokenizer.levels import partners, prefix_names, prefix_rows, swapped, swapped_rows
from stage1_tokenizer.metrics import psnr, unit
from tests import tiny_pipelines as tiny


@pytest.fixture
def ladder():
    tiny.register_ladder()
    yield tiny.Ladder(tiny.LadderConfig(), SignalSpec("image", 1, (16, 16)))
    tiny.unregister_ladder()


class Blocks(Source):
    """Grey 16 x 16 images of 4 x 4 blocks with a little noise."""

    type_name = "blocks"

    def __init__(self, validation: int = 21) -> None:
        super().__init__(BundledConfig())
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(20, 230, (10 + validation, 1, 4, 4), generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
        x = (x + torch.randint(-20, 21, x.shape, generator=generator)).to(torch.uint8)
        splits = {"train": x[:10], "validation": x[10:]}
        self.signal = SignalSpec("image", 1, (16, 16))
        self._finish({name: ArraySplit(s.numpy(), None, TransformConfig(), torch.arange(len(s))) for name, s in splits.items()}, ())


@pytest.mark.parametrize("n", [2, 3, 21, 256])
def test_every_sample_swaps_with_another_one_and_each_gives_once(n):
    rows = torch.arange(n)
    found = partners(rows, n)
    assert (found != rows).all() and torch.equal(found.sort().values, rows)
    assert torch.equal(partners(rows[1:2], n), found[1:2])


def test_the_figures_are_those_of_single_images(ladder):
    source = Blocks()
    tree, _ = report(ladder, source, "validation")
    x = source.split("validation").batch(torch.arange(21))["x"]
    codes = ladder.encode(x)

    def quality(*levels):
        return psnr(unit(x), unit(ladder.decode(list(levels)))).mean().item()

    whole = tree["reconstruction"]["psnr"]
    assert whole == pytest.approx(quality(*codes), abs=1e-9)
    (prefix,) = tree["prefixes"]
    assert prefix["levels"] == 1 and prefix["names"] == ("top",) and prefix["psnr"] == pytest.approx(quality(codes[0]), abs=1e-9)
    assert prefix["ssim"] is not None and prefix["psnr"] < whole - 1
    usage = tree["codes"]["validation"][0]
    assert prefix["bits_per_image"] == usage["bits_per_image"] and prefix["nominal_bits_per_image"] == usage["nominal_bits_per_image"]
    other = [torch.stack([c[(i + 10) % 21] for i in range(21)]) for c in codes]
    expected = {"top": quality(other[0], codes[1]), "bottom": quality(codes[0], other[1])}
    assert [swap["name"] for swap in tree["swaps"]] == ["top", "bottom"]
    for swap in tree["swaps"]:
        assert swap["psnr"] == pytest.approx(expected[swap["name"]], abs=1e-9)
        assert swap["cost_db"] == pytest.approx(whole - swap["psnr"]) and swap["cost_db"] > 1
    text = table(tree)
    assert f"top alone: PSNR {prefix['psnr']:.2f} dB" in text and "another sample's bottom codes: PSNR" in text


def test_a_level_that_carries_nothing_costs_nothing(ladder):
    with torch.no_grad():
        ladder.bottom.zero_()
    tree, _ = report(ladder, Blocks(), "validation")
    assert tree["swaps"][1]["cost_db"] == 0 and tree["swaps"][0]["cost_db"] > 1
    assert tree["prefixes"][0]["psnr"] == tree["reconstruction"]["psnr"]


def test_two_processes_give_the_figures_of_one(ladder, ranks):
    source = Blocks()
    alone, _ = report(ladder, source, "validation")
    for tree in ranks(lambda rank: report(ladder, source, "validation")[0]):
        for kind in ("prefixes", "swaps"):
            for mine, theirs in zip(alone[kind], tree[kind], strict=True):
                assert mine.keys() == theirs.keys()
                assert all(theirs[key] == (pytest.approx(v, rel=1e-12) if isinstance(v, float) else v) for key, v in mine.items())


def test_one_sample_swaps_with_nobody_and_one_level_has_neither_figure(ladder, ranks):
    source = Blocks(validation=1)
    assert report(ladder, source, "validation")[0]["swaps"] == []
    assert [len(tree["prefixes"]) for tree in ranks(lambda rank: report(ladder, source, "validation")[0])] == [1, 1]
    single = tiny.tokenizer()
    tokens = single.encode(torch.zeros(2, 1, 8, 8))
    assert prefix_names(single) == {} == prefix_rows(single, tokens) == swapped_rows(single, tokens, tokens)


def test_depths_of_a_residual_quantiser_are_levels_too():
    from stage1_tokenizer.nets.conv import ConvConfig
    from stage1_tokenizer.quantizers.residual import ResidualConfig
    from stage1_tokenizer.quantizers.vq import VQConfig
    from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    kind = ResidualConfig(stages=3, dropout=0.5, inner=VQConfig(codes=8, dim=4, init="normal"))
    net = ConvConfig(widths=(4, 8), blocks=(0, 0), encoder_blocks=None)
    tokenizer = VQVAE(VQVAEConfig(net=net, quantizer=kind), Blocks().signal).eval()
    tree, _ = report(tokenizer, Blocks(), "validation")
    assert [prefix["names"] for prefix in tree["prefixes"]] == [("codes/0",), ("codes/0", "codes/1")]
    assert [swap["name"] for swap in tree["swaps"]] == ["codes/0", "codes/1", "codes/2"]


def test_pictures_show_each_prefix_and_each_swap(ladder, tmp_path):
    split = Blocks().split("validation")
    x = split.batch(torch.arange(4))["x"]
    codes = ladder.encode(x)
    rows = prefix_rows(ladder, codes)
    assert list(rows) == ["top"] and torch.equal(rows["top"], unit(ladder.decode(codes[:1])))
    others = [c.roll(1, 0) for c in codes]
    rows = swapped_rows(ladder, codes, others)
    assert list(rows) == ["other top", "other bottom"]
    assert torch.equal(rows["other bottom"], unit(ladder.decode([codes[0], others[1]])))
    assert [torch.equal(a, b) for a, b in zip(swapped(codes, others, 0), others, strict=True)] == [True, False]
    draw_reconstructions(tmp_path / "reconstructions.png", ladder, split, 5)
    draw_swapped(tmp_path / "swapped.png", ladder, split, 5)
    three, four = (Image.open(tmp_path / name).height for name in ("reconstructions.png", "swapped.png"))
    assert four > three > 100  # four rows of tiles, and three


def test_the_command_writes_them(ladder, tmp_path, capsys):
    from stage1_tokenizer.evaluate import main
    from tests.test_evaluation_tokenizer import write_idx

    ladder.save_pretrained(tmp_path / "model")
    for name, split in (("train", "train"), ("t10k", "validation")):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", Blocks().split(split).x[:, 0].numpy())
    data = ["--data.type", "idx", "--data.root", str(tmp_path), "--data.train_labels", "", "--data.test_labels", "", "--data.holdout", "3"]
    main(["--tokenizer", str(tmp_path / "model"), *data, "--out", str(tmp_path / "out"), "--split", "test", "--device", "cpu"])
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [prefix["names"] for prefix in tree["prefixes"]] == [["top"]] and len(tree["swaps"]) == 2
    assert {"swapped.png", "reconstructions.png", "codebook.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert "top alone: PSNR" in capsys.readouterr().out
