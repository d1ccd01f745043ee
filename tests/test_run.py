"""The services of a run, with a toy module: what is trained, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia import machine, trackers
from intarsia.average import AveragedWeights
from intarsia.checkpoint import CheckpointError, checkpoints
from intarsia.cli import Flags, RunError, UserError
from intarsia.config import ConfigError
from intarsia.metrics_log import MetricsLog, read_metrics
from intarsia.order import Order
from intarsia.parts import Parts
from intarsia.prefetch import Prefetch, pinned
from intarsia.release import replace_folder, restore_folder
from intarsia.run import Run
from intarsia.run_config import LogConfig, OptimConfig, RunConfig
from intarsia.schedule import learning_rate
from intarsia.stepping import check_gradients
from tests.training import Left, fork, wait

LOG = LogConfig(every=2, validate_every=0, checkpoint_every=4, pictures_every=0)


class Vectors:
    """Samples of four numbers; those in ``bad`` hold a NaN."""

    def __init__(self, n: int = 30, bad: tuple[int, ...] = (), delay: float = 0.0) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
        self.bad, self.delay = bad, delay

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, epochs: Tensor | None = None) -> dict[str, Any]:
        time.sleep(self.delay)
        x = self.x[indices] + (0 if epochs is None else epochs[:, None] / 10)  # another view in every epoch
        x[torch.isin(indices, torch.tensor(self.bad, dtype=torch.int64))] = math.nan
        return {"x": x, "index": indices, "codes": [indices % 3, indices % 2], "none": None}


class Toy(nn.Module):
    """A linear autoencoder whose middle keeps a moving mean, as a codebook would."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        self.register_buffer("mean", torch.zeros(2))
        self.discard()

    def discard(self) -> None:
        self.seen: list[Tensor] = []
        self.good = torch.tensor(True)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.down(x)
        self.good = self.good & torch.isfinite(z.detach()).all()
        self.seen.append(z.detach().to(self.mean.dtype))
        return (self.up(z) - x).square().mean(), {"norm": z.detach().square().mean()}

    def update(self) -> dict[str, Tensor]:
        self.mean.lerp_(torch.cat(self.seen).mean(0), 0.1)
        self.discard()
        return {"moved": self.mean.norm()}


def config(run: Path | str, **changes: Any) -> RunConfig:
    for name, base in (("log", LOG), ("optim", OptimConfig(lr=1e-2))):
        changes[name] = base.replace(**changes.get(name, {}))
    return RunConfig(run=str(run), **({"steps": 12, "batch_size": 6, "precision": "fp32", "device": "cpu", "workers": 0} | changes))


def save(folder: Path) -> None:
    (folder / "weights").write_text("saved")


def loop(run: Run, loader: Any = None, figures: Any = None, at: Any = None) -> Toy:
    """The loop of a script. ``figures(step)`` stands for a validation, ``at(step, run)`` for what happens in a step."""
    loader = loader or Vectors()
    with run:
        toy = Toy()
        model = run.prepare(toy)
        run.resume()
        for step in run.steps():
            for part in run.parts(loader, step):
                with run.forward(part):
                    loss, stats = model(part.batch["x"])
                    run.backward(loss, part, stats)
            if at is not None:
                at(step, run)
            if run.optimizer_step(toy.good):
                run.note(toy.update())
            run.log(step)
            if figures is not None and run.due("validate", step) and run.validated(step, figures(step), best="loss"):
                run.release(lambda folder, step=step: (folder / "weights").write_text(f"best {step + 1}"))
            run.checkpoint(step)
        run.finish(save)
    return toy


def go(folder: Path, flags: Flags | None = None, loader: Any = None, figures: Any = None, at: Any = None, **changes: Any) -> Left:
    loop(Run(config(folder, **changes), flags, kind="toy"), loader, figures, at)
    return Left.of(folder)


# What is trained -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("clip", "betas"), [(0.5, (0.9, 0.99)), (0.0, (0.8, 0.95))])
def test_the_loop_equals_plain_torch(tmp_path, clip, betas):
    left = go(tmp_path / "run", optim={"clip": clip, "warmup": 3, "betas": betas, "average": 0.7})
    torch.manual_seed(0)
    toy, loader = Toy(), Vectors()
    order = Parts(30, 6, 1, 0, 0, 1).order
    optimizer = torch.optim.AdamW(toy.parameters(), betas=betas, weight_decay=0.0)
    losses, average = [], {name: p.detach().clone() for name, p in toy.named_parameters()}
    for step in range(12):
        loss, _ = toy(loader.batch(order.indices(step), order.epochs(step))["x"])
        loss.backward()
        nn.utils.clip_grad_norm_(toy.parameters(), clip or math.inf)
        lr = 1e-2 * (step + 1) / 3 if step < 3 else 1e-2 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        toy.update()
        losses.append(loss.item())
        decay = min(0.7, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * p.detach() for name, p in toy.named_parameters()}
    for name, tensor in toy.state_dict().items():
        torch.testing.assert_close(left.tensors[f"module/{name}"], tensor, rtol=1e-5, atol=1e-6)
    for name, tensor in average.items():
        torch.testing.assert_close(left.tensors[f"average/{name}"], tensor, rtol=1e-5, atol=1e-6)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    means = [(losses[i] + losses[i + 1]) / 2 for i in range(0, 12, 2)]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-5)
    assert lines[0]["lr"] == pytest.approx(2e-2 / 3) and {"norm", "moved", "gradient_norm"} <= lines[0].keys()


def test_f3_the_same_command_twice_leaves_the_same_bits(tmp_path):
    assert go(tmp_path / "a").differences(go(tmp_path / "b")) == []
    assert "module/up.weight" in go(tmp_path / "c", seed=1).differences(Left.of(tmp_path / "a"))


def test_weight_decay_is_for_matrices_alone(tmp_path):
    with Run(config(tmp_path, optim={"weight_decay": 0.1}), kind="toy") as run:
        run.prepare(Toy())
    groups = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in run.optimizer.param_groups}
    assert groups == {0.1: [2, 2], 0.0: [1, 1]}


def test_with_muon_the_hidden_weights_have_a_peak_of_their_own_and_the_same_schedule(tmp_path):
    with Run(config(tmp_path, optim={"weight_decay": 0.1, "muon": 0.02, "warmup": 4}), kind="toy") as run:
        model = run.prepare(Toy())
        for step in run.steps():
            if step == 2:
                break
            loss, _ = model(torch.ones(3, 4))
            loss.backward()
            run.optimizer_step()
    groups = [([p.ndim for p in g["params"]], g["weight_decay"], round(g["lr"], 9)) for g in run.optimizer.param_groups]
    assert groups == [([2, 2], 0.1, 0.01), ([1, 1], 0.0, 0.005)]


def test_the_schedule_warms_up_and_falls_along_half_a_cosine():
    optim = OptimConfig(lr=2.0, warmup=4)
    rates = [learning_rate(optim, step, 24) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.0) and rates[24] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(OptimConfig(lr=2.0, schedule="constant"), 10**6, 24) == 2.0
    assert learning_rate(optim, 4, 4) == pytest.approx(2.0) and learning_rate(optim, 99, 24) == pytest.approx(0.0)


def test_averaged_weights_follow_their_formula_and_are_swapped_in_and_out(tmp_path):
    toy = Toy()
    average = AveragedWeights(toy, 0.5)
    expected = toy.up.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            toy.up.weight.add_(1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * toy.up.weight.detach()
    torch.testing.assert_close(average.values["up.weight"], expected)

    def look(step: int, run: Run) -> None:
        if step == 11:
            before = {k: v.clone() for k, v in run.module.state_dict().items()}
            with run.averaged() as averaged:
                assert averaged and not torch.equal(run.module.up.weight, before["up.weight"])
                run.module.mean.fill_(7)
                run.module.eval()
            assert run.module.training and all(torch.equal(v, before[k]) for k, v in run.module.state_dict().items())

    left = go(tmp_path / "run", at=look, optim={"average": 0.9})
    assert "average/up.weight" in left.tensors and left.differences(go(tmp_path / "b", optim={"average": 0.9})) == []


def test_precisions_reach_module_batch_and_autocast(tmp_path, monkeypatch):
    seen = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            seen[name] = (inputs[0].dtype, module.weight.dtype, out.dtype)

        return hook

    single, double, half = torch.float32, torch.float64, torch.bfloat16
    for name, expected in {"fp32": (single, single, single), "bf16": (single, single, half), "fp64": (double, double, double)}.items():
        with Run(config(tmp_path / name, precision=name), kind="toy") as run:
            toy = Toy()
            toy.down.register_forward_hook(look(name))
            model = run.prepare(toy)
            run.resume()
            part = next(run.parts(Vectors(), 0))
            with run.forward(part):
                assert torch.is_autocast_enabled("cpu") == (name == "bf16")
                model(part.batch["x"])
            assert seen[name] == expected and part.batch["index"].dtype == part.batch["codes"][0].dtype == torch.int64
            assert part.batch["none"] is None and toy.mean.dtype == run.dtype
    for fast, picked in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(machine, "cpu_computes_bf16", lambda fast=fast: fast)
        assert machine.pick_precision(config(tmp_path, precision="auto"), torch.device("cpu")) == picked


def test_fp16_on_a_cpu_and_a_missing_gpu_are_errors_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="precision: 'fp16' needs CUDA.*expected one of auto, fp32, bf16, fp64"):
        Run(config(tmp_path / "run", precision="fp16"), kind="toy")
    with pytest.raises(ConfigError, match="device: 'cuda', but"):
        Run(config(tmp_path / "run", device="cuda"), kind="toy")


def test_fp16_skips_steps_whose_scaled_gradients_overflow_and_lowers_the_scale(tmp_path, monkeypatch):
    monkeypatch.setattr("intarsia.run.machine.pick_precision", lambda config, device: "fp16")
    scales: list[float] = []

    def at(step: int, run: Run) -> None:
        scales.append(run._stepper.scaler.get_scale())
        if step == 2:
            run.module.up.weight.grad.fill_(math.inf)

    left = go(tmp_path / "a", at=at)
    halved = round(math.log2(65536 / left.facts["scaler"]["scale"]))
    assert scales[0] == 65536 and scales[3] == scales[2] / 2 and halved >= 1 and left.step == 12
    assert left.tensors["optimizer/up.weight/step"] == 12 - halved and all(torch.isfinite(t).all() for t in left.tensors.values())
    go(tmp_path / "b", Flags(max_steps=8), at=at)
    assert go(tmp_path / "b", at=at).differences(left) == []  # the scale was resumed, too


# Parts -----------------------------------------------------------------------------------------------------------
def parts_of(loader: Any, rank: int, world: int, batch: int, accumulate: int, workers: int = 0, steps: Any = range(4)) -> list[list[Any]]:
    parts, prefetch = Parts(len(loader), batch, accumulate, 3, rank, world), Prefetch(loader, workers, 20.0, False)
    out = [list(parts.step(step, prefetch, torch.device("cpu"), torch.float32)) for step in steps]
    prefetch.close()
    return out


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(21, 2, 1), (5, 2, 3), (1, 2, 1), (7, 3, 2), (4, 2, 4), (2, 5, 2), (8, 1, 3)])
def test_parts_deal_each_sample_once_in_order_with_weights_that_add_up(batch, world, accumulate):
    loader = Vectors(10)
    order = Parts(10, batch, 1, 3, 0, 1).order
    ranks = [parts_of(loader, rank, world, batch, accumulate) for rank in range(world)]
    for step in range(4):
        dealt = [part for rank in ranks for part in rank[step] if not part.ghost]
        assert torch.equal(torch.cat([p.batch["index"] for p in dealt]), order.indices(step))
        assert torch.equal(torch.cat([p.batch["x"] for p in dealt]), loader.batch(order.indices(step), order.epochs(step))["x"])
        assert sum(p.share for p in dealt) == pytest.approx(1) and sum(p.weight for p in dealt) == pytest.approx(world)
        for rank in ranks:  # every rank takes part in the one synchronised backward
            assert [p.last for p in rank[step]] == [False] * (len(rank[step]) - 1) + [True] and len(rank[step]) <= accumulate
            ghosts = [p for p in rank[step] if p.ghost]
            assert len(ghosts) in (0, len(rank[step])) and all(p.weight == 0 and len(p.batch["index"]) == 1 for p in ghosts)


def test_batches_do_not_depend_on_workers_or_on_where_one_begins():
    loader = Vectors(10, delay=0.002)
    plain = parts_of(loader, 0, 1, 4, 2, workers=0)
    for workers, start in ((1, 0), (2, 0), (3, 2)):
        other = parts_of(loader, 0, 1, 4, 2, workers, range(start, 4))
        for a, b in zip(plain[start:], other, strict=True):
            assert all(torch.equal(p.batch["x"], q.batch["x"]) and p.rng.step == q.rng.step for p, q in zip(a, b, strict=True))


def test_a_batch_that_hangs_ends_the_run_and_one_that_fails_says_why():
    with pytest.raises(RunError, match=r"no batch after 0.05 s \(samples \d+ to \d+\); see timeout"):
        list(Prefetch(Vectors(10, delay=1.0), 1, 0.05, False).batches(iter([(torch.arange(3), None)])))
    broken = SimpleNamespace(batch=lambda indices, epochs: (_ for _ in ()).throw(OSError("images/7.png: truncated")))
    for workers in (0, 2):
        with pytest.raises(OSError, match="7.png"):
            list(Prefetch(broken, workers, 5.0, False).batches(iter([(torch.arange(3), None)])))


def test_validation_batches_and_first_batches_cover_their_samples_once(tmp_path):
    with Run(config(tmp_path, workers=1), kind="toy") as run:
        loader = Vectors(23)
        assert torch.cat([b["index"] for b in run.batches(loader, 5)]).tolist() == list(range(23))
        assert torch.equal(torch.cat([b["x"] for b in run.batches(loader, 5)]), loader.x)  # not augmented
        assert [len(b["x"]) for b in run.batches(loader, 5, samples=7)] == [5, 2]
        first = torch.cat([b["index"] for b in run.first_batches(loader, 99)])
        assert torch.equal(first, Parts(23, 23, 1, 0, 0, 1).order.indices(0))
    with Run(config(tmp_path / "other", seed=5), kind="toy") as run:
        first = torch.cat([b["index"] for b in run.first_batches(loader, 9)])
        assert torch.equal(first, Order(23, 9, 5).indices(0)) and not torch.equal(first, Order(23, 9, 0).indices(0))


# Not finite (F1) -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["latents", "gradients"])
def test_f1_what_is_not_finite_ends_the_run_before_anything_changes(tmp_path, kind):
    states = {}

    def at(step: int, run: Run) -> None:
        states[step] = {k: v.clone() for k, v in run.module.state_dict().items()}
        states["run"] = run
        if step == 5 and kind == "latents":
            run.module.good = torch.tensor(False)
        elif step == 5:
            run.module.up.weight.grad[0, 0] = math.inf

    with pytest.raises(RunError, match=f"step 6: not finite: {kind} on rank 0"):
        go(tmp_path, at=at)
    assert all(torch.equal(v, states[5][k]) for k, v in states["run"].module.state_dict().items())
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_f1_a_nan_in_the_data_is_seen_in_latents_and_loss(tmp_path):
    bad = int(Parts(30, 6, 1, 0, 0, 1).order.indices(3)[2])
    with pytest.raises(RunError, match="step 4: not finite: latents on rank 0; loss on rank 0; gradients on rank 0"):
        go(tmp_path, loader=Vectors(bad=(bad,)))


def test_f1_max_bad_steps_skips_the_step_and_its_statistics(tmp_path, capsys):
    bad = int(Parts(30, 6, 1, 0, 0, 1).order.indices(3)[2])
    states = []

    def at(step: int, run: Run) -> None:
        states.append({k: v.clone() for k, v in run.module.state_dict().items()})

    left = go(tmp_path / "run", loader=Vectors(bad=(bad,)), at=at, max_bad_steps=1, steps=5)
    assert all(torch.equal(states[4][k], states[3][k]) for k in states[3]) and not torch.equal(states[3]["mean"], states[2]["mean"])
    assert left.tensors["optimizer/up.weight/step"] == 4 and all(torch.isfinite(t).all() for t in left.tensors.values())
    assert "step 4: not finite" in capsys.readouterr().err
    assert all(v is not None for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for v in line.values())
    with pytest.raises(RunError, match="step 3"):
        go(tmp_path / "two", loader=Vectors(bad=tuple(range(30))), max_bad_steps=2)


def test_f1_bad_steps_count_in_a_row_and_across_a_resumption(tmp_path):
    def bad(*steps: int) -> Vectors:
        return Vectors(bad=tuple(int(Parts(30, 6, 1, 0, 0, 1).order.indices(step)[2]) for step in steps))

    go(tmp_path / "apart", loader=bad(1, 3), max_bad_steps=1, steps=5)
    stopped = {"max_bad_steps": 1, "steps": 5}
    with pytest.raises(RunError, match="step 4: not finite"):
        go(tmp_path / "whole", loader=bad(2, 3), **stopped)
    go(tmp_path / "cut", loader=bad(2, 3), flags=Flags(max_steps=3), **stopped)
    with pytest.raises(RunError, match="step 4: not finite"):
        go(tmp_path / "cut", loader=bad(2, 3), **stopped)


# Resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a4_stopped_at_any_step_and_resumed_the_run_ends_as_if_never_stopped(tmp_path, workers, accumulate):
    optim = {"average": 0.9, "warmup": 2, "muon": 0.02 if accumulate == 2 else 0.0}
    changes = {"workers": workers, "accumulate": accumulate, "steps": 11, "log": {"every": 3}, "optim": optim}
    whole = go(tmp_path / "whole", **changes)

    def stop(step: int, run: Run) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    for stop_at in (0, 7) if accumulate == 1 else (4,):
        with pytest.raises(SystemExit) as end:
            go(tmp_path / f"cut{stop_at}", at=stop, **changes)
        assert end.value.code == 143 and Left.of(tmp_path / f"cut{stop_at}").step == stop_at + 1
        assert go(tmp_path / f"cut{stop_at}", **changes).differences(whole) == []


def test_a4_a_resumed_run_whose_order_starts_anew_would_differ(tmp_path, monkeypatch):
    """The negative control: the comparison does see another order."""
    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", Flags(max_steps=4))
    real = Run.parts
    monkeypatch.setattr(Run, "parts", lambda self, loader, step: real(self, loader, step - 4))
    assert "module/up.weight" in go(tmp_path / "cut").differences(whole)


def test_dropout_is_a_function_of_the_step_too(tmp_path, monkeypatch):
    real = Toy.forward
    monkeypatch.setattr(Toy, "forward", lambda self, x: real(self, nn.functional.dropout(x, 0.5)))
    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", Flags(max_steps=4))
    torch.rand(100)
    assert go(tmp_path / "cut").differences(whole) == []


def test_a_sigint_ends_with_130_and_a_second_one_interrupts(tmp_path):
    def once(step: int, run: Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        go(tmp_path / "once", at=once)
    assert end.value.code == 130 and Left.of(tmp_path / "once").step == 1

    def twice(step: int, run: Run) -> None:
        once(step, run)
        once(step, run)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "twice", at=twice)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are given back


def test_a5_the_newest_valid_checkpoint_wins_and_resume_wants_that_very_one(tmp_path, capsys):
    whole = go(tmp_path / "whole")
    go(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    newest = tmp_path / "run" / "checkpoints" / "step-00000012"
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: \d+ bytes; the manifest says"):
        go(tmp_path / "run", Flags(resume=str(newest)))
    assert go(tmp_path / "run").differences(whole) == []
    err = capsys.readouterr().err
    older = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert "optimizer.safetensors" in err and "falling back" in err and f"resuming {older} at step 8" in err
    go(tmp_path / "run", Flags(resume=str(older)))
    assert Left.of(tmp_path / "run").differences(whole) == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    left = go(tmp_path)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RunError, match="no whole checkpoint is left"):
        go(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == left.metrics and len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    whole = go(tmp_path / "whole")
    go(tmp_path / "run", Flags(max_steps=4))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 8, "lo')
    assert go(tmp_path / "run").metrics == whole.metrics
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append(1, {"psnr": math.inf, "loss": 0.1})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "psnr": None, "loss": 0.1}


def test_resuming_under_other_circumstances_is_said(tmp_path, capsys, monkeypatch):
    go(tmp_path, Flags(max_steps=4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("intarsia.run.machine.pick_precision", lambda config, device: "bf16")
    go(tmp_path)
    err = capsys.readouterr().err
    assert "threads was 1 and is 3: the run goes on" in err and "precision was fp32 and is bf16" in err and "world_size" not in err


def test_steps_may_grow_and_the_schedule_is_read_anew_from_there(tmp_path):
    go(tmp_path, steps=8)
    left = go(tmp_path, steps=16)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert left.step == 16 and [line["lr"] for line in lines] == pytest.approx(
        [learning_rate(OptimConfig(lr=1e-2), step, 8 if step < 8 else 16) for step in range(1, 16, 2)]
    )
    with pytest.raises(ConfigError, match="steps: 12, but .*step-00000016 is of step 16; steps may only grow"):
        go(tmp_path, steps=12)
    assert go(tmp_path, steps=16).differences(left) == []  # a finished run is finished


def test_a_command_that_is_refused_changes_nothing_in_the_folder(tmp_path):
    go(tmp_path, workers=1)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="steps may only grow"):
        go(tmp_path, workers=2, steps=6)
    assert (tmp_path / "config.yaml").read_text() == before
    go(tmp_path, workers=2)
    assert (tmp_path / "config.yaml").read_text() == before.replace("workers: 1", "workers: 2")


def test_a_run_that_was_resumed_by_name_says_how_it_goes_on(tmp_path, capsys):
    go(tmp_path, Flags(max_steps=8))
    flags = Flags(resume=str(tmp_path / "checkpoints" / "step-00000004"))
    with pytest.raises(SystemExit):
        go(tmp_path, flags, at=lambda step, run: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    assert "the same command without --resume goes on from there" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no manifest.json; .*without the flag a run goes on from its newest"):
        go(tmp_path, Flags(resume=str(tmp_path / "checkpoints" / "step-00000002")))


def test_max_steps_stops_early_and_still_releases(tmp_path):
    whole = go(tmp_path / "whole")
    assert go(tmp_path / "cut", Flags(max_steps=8)).step == 8 and (tmp_path / "cut" / "model" / "weights").exists()
    assert go(tmp_path / "cut").differences(whole) == []


def test_another_configuration_in_the_same_folder_is_an_error_with_both_values(tmp_path):
    go(tmp_path)
    with pytest.raises(ConfigError) as error:
        Run(config(tmp_path, seed=5, optim={"lr": 0.5}), kind="toy")
    assert len(error.value.errors) == 2 and all(str(tmp_path) in line for line in error.value.errors)
    assert "seed: 5, but" in str(error.value) and "made with 0" in str(error.value) and "optim.lr: 0.5" in str(error.value)
    Run(config(tmp_path, workers=2, log={"every": 7}, max_bad_steps=3), kind="toy").close()  # places are free
    (tmp_path / "config.yaml").write_text("codes: x\nrun: y\n")
    with pytest.raises(ConfigError, match="made by another kind or version of run: codes: unknown key"):
        Run(config(tmp_path), kind="toy")


def test_a_checkpoint_of_another_configuration_cannot_be_resumed(tmp_path):
    go(tmp_path / "a", seed=1)
    with pytest.raises(ConfigError, match="seed: 0, but .*step-00000012 was made with 1"):
        go(tmp_path / "b", Flags(resume=str(tmp_path / "a" / "checkpoints" / "step-00000012")))


def test_a_folder_without_results_is_taken_over(tmp_path):
    Run(config(tmp_path), kind="toy").close()
    assert go(tmp_path, seed=5).step == 12


def test_extra_modules_travel_in_checkpoints(tmp_path):
    extra = nn.Linear(2, 2)
    with Run(config(tmp_path), Flags(max_steps=4), kind="toy") as run:
        run.prepare(Toy())
        assert run.resume({"critic": extra}) is False
        part_loop(run)
        before = extra.weight.detach().clone()
    with Run(config(tmp_path), kind="toy") as run:
        run.prepare(Toy())
        with torch.no_grad():
            extra.weight.zero_()
        assert run.resume({"critic": extra}) and run.step == 4 and torch.equal(extra.weight, before)
    with Run(config(tmp_path), kind="toy") as run:
        run.prepare(Toy())
        with pytest.raises(ValueError, match="the checkpoint holds extra-critic, .*expected means, module, optimizer"):
            run.resume()


def part_loop(run: Run) -> None:
    for step in run.steps():
        for part in run.parts(Vectors(), step):
            with run.forward(part):
                run.backward(run.model(part.batch["x"])[0], part)
        run.optimizer_step()
        run.log(step)
        run.checkpoint(step)


# Validation, release ---------------------------------------------------------------------------------------------
def test_a_best_figure_that_is_infinite_survives_a_checkpoint(tmp_path):
    changes = {"figures": lambda step: {"loss": -math.inf if step == 3 else 1.0}, "log": {"validate_every": 4}}
    go(tmp_path, Flags(max_steps=8), **changes)
    go(tmp_path, **changes)
    assert (tmp_path / "model" / "weights").read_text() == "best 4"


LOSSES = {2: 0.5, 4: 0.3, 6: 0.4, 8: float("nan"), 10: 0.2, 12: 0.25}


def test_the_best_validation_is_kept_in_model(tmp_path):
    go(tmp_path, figures=lambda step: {"loss": LOSSES[step + 1]}, log={"validate_every": 2})
    assert (tmp_path / "model" / "weights").read_text() == "best 10"
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "validation/loss" in line]
    assert [(line["step"], line["validation/loss"]) for line in lines] == [(s, None if v != v else v) for s, v in LOSSES.items()]


def test_release_last_ends_with_the_last_step(tmp_path):
    go(tmp_path, figures=lambda step: {"loss": LOSSES[step + 1]}, log={"validate_every": 2, "release": "last"})
    assert (tmp_path / "model" / "weights").read_text() == "saved"


def test_a_best_that_an_earlier_end_replaced_is_not_taken_for_the_best(tmp_path, capsys):
    changes = {"figures": lambda step: {"loss": LOSSES.get(step + 1, 0.3)}}
    go(tmp_path, **changes, log={"validate_every": 2, "release": "last"})
    assert json.loads((tmp_path / "release.json").read_text()) == {"step": 12, "release": "last", "finished": True}
    (tmp_path / "model" / "weights").write_text("of an earlier last step")
    go(tmp_path, **changes, log={"validate_every": 2, "release": "best"}, steps=14)
    assert (tmp_path / "model" / "weights").read_text() == "saved" and "model/ is of the last step" in capsys.readouterr().err
    go(tmp_path / "best", **changes, log={"validate_every": 2}, steps=14)
    assert json.loads((tmp_path / "best" / "release.json").read_text()) == {"step": 10, "release": "best", "finished": True}
    assert (tmp_path / "best" / "model" / "weights").read_text() == "best 10"


def test_a_finished_run_without_checkpoints_does_not_begin_anew(tmp_path):
    go(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="run: .* holds the release of a finished run and no checkpoint to go on from; take another folder"):
        go(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before and (tmp_path / "model" / "weights").exists()
    shutil.rmtree(tmp_path / "model")
    assert go(tmp_path).step == 12


def test_a_run_stopped_between_its_first_release_and_its_first_checkpoint_begins_anew(tmp_path):
    def stop(step: int, run: Run) -> None:
        if step == 2:
            raise KeyboardInterrupt

    changes = {"figures": lambda step: {"loss": LOSSES[step + 1]}, "log": {"validate_every": 2}}
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, at=stop, **changes)
    assert (tmp_path / "model" / "weights").read_text() == "best 2" and not any((tmp_path / "checkpoints").glob("step-*"))
    assert go(tmp_path, **changes).step == 12


def test_a_release_goes_where_model_links_to(tmp_path):
    go(tmp_path / "run", Flags(max_steps=4))
    os.rename(tmp_path / "run" / "model", tmp_path / "elsewhere")
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    for number in range(2):
        replace_folder(tmp_path / "run" / "model", lambda folder, n=number: (folder / "weights").write_text(f"number {n}"))
    assert (tmp_path / "elsewhere" / "weights").read_text() == "number 1" and (tmp_path / "run" / "model").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "run"]


def test_patience_ends_the_run_and_it_stays_ended(tmp_path, capsys):
    changes = {"figures": lambda step: {"loss": LOSSES[step + 1]}, "log": {"validate_every": 2, "patience": 2}}
    assert go(tmp_path, **changes).step == 8 and (tmp_path / "model" / "weights").read_text() == "best 4"
    assert go(tmp_path, **changes).step == 8 and "2 validations without a new best" in capsys.readouterr().err
    assert go(tmp_path, **changes | {"log": {"validate_every": 2, "patience": 3}}).step == 12


def test_a_release_that_fails_leaves_the_old_one_and_a_crash_between_the_renames_is_repaired(tmp_path):
    model = tmp_path / "model"
    replace_folder(model, save)

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise ValueError("does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        replace_folder(model, fail)
    assert (model / "weights").read_text() == "saved" and [p.name for p in tmp_path.iterdir()] == ["model"]
    os.rename(model, tmp_path / ".tmp-old-model")
    (tmp_path / ".tmp-new-model").mkdir()
    restore_folder(model)
    assert (model / "weights").read_text() == "saved" and [p.name for p in tmp_path.iterdir()] == ["model"]


# Trackers --------------------------------------------------------------------------------------------------------
class Recorder:
    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.lines: list[Any] = []
        self.tree = tree

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values["loss"]))
        if step > 4:
            raise RuntimeError("the server is gone\nwith details")

    def picture(self, name: str, path: Path, step: int) -> None:
        self.lines.append((step, name))

    def close(self) -> None:
        self.lines.append("closed")


def test_a_tracker_that_fails_is_reported_once_and_never_ends_training(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda folder, tree: made.append(Recorder(folder, tree)) or made[-1])
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, tree: 1 / 0)
    left = go(tmp_path / "a", log={"trackers": ("wandb", "tensorboard")})
    err = capsys.readouterr().err
    assert err.count("tracker wandb: RuntimeError: the server is gone; it is left out") == 1
    assert "tracker tensorboard: ZeroDivisionError" in err
    assert [step for step, _ in made[0].lines] == [2, 4, 6] and made[0].tree["seed"] == 0
    assert left.differences(go(tmp_path / "b")) == []


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_trackers_write_into_the_run_folder_without_asking(tmp_path, monkeypatch, name):
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))

    def at(step: int, run: Run) -> None:
        if step == 3:
            Image.new("RGB", (8, 8)).save(run.folder / "grid.png")
            run.picture("grid.png", step)

    go(tmp_path / "run", at=at, log={"trackers": (name,)})
    pattern = {"tensorboard": "tensorboard/events.out.tfevents*", "wandb": "wandb/offline-run-*/run-*.wandb"}[name]
    assert list((tmp_path / "run").glob(pattern))


# Folder and machine ----------------------------------------------------------------------------------------------
def test_b2_too_little_space_is_an_error_before_the_first_step_unless_allowed(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=machine.SPARE_BYTES - 1)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=rf"run: {tmp_path}: {machine.SPARE_BYTES} bytes are needed .* {usage.free} are free; --allow_low"):
        Run(config(tmp_path), kind="toy")
    usage.free = machine.SPARE_BYTES + 100  # enough for the logs, not for checkpoints
    with Run(config(tmp_path), kind="toy") as run, pytest.raises(UserError, match="are free"):
        run.prepare(Toy())
    assert go(tmp_path, Flags(allow_low_space=True)).step == 12


def test_b3_folders_that_cannot_be_used_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    cases = {
        tmp_path / "file": "is a file; expected a folder",
        tmp_path / "file" / "run": "parent folder does not exist",
        tmp_path / "missing" / "run": "parent folder does not exist",
        tmp_path / ("n" * 300): "File name too long",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=f"^run: .*{message}"):
            Run(config(path), kind="toy")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UserError, match="run: .*locked cannot be written to: Permission denied"):
        Run(config(tmp_path / "locked"), kind="toy")


def test_a_relative_run_folder_is_made_with_its_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert go(Path("runs/deep/toy")).step == 12 and (tmp_path / "runs/deep/toy/config.yaml").exists()


def test_b4_a_folder_in_use_is_refused_and_free_after_an_error(tmp_path):
    def hold() -> None:
        Run(config(tmp_path), kind="toy")
        (tmp_path / "ready").touch()
        time.sleep(30)

    pid = fork(hold)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"in use by the run with pid {pid} on "):
        Run(config(tmp_path), kind="toy")
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, at=lambda step, run: 1 / 0)
    assert go(tmp_path).step == 12


def test_an_error_in_the_loop_says_rank_and_step(tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        go(tmp_path, at=lambda step, run: 1 / (3 - step))
    assert error.value.__notes__ == ["rank 0, step 4"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handlers are given back


def test_independent_runs_where_several_processes_were_asked_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "die_with_parent", lambda: None)
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr("accelerate.Accelerator", lambda **kwargs: alone)
    with pytest.raises(RunError, match="WORLD_SIZE is 2, but accelerate runs 1"):
        Run(config(tmp_path), kind="toy")


def test_nothing_is_printed_to_a_pipe_but_what_matters(tmp_path, capsys):
    go(tmp_path)
    out = capsys.readouterr()
    assert out.out == "" and out.err == ""


def test_all_tensors_of_a_batch_are_pinned(monkeypatch):
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 1)
    batch = {"index": torch.tensor([1]), "codes": [torch.tensor([2]), torch.tensor([3])], "label": None}
    assert pinned(batch) == {"index": 2, "codes": [3, 4], "label": None}


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_on_cuda_is_for_cards_that_compute_in_it(monkeypatch, native, expected):
    """Older ones emulate it, which torch counts as support unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert machine.pick_precision(RunConfig(run="r"), torch.device("cuda")) == expected


# Gradients ---------------------------------------------------------------------------------------------------------------
class Idle(Toy):
    """Has layers that no loss depends on."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.spare, self.more = nn.Linear(2, 2).requires_grad_(not frozen), nn.Linear(2, 2).requires_grad_(not frozen)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_parameter_without_a_gradient_is_an_error_before_any_weight_changes(tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr(f"{__name__}.Toy", Idle)
    told = "^parameters spare.weight, spare.bias, more.weight and 1 more get no gradient: every trained parameter must, in every step"
    stepped = []
    with pytest.raises(UserError, match=told):
        go(tmp_path / "run", accumulate=accumulate, at=lambda step, run: stepped.append(step))
    assert stepped == [] and checkpoints(tmp_path / "run" / "checkpoints") == []
    monkeypatch.setattr(f"{__name__}.Toy", lambda: Idle(frozen=True))
    go(tmp_path / "frozen", accumulate=accumulate)


def test_a_single_parameter_without_a_gradient_is_named():
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    check_gradients(module)
    module.bias.grad = None
    with pytest.raises(UserError, match="^parameter bias gets no gradient: "):
        check_gradients(module)
