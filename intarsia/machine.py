"""What a run needs of the machine: device, precision, processes and room on the disk."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from intarsia.cli import RunError, UserError
from intarsia.config import ConfigError
from intarsia.run_config import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

SPARE_BYTES = 64 << 20  # for logs, pictures and a release of moderate size


def env_rank() -> int:
    """The rank that the launcher gave this process; 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


def check_space(folder: Path, needed: int, allow_low_space: bool) -> None:
    """Raises UserError where fewer than ``needed`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed and not allow_low_space:
        raise UserError(
            f"run: {folder}: {needed} bytes are needed for checkpoints and what follows, {free} are free; --allow_low_space starts anyway"
        )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes that the tensors take; those on the meta device count as if they were real."""
    return sum(t.numel() * t.element_size() for t in tensors)


def pick_device(config: RunConfig) -> torch.device:
    """Raises ConfigError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["device: 'cuda', but torch sees no CUDA device; expected 'cpu' or 'auto'"])
    cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


@cache
def cpu_computes_bf16() -> bool:
    """True for processors with AVX512_BF16 or AMX; elsewhere bf16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_precision(config: RunConfig, device: torch.device) -> str:
    """fp32, bf16, fp16 or fp64. Raises ConfigError for fp16 on a CPU."""
    if config.precision == "fp16" and device.type != "cuda":
        raise ConfigError(["precision: 'fp16' needs CUDA; on this device expected one of auto, fp32, bf16, fp64"])
    if config.precision != "auto":
        return config.precision
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_computes_bf16()
    return "bf16" if fast else "fp32"


def die_with_parent() -> None:
    """On Linux, this process is killed when its launcher dies: it must not go on writing beside a restarted run."""
    if platform.system() == "Linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tell_launcher(error: BaseException) -> None:
    """Leaves the cause where torch's launcher looks for it, so that its last lines name rank, step and cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{notes}"
        Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def make_deterministic(device: torch.device) -> None:
    """Deterministic CUDA kernels; those that have none warn."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time, and nobody reads it
        torch.backends.cudnn.benchmark = False


def start_processes(config: RunConfig, device: torch.device) -> Accelerator:
    """accelerate's process group and placement.

    Raises:
        RunError: where WORLD_SIZE and accelerate disagree: several independent runs would write to one folder.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, PartialState

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        die_with_parent()
    if PartialState._shared_state and (PartialState().device.type, PartialState().num_processes) != (device.type, world):
        AcceleratorState._reset_state(reset_partial_state=True)  # that of an earlier run in this process, on another device
    accelerator = Accelerator(
        mixed_precision="no", cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))]
    )
    if accelerator.num_processes != world:
        raise RunError(
            f"WORLD_SIZE is {world}, but accelerate runs {accelerator.num_processes} process(es); on CPUs launch with"
            " ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator
