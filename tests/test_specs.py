"""The words that the rooms share survive JSON, and refuse what cannot be."""

import json

import pytest
import torch

from intarsia.specs import CodesSpec, Cond, LevelSpec, SignalSpec, TextSpec, TokenizerSpec, to_plain

IMAGE = SignalSpec("image", 1, (28, 28))
TOP, BOTTOM = LevelSpec("top", 512, (7, 7)), LevelSpec("bottom", 240, (14, 14), (8, 6, 5))


@pytest.mark.parametrize(
    "spec",
    [
        IMAGE,
        SignalSpec("audio", 2, (16_000,), 16_000.0),
        SignalSpec("video", 3, (4, 8, 8), 12.5),
        TOP,
        BOTTOM,
        TextSpec("encoder", 384, 77),
        TokenizerSpec(IMAGE, (TOP, BOTTOM), "f" * 64, (1, 2)),
        CodesSpec((TOP,), "f"),
        CodesSpec((TOP, BOTTOM), "f", ("a", "b"), (3, 0), TextSpec("e", 4, 2)),
    ],
)
def test_a_spec_survives_json(spec):
    tree = json.loads(json.dumps(to_plain(spec)))
    assert type(spec).from_dict(tree) == spec and hash(type(spec).from_dict(tree)) == hash(spec)


def test_derived_numbers():
    assert TOP.positions == 49 and TOP.factors == (512,) and BOTTOM.factors == (8, 6, 5)


WRONG = {
    "signal.kind: 'smell'": lambda: SignalSpec("smell", 1, (2, 2)),
    "signal.kind: ['image']": lambda: SignalSpec(["image"], 1, (2, 2)),
    "signal.shape: (28,) has 1 axes, image has 2": lambda: SignalSpec("image", 1, (28,)),
    "signal.shape: 0; expected an integer of at least 1": lambda: SignalSpec("image", 1, (28, 0)),
    "signal.shape: 28; expected a list": lambda: SignalSpec("image", 1, 28),
    "signal.channels: True": lambda: SignalSpec("image", True, (2, 2)),
    "signal.channels: 1.0": lambda: SignalSpec("image", 1.0, (2, 2)),
    "signal.rate: inf": lambda: SignalSpec("audio", 1, (2,), float("inf")),
    "signal: misses shape; expected kind, channels, shape, rate": lambda: SignalSpec.from_dict({"kind": "image", "channels": 1}),
    "signal: unknown key 'colour'": lambda: SignalSpec.from_dict({"kind": "image", "channels": 1, "shape": [2, 2], "colour": 1}),
    "signal: [1]; expected a mapping": lambda: SignalSpec.from_dict([1]),
    "level 'a': shape (); expected at least one axis": lambda: LevelSpec("a", 4, ()),
    "level 'a': vocab: 0": lambda: LevelSpec("a", 0, (2,)),
    "level 'a': vocab: '512'": lambda: LevelSpec("a", "512", (2,)),
    "level 'a': factors (8, 6) make 48 codes, vocab is 240": lambda: LevelSpec("a", 240, (2,), (8, 6)),
    "level.name: 3": lambda: LevelSpec(3, 4, (2,)),
    "tokenizer: levels []": lambda: TokenizerSpec(IMAGE, (), "f", (1,)),
    "tokenizer: levels ['top', 'top']": lambda: TokenizerSpec(IMAGE, (TOP, TOP), "f", (2,)),
    "tokenizer: prefixes (1,); expected rising counts that end with 2": lambda: TokenizerSpec(IMAGE, (TOP, BOTTOM), "f", (1,)),
    "tokenizer: prefixes (2, 1)": lambda: TokenizerSpec(IMAGE, (TOP, BOTTOM), "f", (2, 1)),
    "tokenizer: prefixes (); expected": lambda: TokenizerSpec(IMAGE, (TOP,), "f", ()),
    "codes: fingerprint: None": lambda: CodesSpec((TOP,), None),
    "codes: 2 classes but 1 class counts": lambda: CodesSpec((TOP,), "f", ("a", "b"), (1,)),
    "codes: class_counts: -1": lambda: CodesSpec((TOP,), "f", ("a",), (-1,)),
    "codes: classes: 3": lambda: CodesSpec((TOP,), "f", (3,), (1,)),
    "codes: misses levels": lambda: CodesSpec.from_dict({"fingerprint": "f"}),
    "levels: {}; expected a list": lambda: CodesSpec.from_dict({"levels": {}, "fingerprint": "f"}),
    "level: unknown key 'k'": lambda: CodesSpec.from_dict({"levels": [{"name": "a", "k": 1}], "fingerprint": "f"}),
    "text.dim: 0": lambda: TextSpec("e", 0, 3),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_is_refused_by_name(said):
    with pytest.raises(ValueError) as caught:
        WRONG[said]()
    assert str(caught.value).startswith(said)


def test_a_condition_is_cut_and_moved_as_one():
    cond = Cond(torch.arange(3), torch.ones(3, 2, 4), torch.tensor([[True, False]] * 3))
    two = cond[1:]
    assert two.label.tolist() == [1, 2] and two.text.shape == (2, 2, 4) and two.text_mask.shape == (2, 2)
    assert cond[torch.tensor([2, 2])].label.tolist() == [2, 2]
    half = cond.to("cpu", torch.bfloat16)
    assert half.text.dtype == torch.bfloat16 and half.label.dtype == torch.int64 and half.text_mask.dtype == torch.bool
    moved = cond.to(device="meta")
    assert {moved.label.device.type, moved.text.device.type, moved.text_mask.device.type} == {"meta"}
    assert Cond()[0] == Cond().to("meta") == Cond()
