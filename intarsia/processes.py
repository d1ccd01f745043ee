"""The device and the processes of a script that trains nothing: encoding, evaluation."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch

from intarsia.cli import RunError
from intarsia.config import ConfigError
from intarsia.distributed import comm
from intarsia.machine import die_with_parent


def start(device: str, timeout: float) -> torch.device:
    """The device to compute on; where a launcher started several processes, they are joined into a group.

    Args:
        device: auto, cpu or cuda.
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ConfigError: another word than these; cuda where there is none. RunError: where WORLD_SIZE processes do not find each other.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError([f"device: {device!r}; expected auto, cpu or cuda: each process has a card of its own"])
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError(["device: 'cuda', but torch sees no CUDA device; expected 'cpu' or 'auto'"])
    place = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return place
    from accelerate import PartialState

    die_with_parent()
    state = PartialState(cpu=place.type == "cpu", timeout=timedelta(seconds=timeout))
    if state.num_processes != world or comm.world_size != world:
        raise RunError(
            f"WORLD_SIZE is {world}, but accelerate joined {state.num_processes} process(es); on CPUs launch with"
            " ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    atexit.register(state.destroy_process_group)
    return state.device
