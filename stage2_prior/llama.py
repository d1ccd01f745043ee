"""The trunk over ``transformers.LlamaModel``, and weights that convert both ways.

The two trunks are one function: pre-norm blocks, rotary positions in half-split layout, SwiGLU, no biases. Ours keeps queries,
keys and values in one matrix and both halves of the feed-forward in another; a Llama keeps them apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stage2_prior.attention import attend, attend_last
from stage2_prior.transformer import NORM_EPS, Rotary, feed_forward_width

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# ours -> Llama's, in the order in which their rows lie in ours
NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "feed_forward_norm": ("post_attention_layernorm",),
}
PREFIX = "model."  # of LlamaTrunk's own state dict
ATTENTION = "stage2_prior"  # the name under which transformers knows our attention


def _layer(name: str, stack: str) -> tuple[str, str]:
    """("3", "attention.out") of "blocks.3.attention.out.weight"."""
    parts = name.split(".")
    if len(parts) < 4 or parts[0] != stack or not parts[1].isdigit() or parts[-1] != "weight":
        raise ValueError(f"{name!r}: no weight of a stack of {stack!r}")
    return parts[1], ".".join(parts[2:-1])


def to_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``Transformer`` as that of a ``LlamaTrunk``. Raises ValueError naming a weight that is none of it."""
    out = {}
    for name, tensor in state.items():
        if name == "norm.weight":
            out[PREFIX + name] = tensor
            continue
        layer, part = _layer(name, "blocks")
        if part not in NAMES:
            raise ValueError(f"{name!r}: no weight of a trunk")
        for theirs, rows in zip(NAMES[part], tensor.chunk(len(NAMES[part])), strict=True):
            out[f"{PREFIX}layers.{layer}.{theirs}.weight"] = rows.contiguous()
    return out


def from_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_llama``. Raises ValueError naming a weight that is missing or none of it."""
    rest = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    last = rest.pop("norm.weight", None)
    if last is None:
        raise ValueError("'norm.weight': missing")
    out = {"norm.weight": last}
    layers = {int(_layer(name, "layers")[0]) for name in rest}
    for layer in range(max(layers, default=-1) + 1):
        for ours, theirs in NAMES.items():
            names = [f"layers.{layer}.{part}.weight" for part in theirs]
            if missing := [name for name in names if name not in rest]:
                raise ValueError(f"{missing[0]!r}: missing")
            out[f"blocks.{layer}.{ours}.weight"] = torch.cat([rest.pop(name) for name in names])
    if rest:
        raise ValueError(f"{next(iter(rest))!r}: no weight of a trunk")
    return out


def _config(width: int, depth: int, heads: int, vocab: int, length: int, attention: str) -> Any:
    from transformers import LlamaConfig

    build: Any = LlamaConfig
    return build(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward_width(width),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        rms_norm_eps=NORM_EPS,  # the base of the rotary frequencies is 10000 by default, as ours
        attn_implementation=attention,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # the default, 2, is a code: generate() would stop at it
        pad_token_id=None,
    )


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """Ours in the form that transformers asks for: (B, heads, length, head dim) each to (B, length, heads, head dim). The one query
    after a prefix sees all keys, several see those before them: ``mask`` says nothing more."""
    y = attend_last(q, k, v, k.shape[2]) if q.shape[2] == 1 else attend(q, k, v, causal=True)
    return y.transpose(1, 2), None


class _GivenRotary(nn.Module):
    """In place of Llama's own: the tables that the trunk was given, or no rotation at all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.tables: Rotary | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> Rotary:
        if self.tables is None:
            still = x.new_zeros(1, x.shape[1], self.dim)
            return still + 1, still
        cos, sin = self.tables
        return cos[None].to(x.dtype), sin[None].to(x.dtype)


@dataclass
class LlamaCache:
    """The keys and values of the live prefix in transformers' own cache, which ``append`` adds to.

    Attributes:
        length: how many places are live.
    """

    past: Any
    length: int = 0


class LlamaTrunk(nn.Module):
    """``transformers.LlamaModel`` in place of ``Transformer(width, depth, heads)``: equal up to rounding.

    Its rotary tables are those that it is given, as for ``Transformer``, so that it takes positions over several axes, and
    learned ones without rotation. It has no dropout of branches, and its norms are computed in float32 whatever the weights are.

    Args:
        width: D; a multiple of ``heads``.
        attention: ours, under which a row's bits do not depend on its batch, or one of transformers' own.
    """

    def __init__(self, width: int, depth: int, heads: int, attention: Literal["stage2_prior", "sdpa", "eager"] = "stage2_prior") -> None:
        from transformers import LlamaModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        super().__init__()
        ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attention
        if width % heads:
            raise ValueError(f"prior.width: {width} is no multiple of prior.heads, {heads}")
        self.width, self.depth, self.heads = width, depth, heads
        model: Any = LlamaModel(_config(width, depth, heads, 1, 1, attention))
        model.embed_tokens = nn.Identity()  # inputs come as vectors
        self.rotary = model.rotary_emb = _GivenRotary(width // heads)
        self.model = model
        # "cache" since transformers 5.2x, "past_key_values" before
        self._word = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
        self.reset()

    def reset(self) -> None:
        """As ``Transformer.reset``."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * ((2 * self.depth) ** -0.5 if last else 1.0))

    def _run(self, x: Tensor, rotary: Rotary | None, past: Any) -> Tensor:
        self.rotary.tables = rotary
        out: Tensor = self.model(inputs_embeds=x, use_cache=True, **{self._word: past}).last_hidden_state
        return out

    def forward(self, x: Tensor, rotary: Rotary | None = None, keep: Tensor | None = None) -> Tensor:
        """As ``Transformer.forward``; ``keep`` must be None."""
        if keep is not None:
            raise ValueError(f"keep: {tuple(keep.shape)}; Llama's blocks have no dropout of branches, expected None")
        if x.shape[0] == 0:  # transformers' views have no size to infer there
            return x
        return self._run(x, rotary, _dynamic_cache())  # with a cache, since without one transformers looks at values: a host sync

    def cache(self, batch: int, capacity: int) -> LlamaCache:
        """An empty cache; transformers' own grows by itself."""
        return LlamaCache(_dynamic_cache())

    def append(self, x: Tensor, cache: LlamaCache, rotary: Rotary | None = None) -> Tensor:
        """As ``Transformer.append``."""
        if cache.length and x.shape[1] > 1:
            raise ValueError(f"cache: {x.shape[1]} places at once after {cache.length}; only the first call takes several")
        out = self._run(x, rotary, cache.past)
        cache.length += x.shape[1]
        return out


def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def causal_lm(
    trunk: Mapping[str, Tensor], depth: int, heads: int, *, table: Tensor, head: Tensor, length: int, begin: int | None
) -> LlamaForCausalLM:
    """A ``LlamaForCausalLM``, in eval mode.

    Args:
        trunk: the state dict of a ``LlamaTrunk``.
        table: (codes + other tokens, D), the vectors of all tokens.
        head: (codes, D): other tokens have the logit 0 and are kept from ``generate``, whose output layer has no bias.
        length: how many codes a sequence has.
        begin: the token that ``generate`` begins with where it is given none.
    """
    from transformers import LlamaForCausalLM

    build: Any = LlamaForCausalLM
    codes, (tokens, width) = len(head), table.shape
    model = build(_config(width, depth, heads, tokens, length + 1, "sdpa"))
    output = torch.cat([head, head.new_zeros(tokens - codes, width)])
    model.load_state_dict({**trunk, "model.embed_tokens.weight": table, "lm_head.weight": output})
    model.config.bos_token_id = begin
    how = model.generation_config
    how.bos_token_id, how.eos_token_id, how.pad_token_id = begin, None, None
    how.do_sample, how.temperature, how.top_k, how.top_p = True, 1.0, 0, 1.0  # by default it would keep 50 codes
    how.max_new_tokens, how.suppress_tokens = length, list(range(codes, tokens))
    out: LlamaForCausalLM = model.to(table.device, table.dtype).eval()
    return out
