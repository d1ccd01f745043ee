"""The trunk: causality, cache, rotary positions, and equality with an independent implementation."""

import pytest
import torch
import torch.nn.functional as F

from stage2_prior.attention import TILE, Past, attend, attend_last
from stage2_prior.packed import packed
from stage2_prior.transformer import Transformer, rotary_tables, rotate


def trunk(seed: int = 0, width: int = 24, depth: int = 3, heads: int = 3) -> Transformer:
    torch.manual_seed(seed)
    module = Transformer(width, depth, heads).eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("axes", [1, 2, 3])
@torch.no_grad()
def test_the_cached_trunk_equals_the_uncached_one(axes: int) -> None:
    module = trunk(width=36)
    x = torch.randn(2, 10, 36)
    rotary = rotary_tables(torch.randint(0, 9, (10, axes)).double(), 12)
    rotary = (rotary[0].float(), rotary[1].float())
    full = module(x, rotary)
    cache = module.cache(2, 10)
    first = module.append(x[:, :4], cache, (rotary[0][:4], rotary[1][:4]))  # several places at once, then one by one
    parts = [first] + [module.append(x[:, i : i + 1], cache, (rotary[0][i : i + 1], rotary[1][i : i + 1])) for i in range(4, 10)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-6, rtol=0)
    assert cache.length == 10


@pytest.mark.parametrize("capacity", [5, TILE, 2 * TILE + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_a_place_hears_the_places_before_it_and_no_others_while_memory_grows(capacity: int, dtype: torch.dtype) -> None:
    k, v, q = (torch.randn(3, 2, capacity, 8, dtype=dtype) for _ in range(3))
    past, first = Past(torch.zeros(1, dtype=dtype), 3, 2, capacity, 8), capacity // 2
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), is_causal=True)
    for _ in range(2):  # the second time over what the first has left
        past.write(0, k[:, :, :first], v[:, :, :first])
        heard = [past.hear(q[:, :, :first], first)]
        for i in range(first, capacity):
            past.write(i, k[:, :, i : i + 1], v[:, :, i : i + 1])
            heard.append(past.hear(q[:, :, i : i + 1], i + 1))
        assert heard[-1].dtype == dtype and past.keys.dtype == wide and past.keys.shape[2] == capacity
        torch.testing.assert_close(torch.cat(heard, 2), expected.to(dtype))


def test_several_places_after_the_first_call_are_refused() -> None:
    module = trunk()
    cache = module.cache(1, 8)
    module.append(torch.randn(1, 2, 24), cache)
    with pytest.raises(ValueError, match="cache: 3 places at once after 2"):
        module.append(torch.randn(1, 3, 24), cache)


def test_no_place_sees_its_future() -> None:
    module = trunk()
    x = torch.randn(1, 7, 24, requires_grad=True)
    y = module(x)
    for i in range(7):
        (gradient,) = torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().amax(1) > 0
        assert reached.tolist() == [j <= i for j in range(7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_explicit_attention_in_half_precision_is_the_attention_of_float32(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, 11, 8).to(dtype) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    got = attend(q, k, v, causal)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_scores_depend_on_differences_of_coordinates_alone(axes: int) -> None:
    q, k = torch.randn(1, 12, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)

    def score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (rotate(q, rotary_tables(a[None].double(), 12)) * rotate(k, rotary_tables(b[None].double(), 12))).sum()

    a, b, shift = torch.tensor([3, 1, 4][:axes]), torch.tensor([2, 7, 1][:axes]), torch.tensor([5, 9, 2][:axes])
    torch.testing.assert_close(score(a + shift, b + shift), score(a, b))
    for axis in range(axes):  # and every axis matters
        assert (score(a + shift * (torch.arange(axes) == axis), b) - score(a, b)).abs() > 1e-3


def test_a_head_too_small_for_the_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prior.heads: .*>= 6; got 4"):
        rotary_tables(torch.zeros(1, 3), 4)
    with pytest.raises(ValueError, match=r"prior.width: 10 is no multiple of prior.heads, 3"):
        Transformer(10, 1, 3)


def test_dropout_factors_scale_the_branches_of_their_own_sample() -> None:
    module = trunk()
    x = torch.randn(2, 5, 24)
    keep = torch.ones(2, 3, 2, 24)
    torch.testing.assert_close(module(x, keep=keep), module(x))
    keep[1] = 0  # all branches off: only the last norm remains
    y = module(x, keep=keep)
    torch.testing.assert_close(y[0], module(x)[0])
    torch.testing.assert_close(y[1], module.norm(x[1]))


@torch.no_grad()
def test_the_trunk_equals_transformers_llama() -> None:
    from transformers import LlamaConfig, LlamaModel

    width, depth, heads = 48, 2, 4
    module = trunk(width=width, depth=depth, heads=heads)
    hidden = module.blocks[0].feed_forward.down.in_features
    peer = LlamaModel(
        LlamaConfig(
            vocab_size=2, hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads, rms_norm_eps=1e-6
        )
    ).eval()
    state = {"embed_tokens.weight": torch.zeros(2, width), "norm.weight": module.norm.weight}
    for i, block in enumerate(module.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        names = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }
        state |= {f"layers.{i}.{name}.weight": weight for name, weight in names.items()}
    peer.load_state_dict(state)
    x = torch.randn(2, 9, width)
    rotary = tuple(t.float() for t in rotary_tables(torch.arange(9, dtype=torch.float64)[:, None], width // heads))
    expected = peer(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(module(x, rotary), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_packed_layer_is_the_layer_as_it_was(bias: bool, rows: int) -> None:
    layer, x = torch.nn.Linear(40, 24, bias=bias), torch.randn(rows, 3, 40)
    with torch.no_grad():
        expected = layer(x)
        project = packed(layer)
        torch.testing.assert_close(project(x), expected, atol=1e-6, rtol=1e-5)
        layer.weight.zero_()
        assert (project is layer) or (project(x) - expected).abs().max() < 1e-5
        double = torch.nn.Linear(4, 4).double()
        assert packed(double) is double
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(layer) is layer
    assert packed(layer) is layer  # with gradients on


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_few_queries_are_answered_the_same_in_every_row_of_a_batch(threads: int, causal: bool) -> None:
    """Where their number is no multiple of 4 torch's fused kernel rounds by the place in the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length, keys in ((1, 16), (1, 49), (2, 21), (3, 33), (5, 49), (7, 7), (9, 20), (33, 33)):
            if causal and keys > length:
                continue
            q, k, v = (torch.randn(1, n, 4, 8).expand(32, -1, -1, -1).contiguous().transpose(1, 2) for n in (length, keys, keys))
            found = attend(q, k, v, causal)
            assert torch.equal(found, found[:1].expand_as(found))
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_the_last_place_attends_to_does_not_depend_on_the_batch(threads: int) -> None:
    """With several threads torch's fused kernel rounds by the place in the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in (1, 8, 12, 16, 17, 20, 32, 33, 48, 64):
            q, k, v = (torch.randn(32, 4, n, 32) for n in (1, length + 3, length + 3))
            order = torch.randperm(32)
            found = attend_last(q, k, v, length)
            assert torch.equal(attend_last(q[order], k[order], v[order], length), found[order])
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length]))
    finally:
        torch.set_num_threads(before)
