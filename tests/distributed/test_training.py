"""Two processes train what one trains. Each rank asserts that there are two (C0): the ``ranks`` fixture does."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from intarsia.checkpoint import checkpoints
from intarsia.cli import RunError, UserError
from intarsia.order import Order
from intarsia.run import Run
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS
from tests.training import HIERARCHY, TOKENIZER, Left, run_training, tiny, together

pytestmark = pytest.mark.faults


def each(ranks, config, before=None, **flags):
    """Trains ``config`` in two forked processes, after ``before(rank)``; how each ended: None, its exit code or its error."""

    def work(rank):
        assert dist.get_world_size() == 2  # C0
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        if before is not None:
            before(rank)
        try:
            run_training(config, **flags)
        except RunError as error:
            return str(error)
        except SystemExit as stop:
            return stop.code
        return None

    return ranks(work, timeout=120.0)


def in_two(ranks, config, **flags):
    assert each(ranks, config, **flags) == [None, None]
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


TOKENIZER_CASES = {
    "vq": TOKENIZER,
    "residual": TOKENIZER.replace(
        quantizer=ResidualConfig(
            stages=3,
            dropout=0.5,
            depth_weights=(0, 1, 1),
            shallow_gradient=0.3,
            inner=VQConfig(codes=12, dim=4, decay=0.9, restart=0.3),
        ),
        by_depth=True,
        prefix_decoders=(1,),
    ),
    "product": TOKENIZER.replace(quantizer=ProductConfig(groups=2, inner=VQConfig(codes=12, dim=2, decay=0.9, restart=0.3))),
    "hierarchy": HIERARCHY,
}
SHARES: dict[str, dict[str, int]] = {  # 21 = 11 + 10, also in micro-batches of 4, 4, 3 and 4, 3, 3; 5 = 3 + 2; and a rank without a sample
    "whole": {"batch_size": 21},
    "parts": {"batch_size": 21, "accumulate": 3},
    "few": {"batch_size": 5},
    "single": {"batch_size": 1},
}


def test_every_registered_tokenizer_has_a_case():
    assert {case.type_name for case in TOKENIZER_CASES.values()} == set(TOKENIZERS.names())


@pytest.mark.parametrize("case", TOKENIZER_CASES)
def test_c1_and_c3_two_processes_train_a_tokenizer_as_one_does(case, ranks, tmp_path):
    """k-means (from coarse to fine), restarts, quantiser dropout, dropped levels; uneven batches, micro-batches, averaged weights, Muon."""

    def config(name, share):
        averaged = {"optim": {"average": 0.9, "muon": 0.02}, "log": {"validate_every": 20, "checkpoint_every": 20}}
        return tiny(tmp_path / name, steps=20, precision="fp64", tokenizer=TOKENIZER_CASES[case], **averaged, **share)

    for name, share in SHARES.items():
        run_training(config(f"one-{name}", share))
    together(ranks, *(lambda name=name, share=share: run_training(config(f"two-{name}", share)) for name, share in SHARES.items()))
    one, two = ({name: Left.of(tmp_path / f"{count}-{name}") for name in SHARES} for count in ("one", "two"))
    for name in SHARES:
        assert one[name].distance(two[name], ("module/", "optimizer/", "average/")) <= 1e-10, name
        # the PSNR over all 11 validation images, each counted once, of averaged weights and the codebooks that belong to them
        assert one[name].facts["best"] == pytest.approx(two[name].facts["best"], abs=1e-9), name
    assert one["whole"].distance(one["parts"]) <= 1e-10 and one["whole"].distance(two["parts"]) <= 1e-10
    assert one["whole"].distance(one["few"], ("module/",)) > 1e-3  # other batches are another training


def test_a9_a_run_goes_on_with_another_number_of_processes(ranks, tmp_path):
    common = {"steps": 60, "precision": "fp64", "log": {"every": 20, "checkpoint_every": 10}}
    whole = in_one(tiny(tmp_path / "whole", **common))
    in_one(tiny(tmp_path / "up", **common), max_steps=10)
    in_two(ranks, tiny(tmp_path / "down", **common), max_steps=10)
    assert in_two(ranks, tiny(tmp_path / "up", **common)).distance(whole) <= 1e-10
    assert in_one(tiny(tmp_path / "down", **common)).distance(whole) <= 1e-10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a7_a_signal_to_one_rank_stops_both_after_the_same_step_with_a_checkpoint_of_it(ranks, tmp_path, number, code):
    def before(rank):
        real = Run.parts

        def parts(self, loader, step):
            if step == 6 and rank == 1:
                os.kill(os.getpid(), number)
            return real(self, loader, step)

        Run.parts = parts

    config = tiny(tmp_path / "run", steps=12)
    assert each(ranks, config, before) == [code, code]
    assert Left.of(tmp_path / "run").step == 7
    whole = in_two(ranks, tiny(tmp_path / "whole", steps=12))
    assert [n for n in in_two(ranks, config).differences(whole) if n != "metrics"] == []


def test_c2_ranks_whose_codebooks_differ_are_stopped_before_the_checkpoint(ranks, tmp_path):
    def before(rank):
        real = Run.optimizer_step

        def step(self, finite=None):
            if self.step == 6 and rank == 1:
                self.module.quantizer.sums[3, 1] += 1e-6
            return real(self, finite)

        Run.optimizer_step = step

    def weaker(rank):  # counts alone
        real = Run.log

        def log(self, step):
            if step == 4 and rank == 1:
                self.module.quantizer.counts[0] += 1e-4
            return real(self, step)

        Run.log = log

    first, second = each(ranks, tiny(tmp_path / "a", steps=20), before)
    assert first == second and first.startswith("step 10: ranks 1 and 0 differ in '")
    assert [p.name for p in checkpoints(tmp_path / "a" / "checkpoints")] == ["step-00000005"]
    first, second = each(ranks, tiny(tmp_path / "b", steps=20), weaker)
    assert first == second == "step 5: ranks 1 and 0 differ in 'quantizer.counts' and 0 more tensors"


def spoiled(sample):
    """Makes one sample's pixels NaN in training, on whichever rank reads it."""

    def before(rank):
        real = ArraySplit._signals

        def signals(self, indices, epochs, *rest):
            x = real(self, indices, epochs, *rest)
            if epochs is not None:
                x[indices == sample] = float("nan")
            return x

        ArraySplit._signals = signals

    return before


def test_f1_a_nan_on_one_rank_stops_both_in_the_same_step_before_anything_changes(ranks, tmp_path):
    sample = int(Order(50, 8, 0).indices(4)[6])  # in the half of rank 1
    config = tiny(tmp_path / "run", steps=12, log={"checkpoint_every": 4})
    first, second = each(ranks, config, spoiled(sample))
    assert first == second == "step 5: not finite: latents on rank 1; loss on rank 1; gradients on rank 1"
    assert Left.of(tmp_path / "run").step == 4


def test_f1_a_gradient_that_is_not_finite_is_traced_to_its_rank_and_skipped_where_allowed(ranks, tmp_path):
    def before(rank):
        real = Run.steps

        def steps(self):
            for step in real(self):
                if step == 4 and rank == 1:
                    weight = self.module.to_codes.weight
                    handle = weight.register_hook(lambda g: g * float("inf"))
                yield step
                if step == 4 and rank == 1:
                    handle.remove()

        Run.steps = steps

    first, second = each(ranks, tiny(tmp_path / "a", steps=12), before)
    assert first == second == "step 5: not finite: gradients on rank 1"
    config = tiny(tmp_path / "b", steps=12, max_bad_steps=1)
    assert each(ranks, config, before) == [None, None]
    assert Left.of(tmp_path / "b").tensors["optimizer/to_codes.weight/step"] == 11


def test_a_parameter_without_a_gradient_is_named_by_both_ranks_before_their_second_step(ranks, tmp_path):
    def work(rank):
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        with pytest.MonkeyPatch.context() as patch:
            build = TOKENIZERS.build

            def spare(config, signal):
                tokenizer = build(config, signal)
                tokenizer.spare = torch.nn.Linear(2, 2)
                return tokenizer

            patch.setattr(TOKENIZERS, "build", spare)
            with pytest.raises(UserError, match="^parameters spare.weight, spare.bias get no gradient: "):
                run_training(tiny(tmp_path / "run", steps=4))

    ranks(work, timeout=120.0)
    assert checkpoints(tmp_path / "run" / "checkpoints") == []


def test_what_fails_on_rank_0_alone_fails_on_both(ranks, tmp_path):
    def before(rank):
        import intarsia.run

        def full(*args):
            raise OSError(28, "No space left on device")

        if rank == 0:
            intarsia.run.save_checkpoint = full

    first, second = each(ranks, tiny(tmp_path, steps=12), before)
    assert "No space left" in first and second == "checkpoint of step 5: rank 0 failed"


def test_c7_ranks_call_the_same_collectives_whatever_their_data(ranks, tmp_path):
    """One sample on two ranks, dead codes, a step with NaN that is skipped: the number, kinds and sizes stay equal."""
    sample = int(Order(50, 1, 0).indices(40)[0])
    seen = []

    def work(rank):
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        spoiled(sample)(rank)
        for name in ("all_reduce", "all_gather", "broadcast"):
            real = getattr(dist, name)

            def call(tensor, *args, real=real, name=name, **kwargs):
                many = tensor if isinstance(tensor, list) else [tensor]
                seen.append((name, [tuple(t.shape) for t in many]))
                return real(tensor, *args, **kwargs)

            setattr(dist, name, call)
        log = {"validate_every": 20, "checkpoint_every": 10}
        run_training(tiny(tmp_path, steps=60, batch_size=1, max_bad_steps=1, log=log))
        return seen

    first, second = ranks(work, timeout=120.0)
    assert first == second and len(first) > 3 * 60
