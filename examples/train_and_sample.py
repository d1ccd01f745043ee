"""Both stages on the bundled images and a sheet of samples, without the command line. The scripts add resuming, several
processes, mixed precision, averaged weights and validation: see the README."""

from pathlib import Path

import torch
import torch.nn.functional as F

from intarsia import CodesSpec, Cond, Order, StepRng, comm
from intarsia.pictures import save_grid
from pipelines import TwoStagePipeline
from stage1_tokenizer import SOURCES, VQVAE, BundledConfig, VQVAEConfig
from stage2_prior import PixelCNNConfig, PixelCNNPrior


def main(folder: str = "runs/example", images: int = 10_000, tokenizer_steps: int = 2000, prior_steps: int = 2000) -> None:
    source = SOURCES.build(BundledConfig())
    images = min(images, len(source.split("train")))
    data = source.split("train").batch(torch.arange(images))
    order = Order(images, batch_size=32, seed=0)

    tokenizer = VQVAE(VQVAEConfig(), source.signal)
    tokenizer.initialize([data["x"][:1024]], StepRng(0, 0, torch.arange(images)[:1024]), comm)  # codebook from data
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    for step in range(tokenizer_steps):
        index = order.indices(step)
        rng = StepRng(0, step, index)  # every draw is a function of seed, step and sample
        out = tokenizer(data["x"][index], rng=rng)
        loss = 10 * F.mse_loss(out.x, data["x"][index]) + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.update(rng, comm)  # moving averages and restarts of the codebook

    codes = tokenizer.encode(data["x"])
    counts = torch.bincount(data["label"], minlength=len(source.classes))
    spec = CodesSpec(tokenizer.level_specs(), tokenizer.fingerprint, source.classes, tuple(counts.tolist()))
    prior = PixelCNNPrior(PixelCNNConfig(width=64, depth=6), spec)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for step in range(prior_steps):
        index = order.indices(step)
        loss, _ = prior([level[index] for level in codes], Cond(label=data["label"][index]), StepRng(1, step, index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    pipeline = TwoStagePipeline(tokenizer, [prior])
    pipeline.save_pretrained(Path(folder) / "pipeline")
    label = torch.arange(len(source.classes)).repeat_interleave(8)
    save_grid(Path(folder) / "samples.png", pipeline.sample(len(label), label=label, seed=0), columns=8, row_labels=source.classes)


if __name__ == "__main__":
    main()
