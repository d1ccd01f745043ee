"""Parts of real images, generated: their lower half by any prior, their centre by a MaskGIT.

``python examples/complete_images.py [completions.png [PIPELINE [lower | centre]]]``: a pipeline of one of the bundled data sets, by
default the bundled one; a held-out image of each class.
"""

import sys

import torch

from intarsia.pictures import save_strips
from pipelines import TwoStagePipeline
from stage1_tokenizer import SOURCES, BundledConfig
from stage1_tokenizer.metrics import unit


def main(out: str = "completions.png", source: str = "", part: str = "lower", *, n: int = 4) -> None:
    pipeline = TwoStagePipeline.from_pretrained(source) if source else TwoStagePipeline.bundled()
    held = SOURCES.build(BundledConfig(name="emoji" if pipeline.signal.channels == 3 else "fashion")).split("validation")
    assert held.labels is not None
    batch = held.batch(torch.stack([(held.labels == c).nonzero()[0, 0] for c in held.labels.unique()]))
    x, label = unit(batch["x"]), batch["label"] if pipeline.classes else None

    height, width = pipeline.signal.shape
    mask = torch.zeros(len(x), 1, height, width, dtype=torch.bool)  # True = generate
    if part == "lower":
        mask[:, :, height // 2 :] = True
    else:
        mask[:, :, height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    drawn = pipeline.inpaint(x, mask, n=n, label=label, seed=0)  # n of the first image, then n of the second, ...

    rows = {"real": x, "known": torch.where(mask, 0.5, x)} | {f"drawn {i + 1}": drawn[i::n] for i in range(n)}
    save_strips(out, rows, title="Held-out images, what is kept of them, and completions")
    print(f"{len(drawn)} completions: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
