"""Dumping codes end to end from memory against the bare encoder over the same tensors (float32).

``python -m benchmarks.dump_codes``
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.common import interleaved, pin, ratios, report, row

IMAGES = 4096


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
    tokenizer = VQVAE(VQVAEConfig(), source.signal)
    x = source.split("train").batch(torch.arange(IMAGES))["x"]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "codes"

        def bare() -> None:
            for rows in x.split(CHUNK):
                tokenizer.encode(rows)

        def dump() -> None:
            shutil.rmtree(out, ignore_errors=True)
            dump_codes(tokenizer, source, out)

        seconds = interleaved({"bare": bare, "dump": dump})
    rows = [
        row("dump_codes", "dump / bare encoder", ratios(seconds["bare"], seconds["dump"]), "times"),
        row("dump_codes", "dump", [IMAGES / s for s in seconds["dump"]], "images/s"),
        row("dump_codes", "bare encoder", [IMAGES / s for s in seconds["bare"]], "images/s"),
    ]
    report("dump_codes", rows, "pyarrow")


if __name__ == "__main__":
    main()
