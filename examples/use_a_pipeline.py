"""What a saved pipeline can do: sample, stream, reconstruct, score. Give its folder, a Hub id, or nothing for the bundled one."""

import sys
from pathlib import Path

import torch

from pipelines import TwoStagePipeline


def main(source: str = "", folder: str = "runs/samples") -> None:
    pipeline = TwoStagePipeline.from_pretrained(source) if source else TwoStagePipeline.bundled()
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    print(pipeline, "classes:", ", ".join(pipeline.classes))

    x = pipeline.sample(4, seed=0)  # (4, C, *axes) in [0, 1]; classes as often as in training
    again = pipeline.sample(64, seed=0, batch_size=16)
    print("sample i of a seed is always the same:", torch.equal(x, again[:4]))

    if pipeline.classes:
        name = pipeline.classes[0]
        Path(folder).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pipeline.sample(8, label=name, temperature=0.9, output="pil")):
            picture.save(Path(folder) / f"{i}.png")  # last_seed tells which seed this was
        print(f"8 samples of {name!r}, seed {pipeline.last_seed}: {folder}")

    means = [float(row.mean()) for _, row in pipeline.stream(256, seed=0)]  # in memory that does not grow with n
    print(f"mean brightness of 256 samples: {sum(means) / 256:.3f}")

    codes = pipeline.encode(x)  # one LongTensor per level, coarse to fine
    error = (pipeline.decode(codes).cpu() - x).square().mean()
    bits = pipeline.bits_per_image(codes, label=pipeline.labels(4, seed=0) if pipeline.classes else None)
    print(f"reconstruction error {error:.5f}; bits per image {[round(b) for b in bits.tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
