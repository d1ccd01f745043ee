"""The trunk over transformers' Llama, weights that convert both ways, and priors as causal language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.config import ConfigError
from intarsia.specs import Cond
from stage2_prior.llama import LlamaTrunk, from_llama, to_llama
from stage2_prior.priors.gpt import GPTPrior
from stage2_prior.transformer import Transformer, rotary_tables
from tests.tiny_priors import Case

WIDTH, DEPTH, HEADS = 24, 2, 2


def pair(attention: str = "stage2_prior") -> tuple[Transformer, LlamaTrunk]:
    """Our trunk with random weights, norms included, and a Llama that is given them."""
    torch.manual_seed(0)
    own = Transformer(WIDTH, DEPTH, HEADS).eval()
    for parameter in own.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    llama = LlamaTrunk(WIDTH, DEPTH, HEADS, attention).eval()
    llama.load_state_dict(to_llama(own.state_dict()))
    return own, llama


@pytest.mark.parametrize("attention", ["stage2_prior", "sdpa", "eager"])
@pytest.mark.parametrize("axes", [0, 1, 2, 3])
@torch.no_grad()
def test_the_two_trunks_are_one_function_with_and_without_cache(attention: str, axes: int) -> None:
    own, llama = pair(attention)
    x = torch.randn(2, 9, WIDTH)
    tables = rotary_tables(torch.randint(0, 9, (9, axes)).double(), WIDTH // HEADS) if axes else None
    rotary = None if tables is None else (tables[0].float(), tables[1].float())
    expected = own(x, rotary)
    torch.testing.assert_close(llama(x, rotary), expected, atol=1e-5, rtol=0)
    cache, parts = llama.cache(2, 9), []
    for a, b in ((0, 3), *((i, i + 1) for i in range(3, 9))):
        parts.append(llama.append(x[:, a:b], cache, None if rotary is None else (rotary[0][a:b], rotary[1][a:b])))
    assert cache.length == 9
    with pytest.raises(ValueError, match="cache: 2 places at once after 9; only the first call takes several"):
        llama.append(x[:, :2], cache)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)


def test_gradients_of_the_two_trunks_agree() -> None:
    own, llama = pair()
    x = torch.randn(2, 6, WIDTH)
    for trunk in (own, llama):
        trunk(x).square().sum().backward()
    converted = to_llama({name: p.grad for name, p in own.named_parameters()})
    assert set(converted) == {name for name, _ in llama.named_parameters()}
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, converted[name], atol=1e-3, rtol=1e-4)


def test_weights_convert_both_ways_without_loss() -> None:
    own, llama = pair()
    back = from_llama(llama.state_dict())
    assert set(back) == set(own.state_dict()) and all(torch.equal(back[name], t) for name, t in own.state_dict().items())


def test_transformers_own_model_takes_the_weights() -> None:
    """Without our rotary tables: a plain LlamaModel over 1-D positions."""
    from transformers import LlamaConfig, LlamaModel

    own = pair()[0]
    hidden = own.stack[0].feed_forward.down.in_features
    sizes = {"hidden_size": WIDTH, "intermediate_size": hidden, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    peer = LlamaModel(LlamaConfig(vocab_size=2, rms_norm_eps=1e-6, **sizes)).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in to_llama(own.state_dict()).items()}
    peer.load_state_dict(state | {"embed_tokens.weight": torch.zeros(2, WIDTH)})
    x = torch.randn(2, 7, WIDTH)
    cos, sin = rotary_tables(torch.arange(7, dtype=torch.float64)[:, None], WIDTH // HEADS)
    torch.testing.assert_close(peer(inputs_embeds=x).last_hidden_state, own(x, (cos.float(), sin.float())), atol=1e-5, rtol=0)


def test_foreign_and_missing_weights_are_named() -> None:
    own, llama = pair()
    with pytest.raises(ValueError, match="'blocks.0.attention.qkv.bias': no weight of a stack"):
        to_llama(own.state_dict() | {"blocks.0.attention.qkv.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="'blocks.0.other.weight': no weight of a trunk"):
        to_llama({"blocks.0.other.weight": torch.zeros(1)})
    state = llama.state_dict()
    with pytest.raises(ValueError, match="'layers.0.other.weight': no weight of a trunk"):
        from_llama(state | {"model.layers.0.other.weight": torch.zeros(1)})
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match="'layers.1.self_attn.k_proj.weight': missing"):
        from_llama(state)
    state = llama.state_dict()
    with pytest.raises(ValueError, match="'norm.weight': missing"):
        from_llama({name: tensor for name, tensor in state.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match="'layers.0.self_attn.q_proj.weight': missing"):
        from_llama({name: tensor for name, tensor in state.items() if ".layers.0." not in name})


def test_llamas_blocks_have_no_dropout_and_say_so() -> None:
    with pytest.raises(ConfigError, match="prior.dropout: 0.1; the blocks of trunk 'llama' have none, expected 0"):
        Case("gpt", ((5, (4,)),), config={"trunk": "llama", "dropout": 0.1}).build()
    with pytest.raises(ValueError, match="no dropout of branches"):
        pair()[1](torch.randn(1, 2, WIDTH), keep=torch.ones(1, DEPTH, 2, WIDTH))
    with pytest.raises(ValueError, match="prior.width: 10 is no multiple of prior.heads, 3"):
        LlamaTrunk(10, 1, 3)


PRIORS = [
    Case("gpt", ((5, (3, 4)),), classes=3, config={"positions": "rotary"}),
    Case("gpt", ((6, (2, 2)), (5, (2, 2))), classes=2, config={"order": "position"}),
    Case("gpt", ((6, (2, 2)), ((2, 3), (4, 4))), levels="1:2", config={"head": "factorised", "label": "prefix"}),
]


@pytest.mark.parametrize("case", PRIORS, ids=str)
def test_a_prior_with_the_other_trunk_is_the_same_prior(case: Case) -> None:
    own = case.build()
    assert isinstance(own, GPTPrior)
    llama = own.with_trunk("llama")
    assert llama.config.trunk == "llama" and isinstance(llama.trunk, LlamaTrunk) and not llama.training
    codes, cond = case.codes(4), case.cond(4)
    torch.testing.assert_close(llama.nll(codes, cond), own.nll(codes, cond), atol=2e-5, rtol=0)
    ids, upper = torch.arange(4), codes[: own.levels.start]
    a, b = (prior.sample(ids, upper=upper, cond=cond, seed=1) for prior in (own, llama))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    back = llama.with_trunk("own")
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in own.state_dict().items())
    assert own.with_trunk("own") is own


def test_a_subclass_keeps_its_class_on_the_other_trunk() -> None:
    class Bolder(GPTPrior):
        def heard(self) -> str:
            return "mine"

    own = PRIORS[0].build()
    bolder = Bolder(own.config, own.spec)
    assert bolder.with_trunk("llama").heard() == "mine"  # type: ignore[attr-defined]


# A causal language model -----------------------------------------------------------------------------------------
N, VOCAB = 7, 6
ROTARY = {"positions": "rotary", "label": "prefix"}
REPRESENTED = [
    Case("gpt", ((VOCAB, (N,)),), classes=3, config=ROTARY),
    Case("gpt", ((VOCAB, (N,)),), classes=3, config=ROTARY | {"cond_dropout": 0.0, "trunk": "llama"}),
    Case("gpt", ((VOCAB, (N,)),), config={"positions": "rotary", "dropout": 0.1}),
]


@pytest.mark.parametrize("case", REPRESENTED, ids=str)
@torch.no_grad()
def test_the_exported_model_has_the_logits_of_the_prior_and_generates_what_it_draws(case: Case, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    prior = case.build()
    assert isinstance(prior, GPTPrior)
    prior.to_transformers().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    n = 12
    (codes,) = case.codes(n)
    nulls = [None] if prior.has_null or not case.classes else []
    for label in (*range(case.classes), *nulls):
        cond = None if label is None else Cond(label=torch.full((n,), label))
        token = VOCAB + (case.classes if label is None else label)
        begin = torch.full((n, 1), token)
        logits = model(torch.cat([begin, codes[:, :-1]], 1)).logits[..., :VOCAB]
        torch.testing.assert_close(logits, prior.logits([codes], cond)[0], atol=1e-5, rtol=1e-5)
        (greedy,) = prior.sample(torch.arange(n), cond=cond, temperature=0)
        assert torch.equal(model.generate(begin, do_sample=False)[:, 1:], greedy)
    free = model.generate(begin.repeat(40, 1))[:, 1:]  # as saved: temperature 1, all codes, never a label, to the full length
    assert free.shape == (40 * n, N) and free.max() < VOCAB and free.unique().numel() == VOCAB
    if nulls:
        assert int(model.generate(do_sample=False)[0, 0]) == VOCAB + case.classes  # begins by itself with the null
    assert all(torch.equal(p, q) for p, q in zip(prior.parameters(), case.build().parameters(), strict=True))


@torch.no_grad()
def test_generate_draws_from_the_priors_distribution() -> None:
    """Frequencies of the first code, whose distribution is known."""
    case = Case("gpt", ((VOCAB, (2,)),), classes=2, config=ROTARY)
    prior = case.build()
    assert isinstance(prior, GPTPrior)
    torch.manual_seed(0)
    n = 4000
    drawn = prior.to_transformers().generate(torch.full((n, 1), VOCAB + 1))[:, 1]
    p = prior.logits([torch.zeros(1, 2, dtype=torch.int64)], Cond(label=torch.tensor([1])))[0][0, 0].softmax(0)
    share = torch.bincount(drawn, minlength=VOCAB) / n
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("gpt", ((6, (4,)), (5, (4,))), config=ROTARY), "prior.levels: a Llama has one table of tokens, .* level0, level1"),
        (Case("gpt", ((6, (4,)), (5, (4,))), levels="1:2", config=ROTARY), "prior.levels: .* this prior has levels above"),
        (Case("gpt", ((6, (4,)),)), "prior.positions: 'learned'; a Llama has only 'rotary'"),
        (Case("gpt", ((6, (2, 2)),), config=ROTARY), "prior.positions: rotary over 2 axes; a Llama counts along 1"),
        (Case("gpt", ((6, (4,)),), classes=2, config={"positions": "rotary"}), "prior.label: 'added'; .* 'prefix'"),
        (Case("gpt", (((2, 3), (4,)),), config=ROTARY | {"head": "factorised"}), r"prior.head: codes in digits of \(2, 3\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else None,
)
def test_what_a_llama_cannot_represent_is_refused_by_name(case: Case, message: str) -> None:
    prior = case.build()
    assert isinstance(prior, GPTPrior)
    with pytest.raises(ValueError, match=f"to_transformers: {message}"):
        prior.to_transformers()
