"""Tokens per second of our GPT against ``generate`` of transformers' GPT-2 with the same layers, width, heads and vocabulary, and
against a full forward for each token.

``python -m benchmarks.sampling [gpt [LENGTH ...]]``: each length is a case of its own, so that a long run can be made in parts.
All have random weights, and draw at temperature 1 from all codes. The full-forward sampler runs our own network over the whole
sequence for each code, as most published samplers of this family do; its steps all cost the same, so that it is timed over 16 of
them and scaled. Its first codes are compared with ours, so that both do the same work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import Row, interleaved, pin, ratios, report, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEPTH, WIDTH, HEADS, VOCAB, BATCH = 8, 320, 8, 512, 16
REPEATS = {49: 9, 256: 5, 1024: 3}  # tokens -> repeats
REFORWARD = (49, 256)  # the lengths at which the full-forward sampler runs too
TIMED = 16  # its steps that are timed


def ours(length: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our GPT over one unlabelled level, a row of ``length`` codes: with its cache, and the first codes by a full forward each."""
    import torch

    from intarsia.rng import uniform
    from intarsia.specs import CodesSpec, LevelSpec
    from stage2_prior.priors.gpt import GPTConfig, GPTPrior
    from stage2_prior.sampling import DrawOptions, draw

    torch.manual_seed(0)
    spec = CodesSpec((LevelSpec("codes", VOCAB, (length,)),), "none")
    prior = GPTPrior(GPTConfig(width=WIDTH, depth=DEPTH, heads=HEADS), spec).eval().to(dtype)
    ids, timed = torch.arange(BATCH), min(TIMED, length)

    def sample() -> Tensor:
        return prior.sample(ids, micro_batch=BATCH)[0]

    @torch.no_grad()
    def reforward() -> Tensor:
        codes = torch.zeros(BATCH, length, dtype=torch.int64)
        numbers = uniform(0, "sample", ids[:, None], 0, torch.arange(timed)[None])
        for i in range(timed):
            (logits,) = prior.logits([codes])
            codes[:, i] = draw(logits[:, i], numbers[:, i], DrawOptions())
        return codes[:, :timed]

    return sample, reforward


def theirs(length: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """GPT-2 of the same size; it begins with code 0, and has no end token to stop at."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": length + 1, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)).eval().to(dtype)
    begin = torch.zeros(BATCH, 1, dtype=torch.int64)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}

    def generate() -> Tensor:
        out: Tensor = model.generate(begin, attention_mask=torch.ones_like(begin), **options)[:, 1:]
        return out

    return generate


def gpt(length: int) -> list[Row]:
    """Tokens per second of all, and the ratios of neighbouring measurements."""
    import torch

    sample, reforward = ours(length, torch.float32)
    cases: dict[str, Callable[[], Tensor]] = {"GPT": sample, "GPT-2 generate": theirs(length, torch.float32)}
    cases |= {"GPT bf16": ours(length, torch.bfloat16)[0], "GPT-2 generate bf16": theirs(length, torch.bfloat16)}
    scale = {}
    if length in REFORWARD:
        cases["full re-forward"], scale["full re-forward"] = reforward, length / min(TIMED, length)
        first = reforward()
        same = (sample()[:, : first.shape[1]] == first).float().mean().item()
        if same < 0.99:  # rounding may flip a draw
            raise RuntimeError(f"the full-forward sampler agrees with ours in {same:.1%} of the codes")
    taken = interleaved(cases, REPEATS.get(length, 3))
    seconds = {name: [s * scale.get(name, 1) for s in each] for name, each in taken.items()}
    name, tokens = f"batch {BATCH}, {length} tokens", BATCH * length
    pairs = [("GPT", "GPT-2 generate"), ("GPT", "full re-forward"), ("GPT bf16", "GPT-2 generate"), ("GPT bf16", "GPT-2 generate bf16")]
    rows = [row("sampling", f"{a} / {b}, {name}", ratios(seconds[b], seconds[a]), "times") for a, b in pairs if b in seconds]
    return rows + [row("sampling", f"{case}, {name}", [tokens / s for s in each], "tokens/s") for case, each in seconds.items()]


def main() -> None:
    kind, *lengths = sys.argv[1:] or ["gpt"]
    if kind != "gpt" or not all(word.isdigit() and int(word) > 0 for word in lengths):
        sys.exit(f"{' '.join(sys.argv[1:])}: expected gpt, then lengths such as {', '.join(map(str, REPEATS))}")
    pin()
    report("sampling", [r for length in map(int, lengths or REPEATS) for r in gpt(length)], "transformers")


if __name__ == "__main__":
    main()
