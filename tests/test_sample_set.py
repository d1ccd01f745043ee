"""Folders of samples: the same bytes from any number of processes, resumed where they were interrupted, of one plan alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.cli import RunError, UserError
from intarsia.lock import RunLock
from pipelines import TwoStagePipeline, sample_set
from pipelines.outputs import to_uint8
from pipelines.sample_set import SetPlan, write_set
from tests import tiny_pipelines as tiny

KINDS = ("png", "npz")


@pytest.fixture(scope="module")
def pipeline() -> TwoStagePipeline:
    return tiny.pipeline("gpt", micro_batch=8, defaults={"temperature": 0.9})


def plan(kind: str, **changes: Any) -> SetPlan:
    fixed: dict[str, Any] = {"n": 23, "first": 5, "seed": 4, "label": None, "options": {"top_k": 9}, "shard": 4, "batch_size": 3}
    return SetPlan(**fixed | {"kind": kind} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def interrupted(folder: Path, pipeline: TwoStagePipeline, after: int, monkeypatch: Any, **changes: Any) -> None:
    """The set, cut off after so many files."""
    real, done = sample_set.write_atomic, [0]

    def stopping(path: Path, content: bytes) -> None:
        if path.suffix != ".json":
            done[0] += 1
            if done[0] > after:
                raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(sample_set, "write_atomic", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_set(pipeline, folder, plan("png", **changes))


def test_arrays_hold_images_labels_and_indices_of_fixed_ranges(pipeline: TwoStagePipeline, tmp_path: Path) -> None:
    assert write_set(pipeline, tmp_path, plan("npz")) == 4
    x = to_uint8(torch.stack([row for _, row in pipeline.stream(23, first=5, seed=4, top_k=9)]))
    starts = list(range(5, 28, 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{s:06d}.npz" for s in starts] + ["plan.json", "samples.json"]
    for start in starts:
        with np.load(tmp_path / f"{start:06d}.npz") as found:
            assert found["index"].tolist() == list(range(start, min(start + 4, 28)))
            assert np.array_equal(found["images"], x[found["index"] - 5])
            assert found["label"].tolist() == pipeline.labels(len(found["index"]), first=start, seed=4).tolist()
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert facts["sampling"] == [{"temperature": {"codes": 0.9}, "top_k": {"codes": 9}}] and facts["label"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_bytes_of_one(pipeline: TwoStagePipeline, tmp_path: Path, ranks: Any, kind: str) -> None:
    write_set(pipeline, tmp_path / "one", plan(kind))
    time.sleep(1.1)  # what holds a time of day would differ
    seeds = ranks(lambda rank: write_set(pipeline, tmp_path / "two", plan(kind)))
    assert seeds == [4, 4] and contents(tmp_path / "two") == contents(tmp_path / "one")
    free = ranks(lambda rank: write_set(pipeline, tmp_path / "free", plan(kind, seed=None)))
    assert free[0] == free[1], "a fresh seed is one for all"
    assert contents(tmp_path / "free") != contents(tmp_path / "one")


@pytest.mark.parametrize("after", [0, 1, 6, 22])
def test_an_interrupted_set_goes_on_where_it_was(pipeline: TwoStagePipeline, tmp_path: Path, monkeypatch: Any, after: int) -> None:
    write_set(pipeline, tmp_path / "whole", plan("png"))
    interrupted(tmp_path / "set", pipeline, after, monkeypatch)
    left = contents(tmp_path / "set")
    assert len(left) == after + 1 and "samples.json" not in left
    (tmp_path / "set" / ".tmp-1-000009.png").write_bytes(b"torn")
    drawn: list[int] = []
    real = TwoStagePipeline._draw
    monkeypatch.setattr(TwoStagePipeline, "_draw", lambda self, ids, request: drawn.extend(ids.tolist()) or real(self, ids, request))
    write_set(pipeline, tmp_path / "set", plan("png"))
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert drawn == list(range(5 + after, 28)), "what is there is not drawn again"
    drawn.clear()
    write_set(pipeline, tmp_path / "set", plan("png"))
    assert not drawn and contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_what_is_missing_is_dealt_to_all_processes(pipeline: TwoStagePipeline, tmp_path: Path, ranks: Any) -> None:
    write_set(pipeline, tmp_path / "whole", plan("npz"))
    write_set(pipeline, tmp_path / "set", plan("npz"))
    for start in (5, 13, 21, 25):
        (tmp_path / "set" / f"{start:06d}.npz").unlink()
    (tmp_path / "set" / "samples.json").unlink()

    def drawn(rank: int) -> set[int]:
        ids: set[int] = set()
        real = TwoStagePipeline._draw
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TwoStagePipeline, "_draw", lambda self, i, request: ids.update(i.tolist()) or real(self, i, request))
            write_set(pipeline, tmp_path / "set", plan("npz"))
        return ids

    assert ranks(drawn) == [{5, 6, 7, 8, 21, 22, 23, 24}, {13, 14, 15, 16, 25, 26, 27}], "each the half of what is missing"
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize("key", ["device", "threads"])
def test_a_set_is_not_mixed_of_the_bits_of_two_machines(pipeline: TwoStagePipeline, tmp_path: Path, monkeypatch: Any, key: str) -> None:
    write_set(pipeline, tmp_path / "whole", plan("png"))
    interrupted(tmp_path / "set", pipeline, 3, monkeypatch)
    path = tmp_path / "set" / "plan.json"
    begun = json.loads(path.read_text())
    assert begun["device"] == "cpu" and begun["threads"] == torch.get_num_threads()
    path.write_text(json.dumps(begun | ({"device": "cuda", "threads": None} if key == "device" else {"threads": 64})))
    said = {"device": "device 'cuda' there, 'cpu' now", "threads": r"threads 64 there, \d+ now; .*OMP_NUM_THREADS=64 sets the threads"}
    with pytest.raises(UserError, match=said[key]):
        write_set(pipeline, tmp_path / "set", plan("png"))
    path.write_text(json.dumps({k: v for k, v in begun.items() if k not in ("device", "threads")}))
    write_set(pipeline, tmp_path / "set", plan("png"))
    found = contents(tmp_path / "set")
    assert {k: v for k, v in found.items() if k.endswith(".png")} == {
        k: v for k, v in contents(tmp_path / "whole").items() if k.endswith(".png")
    }
    assert not {"device", "threads"} & set(json.loads(found["samples.json"])), "nobody knows where the first ones were drawn"


def test_a_second_command_on_a_folder_that_is_being_written_is_refused(pipeline: TwoStagePipeline, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "out")
    with pytest.raises(UserError, match=f"^out: {tmp_path} is in use by this process"):
        write_set(pipeline, tmp_path, plan("png", n=1))
    lock.release()
    assert write_set(pipeline, tmp_path, plan("png", n=1)) == 4


def test_without_a_seed_the_same_call_goes_on_with_that_of_the_plan(pipeline: TwoStagePipeline, tmp_path: Path, monkeypatch: Any) -> None:
    interrupted(tmp_path / "set", pipeline, 3, monkeypatch, seed=None)
    seed = json.loads((tmp_path / "set" / "plan.json").read_text())["seed"]
    assert write_set(pipeline, tmp_path / "set", plan("png", seed=None)) == seed
    assert contents(tmp_path / "set") == contents_of(pipeline, tmp_path / "whole", seed)


def contents_of(pipeline: TwoStagePipeline, folder: Path, seed: int) -> dict[str, bytes]:
    write_set(pipeline, folder, plan("png", seed=seed))
    return contents(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 24}, "n 23 there, 24 now"),
        ({"first": 0}, "first 5 there, 0 now"),
        ({"seed": 5}, "seed 4 there, 5 now"),
        ({"label": (1,)}, r"label None there, \[1\] now"),
        ({"kind": "npz"}, "files 'png' there, 'npz' now"),
        ({"shard": 5, "n": 22}, "n 23 there, 22 now; shard 4 there, 5 now"),
        ({"options": {"top_k": 8}}, r"sampling \[\{'temperature': \{'codes': 0.9\}, 'top_k': \{'codes': 9.*there, .*8.* now"),
    ],
)
def test_a_folder_of_another_plan_is_refused_by_what_differs(
    pipeline: TwoStagePipeline, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_set(pipeline, tmp_path, plan("png"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"plan.json is the plan of other samples: {message}; expected the same, or another folder"):
        write_set(pipeline, tmp_path, plan(**{"kind": "png"} | change))
    assert contents(tmp_path) == before


def test_another_pipeline_is_refused_and_another_batch_size_is_not(pipeline: TwoStagePipeline, tmp_path: Path) -> None:
    write_set(pipeline, tmp_path, plan("png"))
    other = tiny.pipeline("pixelcnn", micro_batch=8, defaults={"temperature": 0.9})
    with pytest.raises(UserError, match="priors .* there, .* now"):
        write_set(other, tmp_path, plan("png"))
    write_set(pipeline, tmp_path, plan("png", batch_size=7))


def test_a_damaged_plan_is_named_and_ranks_fail_together(pipeline: TwoStagePipeline, tmp_path: Path, ranks: Any) -> None:
    (tmp_path / "plan.json").write_text("{")

    def call(rank: int) -> str:
        try:
            write_set(pipeline, tmp_path, plan("png"))
        except (UserError, RunError) as error:
            return f"{type(error).__name__}: {error}"
        return "written"

    first, second = ranks(call)
    assert first.startswith("UserError:") and "plan.json: no valid JSON" in first
    assert second == f"RunError: out: {tmp_path}: rank 0 failed"
