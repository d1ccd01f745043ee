"""The quantiser under test: fresh copies of one and the same start, and latents to feed it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from intarsia.distributed import Comm, comm
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers.base import Quantized, Quantizer
from stage1_tokenizer.quantizers.conformance.traits import Traits, table_of

SAMPLES = 12
GRIDS = ((1,), (5,), (3, 4), (2, 3, 2))
MOST_STEPS = 600  # where moving averages of 0.99 or less let codes die
_MOST_ROWS = 16384


class Subject:
    """Makes quantisers and runs them.

    Attributes:
        name: for the report.
        traits: what it promises beyond the interface.
        processes: two ranks are real processes.
        vocab: the largest vocabulary of its maps.
        copies: ``make`` copies one instance.
        grid, rows: of the usual batch of 12 samples, large enough that every code has some use; the positions of all of them.

    Raises:
        ValueError: where it has no ``dim`` or no ``level_specs``, without which nothing can be asked of it.
    """

    def __init__(self, name: str, make: Callable[[], Quantizer], traits: Traits, processes: bool, copies: bool = False) -> None:
        self.name, self.make, self.traits, self.processes, self.copies = name, make, traits, processes, copies
        self._start = self.build()
        self.dim, self.vocab = _sizes(name, self._start)
        self.grid = (math.ceil(min(_MOST_ROWS, max(360, 12 * self.vocab)) / SAMPLES),)
        self.rows = SAMPLES * self.grid[0]
        self._failure: Exception | None = None
        try:
            self._start.initialize(self.latents(SAMPLES, self.grid, seed=90).movedim(1, -1).flatten(0, -2), rng(0, SAMPLES))
        except Exception as error:  # what the class under test raises is an outcome of every check that wants it initialised
            self._failure = error
        self._start.train()

    def build(self, seed: int = 0) -> Quantizer:
        """As the constructor leaves it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def fresh(self, dtype: torch.dtype = torch.float32, training: bool = True) -> Quantizer:
        """A copy of the same initialised quantiser each time. Raises what ``initialize`` raised."""
        if self._failure is not None:
            raise self._failure
        return copy.deepcopy(self._start).to(dtype).train(training)

    def placed(self, offset: float) -> Quantizer:
        """One in eval mode whose first latents lay around ``offset``, and so its codebook, where it is set from them."""
        q = self.build()
        q.initialize((self.latents(SAMPLES, self.grid, seed=90) + offset).movedim(1, -1).flatten(0, -2), rng(0, SAMPLES))
        return q.eval()

    def latents(self, n: int, grid: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """(n, D, *grid) standard normal."""
        return StepRng(seed, 0, torch.arange(n)).normal("conformance", self.dim, *grid).to(dtype)

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """The usual batch."""
        return self.latents(SAMPLES, self.grid, seed, dtype)

    def far(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A batch far away from where the codebook was initialised."""
        return self.batch(seed, dtype) + 40.0

    def table(self, quantizer: Quantizer) -> Tensor:
        """(K, D) what the codes of a quantiser with one map stand for."""
        return table_of(quantizer).detach().clone()

    def usage(self, quantizer: Quantizer, z: Tensor) -> float:
        """The share of the codes in use that a batch uses, in eval mode: the least of all maps, or of their one table."""
        training = quantizer.training
        codes = quantizer.eval()(z).codes
        quantizer.train(training)
        known = min(part.codes_in_use(self.vocab) for part in quantizer.modules() if isinstance(part, Quantizer))  # fewer while they grow
        if self.traits.one_table:
            return torch.cat([c.flatten() for c in codes]).unique().numel() / known
        sizes = [min(level.vocab, known) for level in quantizer.level_specs("name", tuple(z.shape[2:]))]
        return min(c.unique().numel() / size for c, size in zip(codes, sizes, strict=True))

    @property
    def most_steps(self) -> int:
        """How long restarts may take: counts that hardly move say late that a code is dead."""
        return max(MOST_STEPS, min(20000, round(6 / (1 - self.traits.ema)))) if self.traits.ema is not None else MOST_STEPS

    def step(self, quantizer: Quantizer, z: Tensor, step: int, comm: Comm = comm, splits: tuple[int, ...] = (SAMPLES,)) -> list[Quantized]:
        """One training step over ``z`` in micro-batches of the given sizes; what each gave."""
        outs, start = [], 0
        for size in splits:
            outs.append(quantizer(z[start : start + size], rng(step, size, start)))
            start += size
        quantizer.update(rng(step, 1), comm)
        return outs


def _sizes(name: str, quantizer: Quantizer) -> tuple[int, int]:
    """``dim`` and the largest vocabulary."""
    try:
        dim, levels = quantizer.dim, quantizer.level_specs("codes", (1,))
        vocab = max(level.vocab for level in levels)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".strip(": ")
        needed = "the kit begins from dim (the channels of its latents) and level_specs (a LevelSpec for each map of codes)"
        raise ValueError(f"{name}: {needed}: {why}") from error
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"{name}: dim is {dim!r}; expected the channels of its latents, an int from 1 on")
    return dim, vocab


def unsaved_tensors(quantizer: Quantizer) -> list[str]:
    """The names of floating-point tensors that it holds, as buffers or plain attributes, and that are in no state dict."""
    saved = quantizer.state_dict().keys()
    held = {
        f"{path}.{name}".lstrip("."): tensor
        for path, module in quantizer.named_modules()
        for name, tensor in (*module._buffers.items(), *vars(module).items())
    }
    return [name for name, tensor in held.items() if torch.is_tensor(tensor) and tensor.is_floating_point() and name not in saved]


def rng(step: int, n: int, start: int = 0) -> StepRng:
    """The draws of samples start ... start + n - 1."""
    return StepRng(0, step, torch.arange(start, start + n))


def restarts(stats: Mapping[str, Tensor]) -> float | None:
    """How many codes were restarted, by what ``update`` returned; None where it does not say."""
    found = [float(value) for name, value in stats.items() if name.split("/")[0] == "restarts"]
    return sum(found) if found else None


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    """A copy of everything that a checkpoint would hold."""
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}
