"""What a vector quantiser costs: forward, backward and the moving averages of N = 8192 latents, and its peak memory.

``python -m benchmarks.quantizer [KxD ...] [memory] [--device cuda]``; all cases without a choice. Four are interleaved in float32:

* ours: ``VQ`` with its defaults (restarts included);
* textbook: the distance matrix, one-hot assignments and products with them, as in most tutorials;
* peer: vector-quantize-pytorch with the same settings, without restarts (and without its rotation trick, which ours has off too);
* the floor: ``z @ E.T``, written to a fresh N x K matrix.

Each size has a process of its own: whether memory is fresh depends on what an allocator has kept of the sizes before.
Latents are the output of a network, (8, D, 32, 32) in channels-last layout, and the loss is that of a decoder plus the quantiser's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import Row, interleaved, pin, ratios, report, row, show

BATCH, SIDE = 8, 32
SIZES = [(k, d) for d in (8, 64, 256) for k in (512, 1024, 8192, 16384)]
REPEATS = 7
LARGE = {"n": 65536, "codes": 16384, "dim": 64}  # of the memory case


def latents(dim: int, device: str) -> Any:
    """(8, D, 32, 32), channels last, that ask for a gradient."""
    import torch

    z = torch.randn(BATCH, dim, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
    return z.requires_grad_()


def ours(codes: int, dim: int, device: str) -> Callable[[], None]:
    """One training step of ``VQ``."""
    import torch

    from intarsia.distributed import comm
    from intarsia.rng import StepRng
    from stage1_tokenizer.quantizers.vq import VQ, VQConfig

    torch.manual_seed(0)
    quantizer = VQ(VQConfig(codes=codes, dim=dim, init="normal")).to(device).train()
    z, index = latents(dim, device), torch.arange(BATCH, device=device)

    def step() -> None:
        z.grad = None
        rng = StepRng(0, 0, index)
        out = quantizer(z, rng)
        (out.z.sum() + out.loss).backward()
        quantizer.update(rng, comm)

    return step


def textbook(codes: int, dim: int, device: str) -> Callable[[], None]:
    """One training step of what tutorials show: distances by ``a^2 + b^2 - 2ab``, ``argmin``, one-hot, ``z + (q - z).detach()``."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    codebook = torch.randn(codes, dim, device=device) * dim**-0.5
    counts, sums = torch.ones(codes, device=device), codebook.clone()
    z, decay, eps = latents(dim, device), 0.99, 1e-5

    def step() -> None:
        z.grad = None
        flat = z.permute(0, 2, 3, 1).reshape(-1, dim)
        distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.t()
        index = distance.argmin(1)
        onehot = F.one_hot(index, codes).to(flat.dtype)
        quantized = onehot @ codebook
        with torch.no_grad():
            counts.mul_(decay).add_(onehot.sum(0), alpha=1 - decay)
            sums.mul_(decay).add_(onehot.t() @ flat, alpha=1 - decay)
            total = counts.sum()
        loss = 0.25 * F.mse_loss(flat, quantized.detach())
        out = flat + (quantized - flat).detach()
        (out.view(BATCH, SIDE, SIDE, dim).permute(0, 3, 1, 2).sum() + loss).backward()
        with torch.no_grad():
            codebook.copy_(sums / ((counts + eps) / (total + codes * eps) * total)[:, None])

    return step


def peer(codes: int, dim: int, device: str) -> Callable[[], None]:
    """One training step of vector-quantize-pytorch's ``VectorQuantize``."""
    import torch
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    options = {"decay": 0.99, "commitment_weight": 0.25, "kmeans_init": False, "threshold_ema_dead_code": 0, "rotation_trick": False}
    options["accept_image_fmap"] = True
    quantizer = VectorQuantize(dim=dim, codebook_size=codes, **options).to(device).train()
    z = latents(dim, device)

    def step() -> None:
        z.grad = None
        out, _, loss = quantizer(z)
        (out.sum() + loss.sum()).backward()

    return step


def floor(codes: int, dim: int, device: str) -> Callable[[], None]:
    """The product alone."""
    import torch

    torch.manual_seed(0)
    rows, codebook = torch.randn(BATCH * SIDE * SIDE, dim, device=device), torch.randn(codes, dim, device=device)
    return lambda: (rows @ codebook.T, None)[1]


def waited(case: Callable[[], None], device: str) -> Callable[[], None]:
    """``case`` until its last kernel is through."""
    import torch

    def call() -> None:
        case()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def speed(codes: int, dim: int, device: str, repeats: int) -> list[Row]:
    """Ratios of neighbouring measurements, and milliseconds."""
    makers = {"ours": ours, "textbook": textbook, "peer": peer, "z @ E.T": floor}
    seconds = interleaved({name: waited(make(codes, dim, device), device) for name, make in makers.items()}, repeats)
    case = f"K={codes}, D={dim}" + ("" if device == "cpu" else f", {device}")
    return [
        row("quantizer", f"textbook / ours, {case}", ratios(seconds["textbook"], seconds["ours"]), "times"),
        row("quantizer", f"vector-quantize-pytorch / ours, {case}", ratios(seconds["peer"], seconds["ours"]), "times"),
        row("quantizer", f"ours / z @ E.T, {case}", ratios(seconds["ours"], seconds["z @ E.T"]), "times"),
        *(row("quantizer", f"{name}, {case}", [1e3 * s for s in taken], "ms") for name, taken in seconds.items()),
    ]


def memory() -> list[Row]:
    """MB by which the peak resident memory grows in two training steps over latents that the process holds already."""
    case = "peak extra memory, N={n}, K={codes}, D={dim}".format(**LARGE)
    return [row("quantizer", case, [grown(**LARGE)], "MB")]


def measured(case: str, device: str, repeats: int) -> list[Row]:
    """One case: a size such as 512x64, or "memory"."""
    pin()
    if case == "memory":
        return memory()
    codes, dim = (int(word) for word in case.split("x"))
    return speed(codes, dim, device, repeats)


def grown(n: int, codes: int, dim: int) -> float:
    """MB (10^6 bytes) that two training steps add to the peak, beside latents, their gradient and the codebook; in a fresh process."""
    import resource

    import torch

    from intarsia.distributed import comm
    from intarsia.rng import StepRng
    from stage1_tokenizer.quantizers.vq import VQ, VQConfig

    torch.set_num_threads(1)
    quantizer = VQ(VQConfig(codes=codes, dim=dim, init="normal")).train()
    z = torch.randn(n // 1024, 32, 32, dim).permute(0, 3, 1, 2).requires_grad_()
    small = torch.randn(1, 2, dim).movedim(-1, 1).requires_grad_()  # loads the kernels

    def step(latents: torch.Tensor, rng: StepRng) -> None:
        out = quantizer(latents, rng)
        (out.z.sum() + out.loss).backward()
        quantizer.update(rng, comm)

    def peak() -> float:
        status = Path("/proc/self/status")
        if status.is_file():  # Linux: ru_maxrss would begin with what the parent had when it started this process
            return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / 1e6 if sys.platform == "darwin" else used * 1024 / 1e6

    step(small, StepRng(0, 0, torch.arange(1)))
    z.grad = torch.zeros_like(z).fill_(0.0)
    before = peak()
    for number in range(2):
        step(z, StepRng(0, number, torch.arange(n // 1024)))
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizer")
    parser.add_argument("cases", nargs="*", help='sizes such as 512x64 (K x D), and "memory"')
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    cases = given.cases or [f"{k}x{d}" for k, d in SIZES] + ["memory"]
    found: list[Row] = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows = fresh.submit(measured, case, given.device, given.repeats).result()
        show(rows, sys.stderr)
        found += rows
    pin()  # what the report says of the machine is what was measured on
    report("quantizer", found, "vector-quantize-pytorch")


if __name__ == "__main__":
    main()
