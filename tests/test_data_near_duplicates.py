"""Near neighbours of held-out samples in train: distances against brute force, what the threshold keeps, and the glyphs."""

from __future__ import annotations

import math

import pytest
import torch

from stage1_tokenizer.data import near_duplicates
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import Source, SourceConfig
from stage1_tokenizer.data.bundled import BundledConfig, BundledSource
from stage1_tokenizer.data.near_duplicates import nearest, without_near_duplicates


class Toy(Source):
    """Splits as given, the held-out ones looked at with a threshold."""

    type_name = "toy"

    def __init__(self, near: float | None, **splits: torch.Tensor) -> None:
        super().__init__(SourceConfig.model_construct(holdout=0))
        self.near_duplicates = near
        self._finish({name: ArraySplit(x) for name, x in splits.items()}, ())


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, 6, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("block", [4, 1000])
def test_distances_are_those_of_brute_force_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "BLOCK", block)
    held, train = ArraySplit(draw(9, 0)), ArraySplit(draw(21, 1))
    distance, place = nearest(held, train)
    x, t = (split.batch(torch.arange(len(split)))["x"].double() for split in (held, train))
    for i in range(9):
        apart = [(x[i] - other).norm().item() for other in t]
        spread = (x[i] - x[i].mean((1, 2), keepdim=True)).norm().item()
        assert place[i] == apart.index(min(apart)) and distance[i].item() == pytest.approx(min(apart) / spread, rel=1e-9)


def test_an_equal_is_at_distance_0_and_a_plain_sample_is_near_only_to_its_equal():
    train = draw(8, 0)
    train[3] = 200
    held = torch.cat([train[5:6], torch.full((1, 3, 6, 5), 200, dtype=torch.uint8), torch.full((1, 3, 6, 5), 201, dtype=torch.uint8)])
    distance, place = nearest(ArraySplit(held), ArraySplit(train))
    assert distance.tolist() == [0, 0, math.inf] and place[:2].tolist() == [5, 3]


def test_the_distance_does_not_depend_on_contrast():
    """A pale pair is as far apart as the same pair at full contrast, and white is no near neighbour of either."""
    a, b = draw(2, 0)[:, None].double() / 255
    white = torch.ones_like(a)
    for contrast in (1.0, 0.05):
        pale = [1 - contrast * (1 - v) for v in (a, b)]
        distance, _ = nearest(ArraySplit(pale[0] * 2 - 1), ArraySplit(torch.cat([pale[1]]) * 2 - 1))
        assert distance.item() == pytest.approx(((a - b).norm() / (a - a.mean((2, 3), keepdim=True)).norm()).item(), rel=1e-4)
        assert nearest(ArraySplit(pale[0] * 2 - 1), ArraySplit(white * 2 - 1))[0] >= 1


def test_the_far_ones_are_kept_with_their_captions():
    train, held = draw(10, 0), draw(5, 1)
    held[1], held[4] = train[2], train[7]
    held[4, :, 0, 0] += 1
    source = Toy(0.5, train=train, validation=held)
    source.split("validation").captions = tuple("abcde")
    far = without_near_duplicates(source, "validation")
    assert far is not None and far.captions == ("a", "c", "d") and far.origin.tolist() == [0, 2, 3]


def test_there_is_nothing_to_report_of_train_or_where_the_source_does_not_ask_or_all_are_near():
    x = draw(6, 0)
    assert without_near_duplicates(Toy(0.5, train=x, validation=draw(3, 1)), "train") is None
    assert without_near_duplicates(Toy(None, train=x, validation=draw(3, 1)), "validation") is None
    assert without_near_duplicates(Toy(0.5, train=x, validation=x[:3]), "validation") is None
    assert BundledSource(BundledConfig()).near_duplicates is None


def test_one_held_out_glyph_in_five_has_a_near_neighbour_and_they_are_what_one_would_call_so():
    source = BundledSource(BundledConfig(name="emoji"))
    train, pairs = source.split("train"), {}
    assert train.captions is not None
    for name, kept in (("validation", 149), ("test", 128)):
        split, far = source.split(name), without_near_duplicates(source, name)
        assert far is not None and split.captions is not None and len(far) == kept
        distance, place = nearest(split, train)
        pairs |= {split.captions[i]: train.captions[int(place[i])] for i in (distance <= 0.5).nonzero()[:, 0].tolist()}
    assert pairs["flag of bouvet island"] == "flag of norway" and pairs["woman pilot"] == "pilot"
    assert "hot dog" not in pairs
