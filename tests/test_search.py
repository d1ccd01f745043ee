"""The nearest code is exact on every path, costs are obeyed, and no N x K matrix is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from intarsia.machine import cpu_computes_bf16
from intarsia.rng import StepRng
from stage1_tokenizer.quantizers import search, shortlist
from stage1_tokenizer.quantizers.equal_rows import first_of_each
from stage1_tokenizer.quantizers.search import kmeans, nearest
from stage1_tokenizer.quantizers.vq import VQ, VQConfig


def step_rng(step: int, n: int) -> StepRng:
    return StepRng(seed=0, step=step, index=torch.arange(n))


class Largest(TorchDispatchMode):
    """The most elements of any operator's result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.fixture(params=["packed", "plain", "chunks"])
def path(request, monkeypatch):
    monkeypatch.setattr(search, "_packs", lambda: request.param != "plain" and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    if request.param == "chunks":
        monkeypatch.setattr(search, "_CHUNK_FLOATS", 1)  # a block of codes each


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 64, 256, 300, 1000, 1024])
@pytest.mark.parametrize("n", [1, 7, 64, 3000])
def test_search_finds_the_brute_force_minimum(path, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k * n)
    rows, codebook = torch.randn(n, 8, dtype=dtype), torch.randn(k, 8, dtype=dtype)
    distance = torch.cdist(rows.double(), codebook.double()).square()
    chosen = distance.gather(1, nearest(rows, codebook)[:, None])[:, 0]
    assert torch.all(chosen <= distance.amin(1) * (1 + 1e-6) + 1e-6)


@pytest.mark.parametrize("k", [5, 300, 512])
def test_costs_are_weighed_against_distances_and_an_infinite_one_is_never_paid(path, k: int) -> None:
    torch.manual_seed(k)
    rows, codebook, cost = torch.randn(500, 4), torch.randn(k, 4), torch.rand(k) * 3
    cost[k // 2 :] = float("inf")
    total = torch.cdist(rows.double(), codebook.double()).square() + cost
    codes = nearest(rows, codebook, cost)
    assert codes.max() < k // 2
    assert torch.all(total.gather(1, codes[:, None])[:, 0] <= total.amin(1) + 1e-5)


short = pytest.mark.skipif(not cpu_computes_bf16(), reason="a shortlist wants a processor with AVX512_BF16 or AMX")


def searched(rows: Tensor, codebook: Tensor, cost: Tensor | None = None) -> tuple[Tensor, int]:
    """By a shortlist, and how many rows it does not tell."""
    rest = [0]

    def count(some: Tensor) -> Tensor:
        rest[0] = len(some)
        return search._nearest(some, codebook, cost)

    return shortlist.shortlisted(rows, codebook, cost, count), rest[0]


@short
@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e3])
@pytest.mark.parametrize(("k", "dim"), [(1024, 32), (1000, 64), (4099, 100), (2048, 256)])
def test_a_shortlist_holds_the_brute_force_minimum(k: int, dim: int, scale: float, offset: float, spread: float) -> None:
    """Rows beside their codes, as in a trained tokenizer, and anywhere; around 0 and far from it; with costs, some infinite."""
    codebook = torch.randn(k, dim)
    rows = codebook[torch.randint(k, (700,))] + spread * torch.randn(700, dim)
    rows, codebook = ((t + offset) * scale for t in (rows, codebook))
    cost = torch.rand(k) * scale**2 * dim
    cost[k // 2 :] = float("inf")
    for price in (None, cost):
        total = torch.cdist(rows.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        total = total if price is None else total + price
        codes, rest = searched(rows, codebook, price)
        slack = 1e-6 * (total.amin(1) + (scale * (1 + offset)) ** 2 * dim)
        assert torch.all(total.gather(1, codes[:, None])[:, 0] <= total.amin(1) + slack)
        assert rest < 700, "else nothing was found by it"


@short
def test_a_shortlist_without_its_bound_would_miss(monkeypatch) -> None:
    rows, codebook = torch.randn(4096, 64), torch.randn(4096, 64)
    exact = search._nearest(rows, codebook, None)
    assert torch.equal(searched(rows, codebook)[0], exact)
    real = shortlist._best
    monkeypatch.setattr(shortlist, "_UNIT", 0.0)
    monkeypatch.setattr(shortlist, "_best", lambda scores, z, bound, *rest: real(scores, z, torch.zeros_like(bound), *rest))
    assert not torch.equal(searched(rows, codebook)[0], exact)


@short
def test_rows_that_a_shortlist_does_not_tell_are_searched_in_float32() -> None:
    codebook = torch.randn(2048, 64)
    rows = torch.randn(600, 64)
    rows[0], rows[1], rows[2], rows[3] = float("nan"), float("inf"), codebook.mean(0), 1e30
    assert torch.equal(searched(rows, codebook)[0], search._nearest(rows, codebook, None)) and 3 <= searched(rows, codebook)[1] < 100
    crowd = codebook.clone()
    crowd[:1000] = 3 * codebook[0] + 1e-4 * codebook[:1000]  # a thousand codes in one place
    rows[4:] = 3 * codebook[0]
    assert searched(rows, crowd)[1] == 600
    for alike in (torch.zeros(2048, 64), torch.ones(2048, 64), codebook * 1e-25):
        assert torch.equal(searched(rows, alike)[0], search._nearest(rows, alike, None))
    twice = torch.cat([codebook, codebook])
    assert searched(torch.randn(600, 64), twice)[0].max() < 2048, "of equals, the first"


@short
def test_large_searches_take_the_shortlist_and_small_ones_do_not(monkeypatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = search.shortlisted
    monkeypatch.setattr(search, "shortlisted", lambda rows, codebook, *rest: calls.append(rows.shape) or real(rows, codebook, *rest))
    for n, k, dim in ((512, 4096, 32), (511, 4096, 32), (512, 512, 512), (512, 16384, 8)):
        nearest(torch.randn(n, dim), torch.randn(k, dim))
    nearest(torch.randn(512, 64, dtype=torch.float64), torch.randn(1024, 64, dtype=torch.float64))
    assert calls == [(512, 32)]


@pytest.mark.parametrize("n", [32, 2000])
def test_of_equal_codes_the_first_is_chosen(path, n: int) -> None:
    codebook = torch.randn(512, 4)
    codebook[300:] = codebook[:212]
    assert nearest(codebook.repeat(4, 1)[:n], codebook).max() < 300


def test_a_row_that_is_not_a_number_still_gets_a_code_in_range(path) -> None:
    rows = torch.randn(100, 4)
    rows[3], rows[5] = float("nan"), float("inf")
    for k in (5, 300, 1024):
        codes = nearest(rows, torch.randn(k, 4))
        assert codes.min() >= 0 and codes.max() < k


def test_chunks_cover_the_codes_once_in_whole_blocks() -> None:
    for k, dim in [(256, 1), (1024, 256), (1088, 300), (16384, 256), (320, 1 << 20)]:
        parts = search._chunks(k, dim)
        assert torch.equal(torch.cat([torch.arange(k)[part] for part in parts]), torch.arange(k))
        assert all((part.stop - part.start) % 64 == 0 < part.stop - part.start for part in parts)
        assert max(part.stop - part.start for part in parts) <= max(64, (1 << 18) // dim)


def test_tiles_cover_the_rows_once() -> None:
    for n, k in [(1, 1), (10, 1 << 20), (5000, 512)]:
        rows = torch.arange(n)
        assert torch.equal(torch.cat([rows[t] for t in search.tiles(n, k, rows.device)]), rows)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_neither_forward_nor_backward_makes_an_n_by_k_tensor(path, update: str, entropy: float) -> None:
    n, k, d = 8192, 2048, 4
    quantizer = VQ(VQConfig(codes=k, dim=d, init="normal", update=update, entropy={"weight": entropy}))
    z = torch.randn(8, d, n // 8, requires_grad=True)
    with Largest() as largest:
        out = quantizer(z, step_rng(0, 8))
        (out.z.sum() + out.loss).backward()
    assert n * d <= largest.elements <= search._TILE_FLOATS["cpu"] < n * k // 16


@pytest.mark.parametrize(("k", "dim", "offset"), [(64, 32, 100.0), (512, 32, 100.0), (64, 8, 1000.0), (1000, 8, 1000.0)])
def test_latents_far_from_the_origin_get_their_nearest_code(path, k: int, dim: int, offset: float) -> None:
    """At |z| = 2800 the squares alone are 8 million, of which float32 tells 1 apart; the distances are about 0.0003."""
    draw = torch.Generator().manual_seed(0)
    codebook, rows = (offset + 0.01 * torch.randn(n, dim, generator=draw) for n in (k, 3000))
    codes = nearest(rows, codebook)
    distance = torch.cdist(rows.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distance.gather(1, codes[:, None])[:, 0]
    assert bool((chosen <= distance.amin(1) * (1 + 1e-4)).all())


def test_kmeans_lowers_the_distortion_and_leaves_no_two_centres_equal() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2000, 3)
    first = rows[torch.randperm(2000)[:50]]
    centres, counts = kmeans(rows, 50, step_rng(0, 0))

    def distortion(c: Tensor) -> float:
        return torch.cdist(rows, c).amin(1).square().mean().item()

    assert distortion(centres) < 0.8 * distortion(first)
    once, _ = kmeans(rows, 50, step_rng(0, 0), iterations=1)
    assert distortion(centres) < 0.95 * distortion(once)
    assert counts.sum() == 2000
    few, _ = kmeans(rows[:10], 50, step_rng(0, 0))
    assert few.unique(dim=0).shape[0] == 50


def test_kmeans_moves_centres_that_no_row_is_nearest_to() -> None:
    torch.manual_seed(0)
    rows = torch.cat([torch.zeros(50, 3), torch.randn(50, 3)])  # about half of the first centres are equal
    _, counts = kmeans(rows, 16, step_rng(0, 0))
    assert (counts > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.9, 0.97, 0.988, 0.995, 1.0])
def test_kmeans_of_rows_many_of_which_are_equal_leaves_no_two_centres_equal(share: float, dtype: torch.dtype) -> None:
    """Blank patches: of 20,000 rows 2,000, 600, 240 or 100 differ, or none."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(20000, 8, generator=draw, dtype=dtype)
    rows[torch.rand(20000, generator=draw) < share] = 0.5
    centres, counts = kmeans(rows, 256, step_rng(0, 0))
    assert centres.unique(dim=0).shape[0] == 256 and counts.sum() == 20000 and centres.dtype == dtype
    assert torch.equal(kmeans(rows, 256, step_rng(0, 0))[0], centres)
    different = rows.unique(dim=0).shape[0]
    assert (counts > 0).sum() == min(different, 256)
    if different <= 256:
        torch.testing.assert_close(centres[nearest(rows, centres)], rows)


def test_rows_are_equal_where_all_their_numbers_are() -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [-0.0, 1.0], [1.0, 2.0]])
    for dtype in (torch.float32, torch.float64):
        assert first_of_each(rows.to(dtype)).tolist() == [0, 1, 3]
        assert first_of_each(rows.to(dtype).t().contiguous().t()).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("n", "dim", "value"), [(1, 1, 3.0), (1, 4, 3.0), (10, 4, 1.0), (10, 4, 1e4), (5, 2, 0.0)])
def test_kmeans_of_rows_that_are_all_alike_has_codes_that_differ_and_lie_beside_them(n: int, dim: int, value: float) -> None:
    centres, counts = kmeans(torch.full((n, dim), value), 16, step_rng(0, 0))
    assert torch.isfinite(centres).all() and centres.unique(dim=0).shape[0] == 16 and counts.sum() == n
    assert bool(((centres - value).abs() <= 1e-3 * max(value, 1e-3)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [300, 512, 1000])
def test_rows_that_are_not_finite_have_a_code_in_range_too(path: None, k: int, value: float) -> None:
    rows = torch.randn(100, 4)
    rows[::3, 1] = value
    codes = nearest(rows, torch.randn(k, 4))
    assert codes.min() >= 0 and codes.max() < k
