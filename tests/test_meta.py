"""A module is counted on the meta device before a byte of it is allocated."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from intarsia.meta import BudgetError, budget, build_on_meta


class Block(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.embed = nn.Embedding(width, 2)
        self.register_buffer("table", torch.zeros(width))


def needed(width: int, depth: int) -> int:
    return 4 * (depth * (width * width + width) + 2 * width + width)


def test_shapes_and_dtypes_are_those_of_the_real_module() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        meta, real = build_on_meta(Block, 8, 2, dtype), Block(8, 2).to(dtype)
        assert all(t.is_meta for t in meta.state_dict().values())
        described = [{k: (t.shape, t.dtype) for k, t in m.state_dict().items()} for m in (meta, real)]
        assert described[0] == described[1]


def test_the_budget_counts_every_byte() -> None:
    build_on_meta(Block, 8, 2, max_bytes=needed(8, 2))
    with pytest.raises(BudgetError, match=f"max_bytes is {needed(8, 2) - 1}"):
        build_on_meta(Block, 8, 2, max_bytes=needed(8, 2) - 1)
    with pytest.raises(BudgetError, match=f"needs {2 * needed(8, 2)} bytes; max_bytes is {needed(8, 2)}"):
        build_on_meta(Block, 8, 2, torch.float64, max_bytes=needed(8, 2))


def test_a_module_of_too_many_tensors_is_refused_while_it_is_built() -> None:
    with pytest.raises(BudgetError, match="more than 10000 tensors"):
        build_on_meta(Block, 1, 10**9)


def test_the_budget_is_that_of_its_thread_and_ends_with_its_block() -> None:
    built = []
    with budget(100):
        thread = threading.Thread(target=lambda: built.append(nn.Linear(100, 100)))
        thread.start()
        thread.join()
        with pytest.raises(BudgetError):
            nn.Linear(100, 100)
    assert built and nn.Linear(100, 100)


def test_a_module_built_afterwards_is_initialised_again() -> None:
    build_on_meta(Block, 8, 1)
    assert nn.Linear(8, 8).weight.abs().sum() > 0 and not nn.Linear(8, 8).weight.is_meta
