"""Stateless randomness: uniform, independent across every key, the same bits however it is asked for."""

import hashlib
import math

import pytest
import torch
from scipy import stats

from intarsia import rng as rng_module
from intarsia.rng import StepRng, bits, permutation, uniform

N = 200_000
MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64 in Python's own integers (Steele et al. 2014, figure 16)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def oracle(seed: int, purpose: str, sample: int, level: int, position: int, step: int) -> int:
    name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    state = splitmix(splitmix(seed & MASK) ^ name)
    for key in (step, sample, level, position):
        state = splitmix(state ^ (key & MASK))
    return state


KEYS = [
    (0, "", 0, 0, 0, 0),
    (1, "order", 2, 3, 4, 5),
    (2**63 + 7, "mask/ü", 2**40, 1, 2**33, 10**9),
    (2**64 - 1, "gumbel", 2**63 - 1, 5, 0, 1),
    (17, "x" * 1000, -1, -(2**63), 9, 3),
]


def test_the_oracle_is_splitmix64():
    # the first outputs of SplitMix64 for the seed 1234567, as other implementations give them
    state, out = 1234567, []
    for _ in range(3):
        out.append(splitmix(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", KEYS)
def test_bits_are_those_of_big_integers(key):
    seed, purpose, sample, level, position, step = key
    expected = oracle(*key)
    assert bits(seed, purpose, sample, level, position, step).item() & MASK == expected
    as_tensors = [torch.tensor([k]) for k in (sample, level, position)]
    assert bits(seed, purpose, *as_tensors, step).item() & MASK == expected
    assert uniform(seed, purpose, sample, level, position, step).item() == ((expected >> 41) + 0.5) / 2**23
    assert uniform(seed, purpose, sample, level, position, step, torch.float64).item() == ((expected >> 12) + 0.5) / 2**52


def draws(dtype: torch.dtype, key: str) -> torch.Tensor:
    many = torch.arange(N)
    return {
        "sample": lambda: uniform(3, "p", many, dtype=dtype),
        "position": lambda: uniform(3, "p", 5, 1, many, dtype=dtype),
        "level": lambda: uniform(3, "p", 5, many, dtype=dtype),
        "grid": lambda: uniform(3, "p", many[:400, None], 0, many[None, :500], dtype=dtype).flatten(),
        "step": lambda: torch.stack([uniform(3, "p", many[:100], step=s, dtype=dtype) for s in range(2000)]).flatten(),
        "seed": lambda: torch.stack([uniform(s, "p", many[:100], dtype=dtype) for s in range(2000)]).flatten(),
        "purpose": lambda: torch.stack([uniform(3, f"p{s}", many[:100], dtype=dtype) for s in range(2000)]).flatten(),
    }[key]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", ["sample", "position", "level", "grid", "step", "seed", "purpose"])
def test_draws_are_uniform_and_independent_along_each_key(key, dtype):
    u = draws(dtype, key)
    assert u.dtype == dtype and u.numel() == N and u.min() > 0 and u.max() < 1
    u = u.double()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    counts = torch.histc(u, 256, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    for lag in (1, 2, 3, 7, 100, 500):  # 100: the same sample of the next step, seed, purpose; 500: the next row
        a, b = u[:-lag], u[lag:]
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(N), lag
        pairs = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-4, lag


def test_the_lowest_bits_are_as_random_as_the_highest():
    raw = bits(0, "p", torch.arange(N))
    for bit in range(64):
        ones = int(((raw >> bit) & 1).sum())
        assert abs(ones - N / 2) < 5 * math.sqrt(N) / 2, bit


def test_one_changed_key_flips_half_of_the_bits():
    base = {"seed": 1, "purpose": "p", "sample": torch.arange(2000), "level": 2, "position": 3, "step": 4}
    changes = {"seed": 0, "purpose": "q", "sample": torch.arange(2000) ^ 1, "level": 3, "position": 2, "step": 5}
    for key, value in changes.items():
        flipped = bits(**base) ^ bits(**{**base, key: value})
        ones = sum(int(((flipped >> i) & 1).sum()) for i in range(64)) / 2000
        assert abs(ones - 32) < 0.5, key


def test_keys_do_not_stand_for_one_another():
    keys = [(1, 2, 3, 4, 5), (1, 3, 2, 4, 5), (1, 2, 4, 3, 5), (5, 2, 3, 4, 1), (1, 5, 3, 4, 2)]
    assert len({int(bits(seed, "p", *rest)) for seed, *rest in keys}) == len(keys)


def test_a_grid_of_draws_holds_no_duplicates():
    raw = bits(0, "p", torch.arange(1000)[:, None], 0, torch.arange(200)[None])
    assert raw.unique().numel() == raw.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interval_is_open_at_the_extreme_states(dtype, monkeypatch):
    monkeypatch.setattr(rng_module, "bits", lambda *keys: torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    low, high, middle, above = uniform(0, "p", 0, dtype=dtype).tolist()
    assert 0 < low < middle < above < high < 1 and middle + above == 1
    assert torch.isfinite(StepRng(0, 0, torch.zeros(1, dtype=torch.int64)).gumbel("a", 4)).all()


def test_a_draw_does_not_depend_on_the_batch_or_its_order():
    index = torch.tensor([5, 900, 5, 0, 77])
    whole = StepRng(7, 11, index)
    for make in (
        lambda rng: rng.uniform("a", 3, 2, level=1),
        lambda rng: rng.uniform("a", 4, dtype=torch.float64),
        lambda rng: rng.gumbel("a", 6),
        lambda rng: rng.normal("a", 6),
        lambda rng: rng.uniform("a"),
    ):
        full = make(whole)
        assert torch.equal(full[0], full[2])
        for split in ([[0, 1], [2, 3, 4]], [[4], [3], [2], [1], [0]]):
            for rows in split:
                assert torch.equal(make(StepRng(7, 11, index[rows])), full[rows])


def test_parts_have_draws_of_their_own():
    rng = StepRng(7, 3, torch.arange(N // 10))
    subs = {"0": rng.sub(0), "1": rng.sub(1), "top": rng.sub("top"), "0/0": rng.sub(0).sub(0), "0/1": rng.sub(0).sub(1), "itself": rng}
    drawn = torch.stack([sub.uniform("a", 10).flatten() for sub in subs.values()])
    assert (torch.corrcoef(drawn) - torch.eye(len(subs))).abs().max() < 5 / math.sqrt(N)
    for row in drawn:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-4
    assert rng.sub(0) == StepRng(7, 3, rng.index).sub(0) and rng.sub(0).step == 3 and rng.sub(0).index is rng.index
    assert StepRng(8, 3, rng.index).sub(0).seed != rng.sub(0).seed >= 0


def test_shapes_follow_the_arguments():
    rng = StepRng(0, 0, torch.arange(4))
    assert rng.uniform("a").shape == (4,) and rng.uniform("a", 0).shape == (4, 0) and rng.gumbel("a", 2, 3).shape == (4, 2, 3)
    assert StepRng(0, 0, torch.arange(0)).uniform("a", 2).shape == (0, 2)
    assert bits(0, "a", 1).shape == () and uniform(0, "a", torch.arange(3)[:, None], 0, torch.arange(2)).shape == (3, 2)
    assert torch.equal(rng.uniform("a", 6).view(4, 2, 3), rng.uniform("a", 2, 3))


def test_gumbel_and_normal_follow_their_laws():
    rng = StepRng(1, 2, torch.arange(2000))
    assert stats.kstest(rng.gumbel("a", 100).flatten().numpy(), "gumbel_r").pvalue > 1e-4
    normal = rng.normal("a", 100).flatten()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-4
    assert abs(torch.corrcoef(normal.view(-1, 2).T)[0, 1]) < 5 / math.sqrt(normal.numel() / 2)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="seed: -1 must not be negative"):
        uniform(-1, "a", 0)
    with pytest.raises(ValueError, match=r"dtype: torch.bfloat16; expected torch.float32 or torch.float64"):
        uniform(0, "a", 0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"sample: dtype torch.int32; expected torch.int64"):
        bits(0, "a", torch.arange(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"position: dtype torch.float32"):
        bits(0, "a", 1, 0, torch.zeros(2))


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_holds_everything_once(n):
    p = permutation(3, "order", n, step=2)
    assert p.dtype == torch.int64 and torch.equal(p.sort().values, torch.arange(n))


def test_permutations_are_uniform_and_differ_by_every_key():
    n = 4
    seen: dict[tuple[int, ...], int] = {}
    for step in range(4800):
        order = tuple(permutation(0, "order", n, step).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == math.factorial(n) and stats.chisquare(list(seen.values())).pvalue > 1e-4
    base = permutation(0, "order", 100)
    assert torch.equal(base, permutation(0, "order", 100))
    others = (permutation(1, "order", 100), permutation(0, "o", 100), permutation(0, "order", 100, 1))
    assert not any(torch.equal(base, other) for other in others)


@pytest.mark.gpu
def test_bits_on_a_card_are_those_of_the_cpu():
    index = torch.arange(1000)
    card = index.cuda()
    assert torch.equal(bits(3, "p", card, 1, card.flip(0), 5).cpu(), bits(3, "p", index, 1, index.flip(0), 5))
    assert bits(3, "p", 2, 1, card).is_cuda
    assert torch.equal(uniform(3, "p", card, dtype=torch.float64).cpu(), uniform(3, "p", index, dtype=torch.float64))
    assert torch.equal(StepRng(1, 2, card).uniform("a", 5).cpu(), StepRng(1, 2, index).uniform("a", 5))
