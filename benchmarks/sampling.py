"""Tokens per second of our GPT against ``generate`` of transformers' GPT-2 with the same layers, width, heads and vocabulary.

``python -m benchmarks.sampling [LENGTH ...]``. Both have random weights in float32, keep keys and values in a cache, and draw
at temperature 1 from all codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.common import Row, interleaved, pin, ratios, report, row

DEPTH, WIDTH, HEADS, VOCAB, BATCH = 8, 320, 8, 512, 16
REPEATS = {49: 9, 256: 5}  # tokens -> repeats


def ours(length: int) -> Callable[[], None]:
    """Our GPT over one unlabelled level, a row of ``length`` codes."""
    import torch

    from intarsia.specs import CodesSpec, LevelSpec
    from stage2_prior.priors.gpt import GPTConfig, GPTPrior

    torch.manual_seed(0)
    spec = CodesSpec((LevelSpec("codes", VOCAB, (length,)),), "none")
    prior = GPTPrior(GPTConfig(width=WIDTH, depth=DEPTH, heads=HEADS), spec).eval()
    ids = torch.arange(BATCH)

    def sample() -> None:
        (codes,) = prior.sample(ids, micro_batch=BATCH)
        assert codes.shape == (BATCH, length)

    return sample


def theirs(length: int) -> Callable[[], None]:
    """GPT-2 of the same size; it begins with code 0, and has no end token to stop at."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": length + 1, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)).eval()
    begin = torch.zeros(BATCH, 1, dtype=torch.int64)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}

    def generate() -> None:
        assert model.generate(begin, attention_mask=torch.ones_like(begin), **options).shape == (BATCH, length + 1)

    return generate


def rows(length: int) -> list[Row]:
    """Tokens per second of both, and the ratio of neighbouring measurements."""
    seconds = interleaved({"ours": ours(length), "theirs": theirs(length)}, REPEATS.get(length, 3))
    name, tokens = f"batch {BATCH}, {length} tokens", BATCH * length
    return [
        row("sampling", f"GPT / GPT-2 generate, {name}", ratios(seconds["theirs"], seconds["ours"]), "times"),
        row("sampling", f"GPT, {name}", [tokens / s for s in seconds["ours"]], "tokens/s"),
        row("sampling", f"transformers GPT-2 generate, {name}", [tokens / s for s in seconds["theirs"]], "tokens/s"),
    ]


def main() -> None:
    pin()
    lengths = [int(word) for word in sys.argv[1:]] or list(REPEATS)
    report("sampling", [r for length in lengths for r in rows(length)], "transformers")


if __name__ == "__main__":
    main()
