"""What ranks settle together: that rank 0 succeeded in what only it does, and that all hold the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.checkpoint import CheckpointError
from intarsia.cli import RunError
from intarsia.distributed import Comm
from intarsia.sharding import is_dealt
from intarsia.tensor_files import module_tensors


@contextmanager
def on_main(what: str, comm: Comm, device: torch.device) -> Iterator[None]:
    """Around what only rank 0 does: where it fails there, it fails on all ranks, which would else wait for it.

    Raises:
        RunError: for an OSError or CheckpointError of rank 0, and on the other ranks for any error of its.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below, when the other ranks know
        failure = error
    failed = bool(comm.all_reduce_sum_(torch.tensor(int(failure is not None), device=device)))
    if isinstance(failure, OSError | CheckpointError):
        raise RunError(str(failure)) from failure
    if failure is not None:
        raise failure
    if failed:
        raise RunError(f"{what}: rank 0 failed")


def compare_ranks(module: nn.Module, comm: Comm, step: int) -> None:
    """Raises RunError on every rank unless all hold the same bits in every parameter and buffer; 16 bytes per tensor are sent.

    Of tensors that are dealt to the ranks, each holds its own part: they are not compared.
    """
    tensors = {name: tensor for name, tensor in module_tensors(module).items() if not is_dealt(tensor)}
    if comm.world_size == 1 or not tensors:
        return
    hashes = [hashlib.blake2b(_bytes(tensor), digest_size=16).digest() for tensor in tensors.values()]
    device = next(iter(tensors.values())).device
    mine = torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64).view(1, -1, 2).to(device)
    rows = comm.gather_rows(mine)
    differs = (rows != rows[:1]).any(2)
    if bool(differs.any()):
        rank, tensor = (int(v) for v in differs.nonzero()[0])
        others = int(differs.any(0).sum()) - 1
        raise RunError(f"step {step}: ranks {rank} and 0 differ in {list(tensors)[tensor]!r} and {others} more tensors")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
