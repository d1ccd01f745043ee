"""Sharded training (FSDP2, torch's ``fully_shard``; Zhao et al. 2023, arXiv:2304.11277): weights, gradients, moments and averages in
equal parts on all processes, for priors that do not fit into one.

It is asked for where accelerate is asked for it, by a launch with ``distributed_type: FSDP``, and works on CPUs too, where accelerate
alone would silently replicate. What is written is what one process writes: a checkpoint resumes under any number of processes,
sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from intarsia.config import ConfigError
from intarsia.distributed import Comm

if TYPE_CHECKING:  # which takes a second
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from intarsia.run_config import RunConfig

UNITS = ("Block", "LlamaDecoderLayer")  # classes whose weights are gathered and let go together; only their forward may use them
ENTRIES = ("nll",)  # what is called besides forward


def requested() -> bool:
    """Whether the launcher asked for sharding. Raises ConfigError for a kind of it that there is not."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version, offload = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower()
    if version != "2":
        raise ConfigError([f"fsdp_version: {version} in the launcher's configuration; expected 2"])
    if offload != "false":
        raise ConfigError([f"fsdp_offload_params: {offload} in the launcher's configuration; expected false"])
    return True


def check_sharded(config: RunConfig, kind: str, precision: str, world_size: int) -> None:
    """Raises ConfigError for a run that cannot be sharded."""
    if kind != "prior":
        what = f"a {kind} keeps statistics of whole batches and is small"
        raise ConfigError([f"distributed_type: FSDP in the launcher's configuration shards priors; {what}: launch with MULTI_GPU"])
    if precision == "fp16":
        raise ConfigError(["precision: 'fp16' has no loss scaling over shards; with FSDP expected one of auto, bf16, fp32, fp64"])
    if config.optim.muon:
        raise ConfigError([f"optim.muon: {config.optim.muon} needs whole matrices, which FSDP deals to the processes; expected 0"])
    if config.batch_size < config.accumulate * world_size:
        needed = f"expected at least {config.accumulate * world_size}, accumulate {config.accumulate} times {world_size} processes"
        raise ConfigError([f"batch_size: {config.batch_size} leaves some processes fewer micro-batches than others under FSDP; {needed}"])


def shard(module: nn.Module, device: torch.device, world_size: int) -> None:
    """Deals every parameter to the processes, in place: each of UNITS apart, the rest together. All must hold the same weights.

    Afterwards the parameters are DTensors, ``forward`` and ENTRIES gather what they need, and ``load_state_dict`` takes whole tensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size,))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for unit in [m for m in module.modules() if type(m).__name__ in UNITS]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=again)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in ENTRIES:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
    module.register_load_state_dict_pre_hook(_deal_state)


def _deal_state(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    for name, parameter in module.named_parameters():
        if name in state:
            state[name] = like(state[name], parameter)


def is_dealt(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def like(value: Tensor, example: Tensor) -> Tensor:
    """This process's part of a whole ``value`` that every process holds, where ``example`` is dealt; else ``value``."""
    if is_dealt(value) or not is_dealt(example):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes: a collective where it is dealt."""
    return tensor.full_tensor() if is_dealt(tensor) else tensor


def collect(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, one after the other; where ``keep`` is off, those that were dealt are let go again."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep and full is not tensor:
            full = full.cpu()
        if keep or full is tensor:
            found[name] = full
    return found


def is_sharded(module: object) -> bool:
    """Whether it is a module that ``shard`` has dealt to the processes."""
    return hasattr(module, "set_requires_gradient_sync")


def _units(module: nn.Module) -> list[FSDPModule]:
    return [m for m in module.modules() if is_sharded(m)]  # type: ignore[misc]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All weights whole on every process, so that processes may call the module a different number of times, without gradients."""
    if not is_sharded(module):
        yield
        return
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for unit in _units(module):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in _units(module):
            unit.reshard()
            unit.set_reshard_after_forward(again or unit is module, recurse=False)


def saver(save: Callable[[Path], Any], module: Any, comm: Comm) -> Callable[[Path], Any]:
    """``save``, a method of ``module``, on a whole copy of it in rank 0's memory. A collective where the module is sharded."""
    if not is_sharded(module):
        return save
    state = collect(module.state_dict(), keep=comm.rank == 0)

    def save_copy(folder: Path) -> Any:
        with torch.random.fork_rng(devices=[]):
            copy = _plain_class(type(module))(module.config, module._spec_from_dict(module._spec_dict()))
        copy.to(module.dtype).load_state_dict(state)
        return getattr(copy, save.__name__)(folder)

    return save_copy


def _plain_class(cls: type[Any]) -> type[Any]:
    """The class that ``fully_shard`` has put its own before."""
    return next(base for base in cls.__mro__ if not hasattr(base, "set_requires_gradient_sync"))
