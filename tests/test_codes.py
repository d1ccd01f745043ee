"""Codes on disk: what was written comes back, one process and two write the same bytes, and every kind of damage has its one line."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from intarsia.cli import UserError
from intarsia.codes import CodesDataset, CodesError, CodesWriter, SplitPlan, check_match, read_manifest, write_codes
from intarsia.distributed import Comm, comm
from intarsia.rng import bits
from intarsia.specs import CodesSpec, LevelSpec, SignalSpec, TokenizerSpec

SIGNAL = SignalSpec("image", 1, (28, 28))
TOKENIZER = {"type": "vqvae", "fingerprint": "f" * 64}
TOP, BOTTOM = LevelSpec("top", 16, (2, 3)), LevelSpec("bottom", 512, (4, 6))
CLASSES = ("cat", "dog", "eel")


def draw(n: int, level: LevelSpec, seed: int = 0) -> Tensor:
    """(n, *shape) codes in [0, vocab)."""
    random = bits(seed, level.name, torch.arange(n)[:, None], 0, torch.arange(level.positions)[None])
    return (random % level.vocab).view(n, *level.shape)


def labels(n: int) -> Tensor:
    return torch.arange(n) * 7 % 5 % 3


def split(n: int, levels: tuple[LevelSpec, ...], labelled: bool = True) -> tuple[list[Tensor], Tensor | None]:
    return [draw(n, level) for level in levels], labels(n) if labelled else None


def written(folder: Path, levels: tuple[LevelSpec, ...] = (TOP, BOTTOM), **options: Any) -> Path:
    splits = {"train": split(50, levels), "validation": split(20, levels)}
    write_codes(folder, splits, levels, signal=SIGNAL, tokenizer=TOKENIZER, classes=CLASSES, shard_rows=16, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process leaves behind when it dies does not depend on fsync; only a power cut would tell."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# What was written comes back -------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2, 4)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize(("vocab", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_codes_of_any_grid_and_vocabulary_come_back(tmp_path: Path, shape: tuple[int, ...], vocab: int, dtype: str) -> None:
    level = LevelSpec("codes", vocab, shape)
    codes = draw(9, level)
    codes.view(-1)[:2] = torch.tensor([0, vocab - 1])
    write_codes(tmp_path / "codes", {"train": ([codes], None)}, [level], signal=SIGNAL, tokenizer=TOKENIZER, shard_rows=4)
    data = CodesDataset(tmp_path / "codes", "train")
    batch = data.batch(torch.tensor([8, 0, 3, 3]))
    assert data.codes[0].dtype == np.dtype(dtype) and data.codes[0].shape == (9, math.prod(shape))
    assert batch["codes"][0].dtype == torch.int64
    assert torch.equal(batch["codes"][0], codes[[8, 0, 3, 3]])


def test_several_levels_labels_and_indices_come_back(tmp_path: Path) -> None:
    data = CodesDataset(written(tmp_path / "codes"), "train")
    codes, label = split(50, (TOP, BOTTOM))
    rows = torch.tensor([49, 1, 16, 15])
    batch = data.batch(rows)
    assert len(data) == 50
    assert all(torch.equal(found, wanted[rows]) for found, wanted in zip(batch["codes"], codes, strict=True))
    assert label is not None and torch.equal(batch["label"], label[rows])
    assert torch.equal(batch["index"], rows)
    assert np.array_equal(data.index, np.arange(50)) and not data.view.any()


def test_datasets_reads_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = written(tmp_path / "codes")
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "validation"}
    ours = CodesDataset(folder, "validation")
    assert np.array_equal(np.array(found["validation"]["codes_1"]), ours.codes[1])
    assert found["validation"]["label"] == ours.label.tolist()


def test_the_spec_tells_a_prior_levels_classes_and_training_frequencies(tmp_path: Path) -> None:
    spec = CodesDataset(written(tmp_path / "codes"), "validation").spec
    counts = torch.bincount(labels(50), minlength=3).tolist()
    assert spec == CodesSpec((TOP, BOTTOM), "f" * 64, CLASSES, tuple(counts))


def test_unlabelled_codes_have_no_labels(tmp_path: Path) -> None:
    splits = {"train": split(5, (TOP,), labelled=False)}
    write_codes(tmp_path / "codes", splits, [TOP], signal=SIGNAL, tokenizer=TOKENIZER)
    data = CodesDataset(tmp_path / "codes", "train")
    assert data.label is None and data.batch(torch.arange(2))["label"] is None and data.spec.classes == ()
    assert "label" not in pq.read_table(tmp_path / "codes/train/00000.parquet").column_names


def test_captions_come_back_in_order(tmp_path: Path) -> None:
    plan = {"train": SplitPlan(3, captioned=True)}
    writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits=plan, shard_rows=2)
    for shard in writer.mine():
        writer.write_shard(shard, [draw(3, TOP)[shard.start : shard.stop]], caption=["a", "ü", ""][shard.start : shard.stop])
    writer.close()
    assert CodesDataset(tmp_path / "codes", "train").caption == ["a", "ü", ""]


def test_views_make_index_and_view_a_permutation_and_classes_are_counted_once(tmp_path: Path) -> None:
    codes = draw(15, TOP)
    plan = {"train": SplitPlan(5, views=3, labelled=True)}
    writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits=plan, classes=CLASSES, shard_rows=4)
    for shard in writer.mine():
        index, _ = shard.rows(5)
        writer.write_shard(shard, [codes[shard.start : shard.stop]], torch.from_numpy(index) % 3)
    manifest = writer.close()
    data = CodesDataset(tmp_path / "codes", "train")
    assert sorted(zip(data.index.tolist(), data.view.tolist(), strict=True)) == [(i, v) for i in range(5) for v in range(3)]
    assert manifest.spec.class_counts == (2, 2, 1)
    assert torch.equal(data.batch(torch.tensor([4, 5]))["codes"][0], codes[4:6])


def test_usage_and_perplexity_are_those_of_a_histogram(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path / "codes"))
    for number, level in enumerate((TOP, BOTTOM)):
        values = draw(50, level).flatten().tolist()
        frequencies = [values.count(v) / len(values) for v in set(values)]
        assert manifest.split("train").usage[number] == len(set(values))
        assert manifest.split("train").perplexity[number] == pytest.approx(math.exp(-sum(p * math.log(p) for p in frequencies)), rel=1e-5)


# Many processes, kills, order of writing ------------------------------------------------------------------------------
def dump(folder: Path, comm: Comm = comm, stop_after: int | None = None, **changes: Any) -> None:
    """Codes of two splits, shard by shard, as a script writes them; gives up after ``stop_after`` shards."""
    plan = {"train": SplitPlan(30, views=2, labelled=True), "test": SplitPlan(11, labelled=True)}
    options = {"signal": SIGNAL, "tokenizer": TOKENIZER, "splits": plan, "classes": CLASSES, "shard_rows": 8} | changes
    writer = CodesWriter(folder, [TOP, BOTTOM], comm=comm, **options)
    for number, shard in enumerate(writer.mine()):
        if number == stop_after:
            return
        rows = slice(shard.start, shard.stop)
        writer.write_shard(shard, [draw(60, TOP)[rows], draw(60, BOTTOM)[rows]], labels(60)[rows])
    writer.close()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_bytes_of_one(tmp_path: Path, ranks: Callable[..., list[Any]], world: int) -> None:
    dump(tmp_path / "one")

    def many(rank: int) -> int:
        dump(tmp_path / "many")
        return comm.world_size

    assert ranks(many, world) == [world] * world
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_shards_are_dealt_to_ranks_so_that_each_is_written_once(tmp_path: Path, ranks: Callable[..., list[Any]]) -> None:
    def mine(rank: int) -> list[str]:
        writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(10)}, shard_rows=2)
        return [shard.file for shard in writer.mine()]

    first, second = ranks(mine)
    assert len(first) == 3 and len(second) == 2
    assert sorted(first + second) == [f"train/{i:05d}.parquet" for i in range(5)]


def test_nothing_differs_between_two_dumps_of_the_same(tmp_path: Path) -> None:
    dump(tmp_path / "a")
    dump(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_a_dump_that_was_given_up_is_completed_to_the_same_bytes(tmp_path: Path, done: int) -> None:
    dump(tmp_path / "whole")
    dump(tmp_path / "codes", stop_after=done)
    with pytest.raises(CodesError, match=r"codes\.json: is missing: the dump of codes is incomplete"):
        CodesDataset(tmp_path / "codes", "train")
    kept = {name: (tmp_path / "codes" / name).stat().st_mtime_ns for name in contents(tmp_path / "codes") if name.endswith("parquet")}
    dump(tmp_path / "codes")
    assert len(kept) == done and all((tmp_path / "codes" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted", "facts"])
def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path, damage: str) -> None:
    dump(tmp_path / "whole")
    dump(tmp_path / "codes", stop_after=3)
    path = tmp_path / "codes/train/00001.parquet"
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "facts":
        (tmp_path / "codes/.dump/train-00001.facts.json").write_text("{")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    dump(tmp_path / "codes")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_killed_dump_left_to_do_is_shared_by_all_ranks(tmp_path: Path, ranks: Callable[..., list[Any]], world: int) -> None:
    dump(tmp_path / "codes", stop_after=9)
    facts = sorted((tmp_path / "codes/.dump").glob("train-*.facts.json"))
    for path in facts[::world]:  # what one rank of a new dump would write
        path.unlink()

    def rest(rank: int) -> list[str]:
        plan = {"train": SplitPlan(30, views=2, labelled=True), "test": SplitPlan(11, labelled=True)}
        options = {"signal": SIGNAL, "tokenizer": TOKENIZER, "splits": plan, "classes": CLASSES, "shard_rows": 8}
        left = [shard.file for shard in CodesWriter(tmp_path / "codes", [TOP, BOTTOM], **options).mine()]
        comm.barrier()
        return left

    dealt = ranks(rest, world)
    unfinished = {f"train/{p.name[6:11]}.parquet" for p in facts if not p.exists()} | {"test/00001.parquet"}
    assert sorted(itertools.chain(*dealt)) == sorted(unfinished)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": TOKENIZER | {"fingerprint": "0"}}, f"another tokenizer: tokenizer.fingerprint is '0' there and '{'f' * 64}' here"),
        ({"shard_rows": 4}, "something else: shard_rows is 4 there and 8 here"),
        ({"data": {"name": "other"}}, "something else: data.name is 'other' there and None here"),
    ],
    ids=["tokenizer", "rows", "data"],
)
def test_an_unfinished_dump_of_something_else_is_kept_and_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    dump(tmp_path / "codes", stop_after=3, **changes)
    before = {name: content for name, content in contents(tmp_path / "codes").items() if name.endswith("parquet")}
    for _ in range(2):  # the folder is not held in use either
        with pytest.raises(CodesError, match=f"codes holds an unfinished dump of {message}; delete .*codes, or choose another") as error:
            dump(tmp_path / "codes")
    assert "\n" not in str(error.value) and len(before) == 3
    assert {name: content for name, content in contents(tmp_path / "codes").items() if name.endswith("parquet")} == before
    dump(tmp_path / "codes", **changes)


@pytest.mark.parametrize("plan", [None, "{", "[]"])
def test_shards_whose_plan_is_lost_are_kept_and_the_folder_is_named(tmp_path: Path, plan: str | None) -> None:
    dump(tmp_path / "codes", stop_after=1)
    (tmp_path / "codes/.dump/plan.json").unlink() if plan is None else (tmp_path / "codes/.dump/plan.json").write_text(plan)
    with pytest.raises(CodesError, match=r"codes holds an unfinished dump.*; delete .*codes, or choose another folder"):
        dump(tmp_path / "codes")
    assert (tmp_path / "codes/train/00000.parquet").exists()


def test_an_unfinished_dump_of_something_else_is_replaced_where_no_shard_is_finished(tmp_path: Path) -> None:
    dump(tmp_path / "whole")
    dump(tmp_path / "codes", stop_after=0, splits={"train": SplitPlan(30, labelled=True), "validation": SplitPlan(11, labelled=True)})
    (tmp_path / "codes/validation/00000.parquet").write_bytes(b"killed before its facts")
    (tmp_path / "codes/train/.tmp-1-00000.parquet").write_bytes(b"torn")
    dump(tmp_path / "codes")
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


def test_an_interrupted_dump_of_many_classes_goes_on(tmp_path: Path) -> None:
    names = tuple(f"{i:06d}" + "long" * 30 for i in range(10_000))  # more than a megabyte of plan
    dump(tmp_path / "codes", stop_after=9, classes=names)
    (first, *_) = sorted((tmp_path / "codes").glob("*/*.parquet"))
    written = first.stat().st_mtime_ns
    dump(tmp_path / "codes", classes=names)
    assert first.stat().st_mtime_ns == written


def test_a_complete_dump_is_left_as_it_is(tmp_path: Path) -> None:
    dump(tmp_path / "codes")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").rglob("*")}
    dump(tmp_path / "codes")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "codes").rglob("*")} == before


def test_a_complete_dump_that_was_damaged_since_is_not_called_complete(tmp_path: Path) -> None:
    dump(tmp_path / "codes")
    (tmp_path / "codes/train/00002.parquet").unlink()
    with pytest.raises(CodesError, match=r"00002\.parquet: the shard is missing"):
        dump(tmp_path / "codes")


def test_a3_the_manifest_is_renamed_after_every_shard_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"rename {Path(b).name}"), replace(a, b))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    dump(tmp_path / "codes")
    names = [call.split()[1] for call in calls if call != "fsync"]
    assert names[0] == "plan.json" and names[-1] == "codes.json" and names.count("codes.json") == 1
    assert len([n for n in names if n.endswith("parquet")]) == 10
    for number, call in enumerate(calls):
        if call != "fsync":
            assert calls[number - 1] == "fsync" and calls[number + 1] == "fsync", "a rename stands between fsyncs of file and folder"


def test_two_dumps_into_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(4)})
    pid = os.fork()
    if pid == 0:
        try:
            CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(4)})
        except UserError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with pytest.raises(UserError, match=r"^out: .*codes/\.dump is in use by this process"):
        CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(4)})
    assert writer.mine()


def test_codes_in_memory_outlive_their_files(tmp_path: Path) -> None:
    data = CodesDataset(written(tmp_path / "codes"), "train")
    before = [c.copy() for c in data.codes]
    for path in (tmp_path / "codes/train").iterdir():
        with path.open("r+b") as file:
            file.truncate(10)
    assert all(np.array_equal(a, b) for a, b in zip(before, data.codes, strict=True))


# Wrong is an error where it happens ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": TOKENIZER | {"fingerprint": "0" * 64}},
            f"another tokenizer: tokenizer.fingerprint is '{'f' * 64}' there and '{'0' * 64}' here",
        ),
        ({"data": {"name": "other"}}, r"something else: data.name is None there and 'other' here"),
        ({"shard_rows": 4}, r"shard_rows is 8 there and 4 here"),
        ({"splits": {"train": SplitPlan(30, labelled=True)}}, r"splits.test is .* there and None here"),
    ],
    ids=["tokenizer", "data", "rows", "splits"],
)
def test_a_complete_dump_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    dump(tmp_path / "codes")
    before = contents(tmp_path / "codes")
    with pytest.raises(CodesError, match=message) as error:
        dump(tmp_path / "codes", **changes)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "codes") == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/thesis.txt").write_text("mine")
    with pytest.raises(CodesError, match="holds 'thesis.txt', but no codes.json"):
        dump(tmp_path / "codes")
    with pytest.raises(CodesError, match="is a file"):
        dump(tmp_path / "codes/thesis.txt")
    with pytest.raises(CodesError, match=r"out: .*thesis\.txt/codes lies below a file; expected a folder"):
        dump(tmp_path / "codes/thesis.txt/codes")


@pytest.mark.parametrize(
    ("codes", "label", "message"),
    [
        ([torch.full((4, 2, 3), 16)], None, r"level 'top': values in \[16, 16\]; expected \[0, 15\]"),
        ([torch.full((4, 2, 3), -1)], None, r"level 'top': values in \[-1, -1\]; expected \[0, 15\]"),
        ([torch.zeros(4, 3, 2, dtype=torch.int64)], None, r"shape \(4, 3, 2\); expected \(4, 2, 3\)"),
        ([torch.zeros(4, 2, 3)], None, "dtype torch.float32; expected integers"),
        ([], None, "codes of 0 levels; expected 1"),
        ([torch.zeros(4, 2, 3, dtype=torch.int64)], torch.zeros(4, dtype=torch.int64), "label is given, but was not planned"),
    ],
)
def test_the_writer_refuses_wrong_codes(tmp_path: Path, codes: list[Tensor], label: Tensor | None, message: str) -> None:
    writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(4)})
    with pytest.raises(CodesError, match=message):
        writer.write_shard(writer.mine()[0], codes, label)


def test_closing_an_incomplete_dump_names_the_missing_shard(tmp_path: Path) -> None:
    writer = CodesWriter(tmp_path / "codes", [TOP], signal=SIGNAL, tokenizer=TOKENIZER, splits={"train": SplitPlan(4)})
    with pytest.raises(CodesError, match=r"train/00000\.parquet: the shard was not written"):
        writer.close()


@pytest.mark.parametrize("indices", [[50], [-1], [0, 1 << 40]])
def test_rows_outside_the_split_are_refused(tmp_path: Path, indices: list[int]) -> None:
    data = CodesDataset(written(tmp_path / "codes"), "train")
    with pytest.raises(IndexError, match=r"expected \[0, 49\]"):
        data.batch(torch.tensor(indices))


# Damage ---------------------------------------------------------------------------------------------------------------
def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "codes.json").read_text())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes ``codes.json``."""
    tree = manifest_of(folder)
    change(tree)
    (folder / "codes.json").write_text(json.dumps(tree))


def forge(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes shard 1 of train and its sha256 with it, so that only what it holds is wrong."""
    path = folder / "train/00001.parquet"
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(path)), sink)
    path.write_bytes(sink.getvalue())
    sha = hashlib.sha256(sink.getvalue()).hexdigest()
    edit(folder, lambda tree: tree["splits"][0]["shards"][1].update(sha256=sha))


def column(name: str, values: Callable[[list[Any]], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, values(table[name].to_pylist()))

    return change


def lists(dtype: pa.DataType, last: float, length: int = 24) -> Callable[[list[Any]], pa.Array]:
    """16 rows of ``length`` ones, with ``last`` in the end, as fixed-length lists."""
    return lambda _: pa.FixedSizeListArray.from_arrays(pa.array([1] * (16 * length - 1) + [last], dtype), length)


def numbers(*last: int, dtype: pa.DataType | None = None) -> Callable[[list[Any]], pa.Array]:
    return lambda old: pa.array(old[: len(old) - len(last)] + list(last), dtype or pa.int64())


def listed(**change: Any) -> Callable[[Path], Any]:
    """Changes the train split's entry in ``codes.json``."""
    return lambda folder: edit(folder, lambda tree: tree["splits"][0].update(change))


def in_manifest(**change: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, lambda tree: tree.update(change))


def forged(name: str, values: Callable[[list[Any]], pa.Array]) -> Callable[[Path], Any]:
    return lambda folder: forge(folder, column(name, values))


def no_parquet(folder: Path) -> None:
    (folder / "train/00001.parquet").write_bytes(b"x")
    edit(folder, lambda tree: tree["splits"][0]["shards"][1].update(sha256=X_SHA256))


X_SHA256 = hashlib.sha256(b"x").hexdigest()
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing manifest": (lambda f: (f / "codes.json").unlink(), r"codes\.json: is missing: the dump of codes is incomplete"),
    "newer format": (in_manifest(format="codes/2"), r"format 'codes/2'; this version of intarsia reads 'codes/1'"),
    "no format": (lambda f: (f / "codes.json").write_text("[]"), r"format None; this version"),
    "torn manifest": (lambda f: (f / "codes.json").write_text('{"format":'), r"codes\.json: no valid JSON"),
    "unknown key": (in_manifest(levles=1), r"levles: unknown key; did you mean 'levels'"),
    "listed count": (listed(samples=51), r"split 'train' lists 4 shards of 50 rows; expected 4 of 51"),
    "path in a name": (lambda f: edit(f, lambda t: t["splits"][0]["shards"][0].update(file="../x")), r"split 'train' lists 4 shards"),
    "missing shard": (lambda f: (f / "train/00001.parquet").unlink(), r"00001\.parquet: the shard is missing; codes\.json lists"),
    "checksum": (lambda f: (f / "train/00001.parquet").write_bytes(b"x"), rf"00001\.parquet: sha256 {X_SHA256}; codes\.json says"),
    "wrong count": (lambda f: forge(f, lambda t: t.slice(0, 15)), r"00001\.parquet: 15 rows; codes\.json says 16"),
    "code >= K": (forged("codes_1", lists(pa.uint16(), 512)), r"codes_1: row 15 holds 512; level 'bottom' allows \[0, 511\]"),
    "code < 0": (forged("codes_1", lists(pa.int16(), -1)), r"codes_1: dtype int16 and holds -1; level 'bottom' needs uint16"),
    "dtype too small": (forged("codes_1", lists(pa.uint8(), 3)), r"codes_1: dtype uint8, which is too small for vocab 512; .* uint16"),
    "wrong dtype": (forged("codes_1", lists(pa.float32(), 3.5)), r"codes_1: dtype float; level 'bottom' needs uint16"),
    "grid": (forged("codes_1", lists(pa.uint16(), 3, 12)), r"codes_1: fixed_size_list.*grid of \(4, 6\), expected lists of 24"),
    "label >= classes": (forged("label", numbers(3)), r"label 3 in row 15; expected \[0, 2\]"),
    "label < 0": (forged("label", numbers(-1, 0)), r"label -1 in row 14; expected \[0, 2\]"),
    "label dtype": (forged("label", numbers(dtype=pa.int8())), r"column 'label' is int8; expected int64"),
    "missing values": (forged("label", lambda old: pa.array([None, *old[1:]], pa.int64())), r"'label' has 1 missing values"),
    "missing column": (lambda f: forge(f, lambda t: t.drop_columns("label")), r"columns \['codes_0', .*expected .*'label'"),
    "rows in another order": (lambda f: forge(f, lambda t: t.take([15, *range(15)])), r"00001\.parquet: row 0 is sample 31 of view 0"),
    "no samples": (listed(samples=0, shards=[]), r"split 'train': 0 samples of 1 views; expected one or more"),
    "fewer than none": (listed(samples=-1, shards=[]), r"split 'train': -1 samples of 1 views"),
    "a split outside": (listed(name="../train"), r"splits: '../train' is no name"),
    "a split twice": (lambda f: edit(f, lambda t: t["splits"].append(t["splits"][0])), r"splits: 'train' is there twice"),
    "a class twice": (lambda f: edit(f, lambda t: t["classes"][1].update(name=t["classes"][0]["name"])), r"classes: '.*' is there twice"),
    "usage of no level": (listed(usage=[]), r"usage of 0 levels and perplexity of 2; there are 2"),
    "no parquet": (no_parquet, r"00001\.parquet: no readable parquet file"),
    "K in the manifest": (
        lambda f: edit(f, lambda t: t["levels"][1].update(vocab=256, factors=[256])),
        r"codes_1: dtype uint16; level 'bottom' needs uint8",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_d4_damaged_codes_are_refused_in_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    folder = written(tmp_path / "codes")
    damage(folder)
    with pytest.raises(CodesError, match=message) as error:
        CodesDataset(folder, "train")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("levels", "fingerprint", "message"),
    [
        ((TOP, BOTTOM), "0" * 64, f"made by the tokenizer {'f' * 64}; expected {'0' * 64}"),
        ((TOP, LevelSpec("bottom", 256, (4, 6))), "f" * 64, "level 'bottom' has vocab 512; expected 256"),
        ((TOP, LevelSpec("bottom", 512, (6, 4))), "f" * 64, r"level 'bottom' has a grid of \(4, 6\); expected \(6, 4\)"),
        ((TOP, LevelSpec("bottom", 512, (4, 6), (8, 64))), "f" * 64, r"level 'bottom' has factors \(512,\); expected \(8, 64\)"),
        ((TOP,), "f" * 64, "2 levels; expected 1"),
    ],
    ids=["fingerprint", "K", "grid", "factors", "levels"],
)
def test_d4_codes_of_another_tokenizer_are_refused_with_both_values(
    tmp_path: Path, levels: tuple[LevelSpec, ...], fingerprint: str, message: str
) -> None:
    folder = written(tmp_path / "codes")
    for expected in (CodesSpec(levels, fingerprint), TokenizerSpec(SIGNAL, levels, fingerprint, (len(levels),))):
        with pytest.raises(CodesError, match=message) as error:
            CodesDataset(folder, "train", expected)
        assert str(folder) in str(error.value)


def test_codes_of_the_expected_tokenizer_pass(tmp_path: Path) -> None:
    folder = written(tmp_path / "codes")
    expected = TokenizerSpec(SIGNAL, (TOP, BOTTOM), "f" * 64, (2,))
    assert len(CodesDataset(folder, "train", expected)) == 50
    check_match((TOP, BOTTOM), "f" * 64, expected, "here")


def test_an_unknown_split_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(CodesError, match="'test' is none of train, validation"):
        CodesDataset(written(tmp_path / "codes"), "test")


def test_a_folder_that_is_no_dump_is_told_from_an_interrupted_one(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(CodesError, match=r"codes: .* is no dump of codes: it holds neither codes\.json nor shards"):
        read_manifest(tmp_path)
    (tmp_path / ".dump").mkdir()
    with pytest.raises(CodesError, match="the dump of codes is incomplete; run the same encode command again"):
        read_manifest(tmp_path)
