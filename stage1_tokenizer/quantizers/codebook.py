"""What quantisers with one table of K vectors share: one map of codes, decoding, and the statistics of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.distributed import Comm
from intarsia.rng import StepRng
from intarsia.specs import LevelSpec
from stage1_tokenizer.quantizers import statistics
from stage1_tokenizer.quantizers.base import Quantizer, check_codes


class CodebookQuantizer(Quantizer):
    """Base of VQ, SimVQ and Gumbel.

    Attributes:
        codes: K.
        slots: candidates for restarts that are kept in a step.
        averages: sums of the latents of each code are kept in a step.
        initialized: () bool; while it is false, ``initialize`` sets the codebook.
    """

    codes: int
    slots: int = 0
    averages: bool = False
    initialized: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codes, self.dim = codes, dim
        self._pending: statistics.Pending = {}

    def level_specs(self, name: str, grid: tuple[int, ...]) -> tuple[LevelSpec, ...]:
        return (LevelSpec(name, self.codes, grid),)

    def vectors(self) -> Tensor:
        """(K, D) the vectors that codes stand for."""
        raise NotImplementedError

    def decode(self, codes: tuple[Tensor, ...], depth: Tensor | None = None) -> Tensor:
        if len(codes) != 1:
            raise ValueError(f"codes: {len(codes)} maps; {self.type_name} has one")
        check_codes(codes[0], self.codes)
        return F.embedding(codes[0], self.vectors()).movedim(-1, 1)

    def remedy(self, name: str, again: bool = False) -> None:
        """The first remedy of any of them has the codebook set anew; what else a remedy changes, ``remedy`` of the class adds."""
        known = self.remedies()
        if name not in known:
            super().remedy(name)
        if name == known[0] and not again:
            self.initialized.fill_(False)

    def _check_first(self, z: Tensor) -> None:
        """Raises ValueError where ``z`` is no finite (n > 0, D): what ``initialize`` begins from."""
        if z.ndim != 2 or z.shape[1] != self.dim or z.shape[0] == 0:
            raise ValueError(f"latents: shape {tuple(z.shape)}; expected (n > 0, {self.dim})")
        if not bool(torch.isfinite(z).all()):
            raise ValueError("latents: NaN or inf; the codebook is left as it was")

    def _nothing(self) -> statistics.Pending:
        return statistics.nothing(self.codes, self.dim, self._table(), sums=self.averages, slots=self.slots)

    def _table(self) -> Tensor:
        """A floating-point tensor of the module: its dtype and device are those of the statistics."""
        return next(t.detach() for t in (*self.buffers(), *self.parameters()) if t.is_floating_point())

    def _count(self, rows: Tensor, codes: Tensor, batch: int, finite: Tensor, active: Tensor | None, rng: StepRng | None) -> None:
        """Adds a micro-batch to the statistics of the step."""
        if self.slots and rng is None:
            raise ValueError("rng: a StepRng is needed in training while restart > 0")
        if not self._pending:
            self._pending = self._nothing()
        statistics.add(self._pending, rows.detach(), codes, batch, finite, active, rng)

    def _reduce(self, comm: Comm) -> statistics.Pending:
        """The statistics of all ranks, which are consumed by it."""
        if not self._pending and comm.world_size == 1:
            raise RuntimeError("update: no forward in training mode since the last update")
        pending, self._pending = self._pending or self._nothing(), {}  # of several ranks, one may have had no sample
        return statistics.reduce(pending, comm)

    def finite(self) -> Tensor:
        return self._pending["finite"] if self._pending else torch.ones((), dtype=torch.bool, device=self._table().device)

    def discard(self) -> None:
        self._pending = {}

    @torch.no_grad()
    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        """Perplexity and usage of the step, over the ranks."""
        return statistics.usage(self._reduce(comm)["counts"])
