"""Reading codes in random batches: CodesDataset against ``datasets`` through a DataLoader, from the same files.

``python -m benchmarks.read_codes``
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import interleaved, pin, ratios, report, row

ROWS, BATCH, VOCAB = 40_000, 64, 512


def main() -> None:
    pin()
    import datasets
    import torch
    from torch.utils.data import DataLoader

    from intarsia.codes import CodesDataset, write_codes
    from intarsia.order import Order
    from intarsia.specs import LevelSpec, SignalSpec

    generator = torch.Generator().manual_seed(0)
    level = LevelSpec("codes", VOCAB, (7, 7))
    codes = torch.randint(0, VOCAB, (ROWS, 7, 7), generator=generator)
    label = torch.randint(0, 10, (ROWS,), generator=generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "codes"
        classes = [str(i) for i in range(10)]
        signal, tokenizer = SignalSpec("image", 1, (28, 28)), {"type": "none", "fingerprint": "none"}
        write_codes(folder, {"train": ([codes], label)}, [level], signal=signal, tokenizer=tokenizer, classes=classes)
        ours = CodesDataset(folder, "train")
        datasets.disable_progress_bars()
        files = sorted(str(p) for p in (folder / "train").glob("*.parquet"))
        theirs = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=f"{name}/cache").with_format("torch")
        order = Order(ROWS, BATCH, seed=0)

        def read_ours() -> int:
            return sum(len(ours.batch(order.indices(step))["codes"][0]) for step in range(ROWS // BATCH))

        def read_theirs() -> int:
            return sum(len(batch["codes_0"]) for batch in DataLoader(theirs, batch_size=BATCH, shuffle=True))

        def load() -> CodesDataset:
            return CodesDataset(folder, "train")

        assert read_ours() == read_theirs() == ROWS
        seconds = interleaved({"ours": read_ours, "theirs": read_theirs, "load": load})
    rows = [
        row("read_codes", "CodesDataset / datasets through a DataLoader", ratios(seconds["theirs"], seconds["ours"]), "times"),
        row("read_codes", "CodesDataset", [ROWS / s for s in seconds["ours"]], "rows/s"),
        row("read_codes", "datasets through a DataLoader", [ROWS / s for s in seconds["theirs"]], "rows/s"),
        row("read_codes", "opening: hash, parse and check", [codes.numel() / s for s in seconds["load"]], "codes/s"),
    ]
    report("read_codes", rows, "datasets", "pyarrow")


if __name__ == "__main__":
    main()
