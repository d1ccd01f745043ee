"""What a checkpoint holds, gathered from the objects that own it and given back to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from intarsia import yaml_io
from intarsia.checkpoint import load_checkpoint
from intarsia.config import ConfigError, differences
from intarsia.distributed import Comm
from intarsia.journal import Journal
from intarsia.run_config import RunConfig
from intarsia.sharding import collect, like
from intarsia.stepping import Stepper

State = dict[str, dict[str, Tensor]]


def compare_configs(old_tree: Mapping[str, Any], new: RunConfig, where: str) -> None:
    """Raises ConfigError with both values of each identity field that differs from those of an earlier run."""
    try:
        old = type(new).from_dict(old_tree)
    except ConfigError as error:
        raise ConfigError([f"run: {where} was made by another kind or version of run: {error.errors[0]}"]) from None
    found = differences(old, new)
    if found:
        advice = "take another run folder, or this value"
        raise ConfigError([f"{path}: {b!r}, but {where} was made with {a!r}; {advice}" for path, a, b in found])


def has_results(folder: Path) -> bool:
    """Whether a run in this folder left a checkpoint or a release."""
    return any(folder.glob("checkpoints/step-*")) or (folder / "model").exists()


def compare_with_folder(folder: Path, config: RunConfig) -> None:
    """Refuses a run folder with results of another configuration; one without any is taken over."""
    path = folder / "config.yaml"
    if path.exists() and has_results(folder):
        try:
            tree = yaml_io.load(path.read_text())
        except (yaml_io.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError([f"run: {path}: {error}"]) from None
        compare_configs(tree, config, str(folder))


def load_for(config: RunConfig, path: Path) -> tuple[int, State, dict[str, Any]]:
    """(step, state, meta) of a checkpoint that belongs to ``config``.

    Raises:
        CheckpointError: where it is damaged. ConfigError: where it is of another configuration, or beyond ``steps``.
    """
    step, state, meta = load_checkpoint(path)
    compare_configs(meta["config"], config, str(path))
    if config.steps < step:
        raise ConfigError([f"steps: {config.steps}, but {path} is of step {step}; steps may only grow"])
    return step, state, meta


@runtime_checkable
class Folds(Protocol):
    """A further module with sums of its own on each rank, which it makes equal on all before they are saved."""

    def fold(self, comm: Comm) -> None: ...


@dataclass
class RunState:
    """The objects whose state makes a run. ``extra``: further modules, such as an objective with a critic."""

    stepper: Stepper
    journal: Journal
    extra: Mapping[str, nn.Module]

    def collect(self, comm: Comm) -> tuple[State, dict[str, Any]]:
        """({part: {name: tensor}}, the rest as a JSON tree). A collective: running means and dealt tensors come to rank 0."""
        s = self.stepper
        for module in self.extra.values():
            if isinstance(module, Folds):
                module.fold(comm)
        state: State = {"module": _tensors(s.module), "means": s.means.fold(comm)}
        names, moments = self._names, s.optimizer.state_dict()["state"]
        state["optimizer"] = {f"{names[i]}/{key}": value for i, entry in moments.items() for key, value in entry.items()}
        if s.average is not None:
            state["average"] = s.average.values
        state |= {f"extra-{name}": _tensors(module) for name, module in self.extra.items()}
        state = {part: collect(tensors, keep=comm.rank == 0) for part, tensors in state.items()}
        best = self.journal.best
        rest = {"best": best if best is None or math.isfinite(best) else str(best), "stale": self.journal.stale, "bad_steps": s.bad_steps}
        return state, rest | {"scaler": None if s.scaler is None else s.scaler.state_dict()}

    def restore(self, state: State, rest: Mapping[str, Any], comm: Comm) -> None:
        """Raises ValueError where a part is missing or does not fit."""
        s = self.stepper
        wanted = {"module", "means", "optimizer"} | ({"average"} if s.average else set()) | {f"extra-{name}" for name in self.extra}
        if wanted != state.keys():
            raise ValueError(f"the checkpoint holds {', '.join(sorted(state))}; expected {', '.join(sorted(wanted))}")
        _load(s.module, state["module"], "module")
        for name, module in self.extra.items():
            _load(module, state[f"extra-{name}"], name)
        self._load_optimizer(state["optimizer"])
        if s.average is not None:
            s.average.load(state["average"])
        s.means.restore(state["means"], comm)
        if s.scaler is not None and rest["scaler"] is not None:
            s.scaler.load_state_dict(rest["scaler"])
        self.journal.best = None if rest["best"] is None else float(rest["best"])  # JSON has no inf
        self.journal.stale, s.bad_steps = rest["stale"], rest["bad_steps"]

    @property
    def _names(self) -> list[str]:
        """A name for each parameter, in the order of the optimizer."""
        modules = {"": self.stepper.module, **{f"{name}.": module for name, module in self.extra.items()}}
        known = {id(p): prefix + name for prefix, module in modules.items() for name, p in module.named_parameters()}
        return [known.get(id(p), f"parameter {i}") for i, p in enumerate(self.stepper.trained)]

    def _load_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        optimizer, number = self.stepper.optimizer, {name: i for i, name in enumerate(self._names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            name, _, part = key.rpartition("/")
            if name not in number or (value.ndim > 0 and value.shape != self.stepper.trained[number[name]].shape):
                raise ValueError(f"optimizer: the checkpoint has {key!r} {tuple(value.shape)}, which fits no trained parameter")
            state.setdefault(number[name], {})[part] = like(value, self.stepper.trained[number[name]]) if value.ndim else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _load(module: nn.Module, saved: Mapping[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(dict(saved), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{what}: the checkpoint does not fit: {' '.join(str(error).split())}") from None
