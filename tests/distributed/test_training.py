"""Two processes train what one trains. Each rank asserts that there are two (C0): the ``ranks`` fixture does."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from tests.training import Left, run_training, tiny


def in_two(ranks, config, timeout=120.0, **flags):
    """Trains ``config`` in two forked processes."""

    def work(rank):
        assert dist.get_world_size() == 2  # C0
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        run_training(config, **flags)

    ranks(work, timeout=timeout)
    return Left.of(config.run)


def in_one(config, **flags):
    run_training(config, **flags)
    return Left.of(config.run)


def test_c1_two_processes_equal_one_in_float64_over_200_steps_with_kmeans_and_restarts(ranks, tmp_path):
    common = {"steps": 200, "precision": "fp64", "log": {"every": 20, "checkpoint_every": 200}}
    one = in_one(tiny(tmp_path / "one", **common))
    two = in_two(ranks, tiny(tmp_path / "two", **common))
    assert one.distance(two) <= 1e-10
    assert {"module/quantizer.codebook", "module/quantizer.counts", "module/quantizer.sums"} <= one.tensors.keys()
    assert '"restarts": 0.0' not in one.metrics.splitlines()[0]  # restarts did happen


def test_c1_two_processes_equal_one_in_float32_over_20_steps(ranks, tmp_path):
    one = in_one(tiny(tmp_path / "one", steps=20))
    two = in_two(ranks, tiny(tmp_path / "two", steps=20))
    assert one.distance(two, ("module/",)) <= 1e-5


def test_c1_accumulation_equals_the_whole_batch_also_in_two_processes(ranks, tmp_path):
    common = {"steps": 60, "precision": "fp64", "log": {"every": 20, "checkpoint_every": 60}}
    one = in_one(tiny(tmp_path / "one", **common))
    parts = in_one(tiny(tmp_path / "parts", accumulate=3, **common))
    both = in_two(ranks, tiny(tmp_path / "both", accumulate=3, **common))
    assert one.distance(parts) <= 1e-10 and one.distance(both) <= 1e-10


@pytest.mark.parametrize("batch_size", [21, 5, 1])
def test_c3_uneven_batches_equal_one_process(ranks, tmp_path, batch_size):
    """21 = 11 + 10, 5 = 3 + 2, and one sample on two ranks: one of them has none."""
    common = {"steps": 30, "precision": "fp64", "batch_size": batch_size, "log": {"validate_every": 30}}
    one = in_one(tiny(tmp_path / "one", **common))
    two = in_two(ranks, tiny(tmp_path / "two", **common))
    assert one.distance(two) <= 1e-10
    assert one.facts["best"] == pytest.approx(two.facts["best"], abs=1e-9)  # the PSNR over all 11 validation images, each counted once
