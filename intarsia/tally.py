"""How often each code occurs: a table of the vocabulary, or, where that is too large, a list of the codes that occurred."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from intarsia.distributed import Comm

LARGEST = 1 << 22  # codes up to which a table is kept: 32 MB


class Tally:
    """Counts of codes in [0, vocab).

    Attributes:
        vocab: K.
        table: (vocab,) int64, how often each code occurred; None where that would be too large.
    """

    def __init__(self, vocab: int, device: torch.device | str = "cpu") -> None:
        self.vocab = vocab
        self.table = torch.zeros(vocab, dtype=torch.int64, device=device) if vocab <= LARGEST else None
        self._codes = self._counts = torch.zeros(0, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """codes: integers of any shape. Raises ValueError for one outside [0, vocab)."""
        flat = codes.flatten().to(torch.int64)
        if flat.numel() == 0:
            return
        low, high = (int(value) for value in torch.aminmax(flat))
        if low < 0 or high >= self.vocab:
            raise ValueError(f"value {low if low < 0 else high}; expected [0, {self.vocab - 1}]")
        if self.table is not None:
            self.table += torch.bincount(flat, minlength=self.vocab).to(self.table.device)
        else:
            self._add(*flat.unique(return_counts=True))

    def _add(self, codes: Tensor, counts: Tensor) -> None:
        codes, counts = (torch.cat([old, new.to(old.device)]) for old, new in ((self._codes, codes), (self._counts, counts)))
        self._codes, place = codes.unique(return_inverse=True)
        self._counts = torch.zeros_like(self._codes).index_add_(0, place, counts)

    def merge(self, other: Tally) -> Self:
        """Adds what ``other``, of the same vocabulary, has counted; returns self."""
        if self.table is not None:
            assert other.table is not None
            self.table += other.table.to(self.table.device)
        else:
            self._add(other._codes, other._counts)
        return self

    def all_reduce_(self, comm: Comm) -> Self:
        """Adds up over the ranks."""
        if self.table is not None:
            comm.all_reduce_sum_(self.table)
        else:
            everyone = comm.gather_rows(torch.stack([self._codes, self._counts], 1))
            self._codes, self._counts = self._codes[:0], self._counts[:0]
            self._add(everyone[:, 0], everyone[:, 1])
        return self

    def occurred(self) -> Tensor:
        """(used,) int64: the counts of the codes that occurred, by code."""
        return self._counts if self.table is None else self.table[self.table > 0]
