"""Dumping codes end to end from memory against the bare encoder over the same tensors (float32).

The bare encoder is net and quantiser alone, in the batches in which it is fastest on one core. ``tokenizer.encode``, which the dump
calls, checks its input and works in padded micro-batches, so that codes do not depend on the batch: a second figure says what the dump
adds to that.

``python -m benchmarks.dump_codes``
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.common import interleaved, pin, ratios, report, row

IMAGES = 4096
BATCH = 64  # of the bare encoder: with 16, 32 and 256 it is slower


def main() -> None:
    pin()
    import torch

    from stage1_tokenizer.data.base import SOURCES, Source
    from stage1_tokenizer.data.bundled import BundledConfig
    from stage1_tokenizer.encode import CHUNK, dump_codes
    from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig

    whole = SOURCES.build(BundledConfig())

    class Part(Source):
        """The first images of the bundled train split, in memory as uint8."""

        type_name = "part"

        def __init__(self) -> None:
            super().__init__(BundledConfig(holdout=0))
            self.signal = whole.signal
            self._finish({"train": whole.split("train").select(torch.arange(IMAGES))}, whole.classes)

    source = Part()
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(), source.signal).eval()
    x = source.split("train").batch(torch.arange(IMAGES))["x"]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "codes"

        @torch.no_grad()
        def bare() -> None:
            for rows in x.split(BATCH):
                tokenizer.quantizer(tokenizer.latents(rows))

        def encode() -> None:
            for rows in x.split(CHUNK):
                tokenizer.encode(rows)

        def dump() -> None:
            shutil.rmtree(out, ignore_errors=True)
            dump_codes(tokenizer, source, out)

        seconds = interleaved({"bare": bare, "encode": encode, "dump": dump})
    rows = [
        row("dump_codes", "dump / bare encoder", ratios(seconds["bare"], seconds["dump"]), "times"),
        row("dump_codes", "dump / tokenizer.encode", ratios(seconds["encode"], seconds["dump"]), "times"),
        *(
            row("dump_codes", case, [IMAGES / s for s in seconds[key]], "images/s")
            for key, case in (("dump", "dump"), ("encode", "tokenizer.encode"), ("bare", "bare encoder"))
        ),
    ]
    report("dump_codes", rows, "pyarrow")


if __name__ == "__main__":
    main()
