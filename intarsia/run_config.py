"""What every training run is configured by: optimizer, logging, and the base of the scripts' own configurations."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from intarsia.config import Added, Budget, Config, Place, Seed

LONGEST, MOST_THREADS = 1e8, 1024  # seconds (three years), threads: more are refused by the system, in its own words
BatchSize = Annotated[int, Field(ge=1, le=1 << 24)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024), the schedule, clipping and averaged weights."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    muon: Added[Annotated[float, Field(ge=0)]] = 0.0
    """Peak learning rate of Muon, which then trains the weights of hidden layers; 0.02 is usual. 0 = AdamW for all."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """Decay of the first and second moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of tensors with two axes or more; biases and norms have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine down to 0 at `steps`, or constant."""
    warmup: NotNegative = 0
    """Steps of linear warm-up."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 = off."""
    average: Momentum = 0.0
    """Decay of the averaged weights, which validation and release then use; 0 = off."""


class LogConfig(Config):
    """Cadences in steps; none of them changes what is trained. 0 = never."""

    every: Place[Positive] = 50
    """Steps between two lines of metrics.jsonl; a line is the mean over them."""
    validate_every: Place[NotNegative] = 500
    """Steps between validations; there is one at the end, too."""
    checkpoint_every: Place[Positive] = 500
    """Steps between checkpoints; there is one at the end, too."""
    keep: Place[Positive] = 2
    """How many checkpoints are kept."""
    pictures_every: Place[NotNegative] = 500
    """Steps between pictures of a tokenizer's training; there is one at the end, too. That of a prior draws its curves alone, at the
    end. 0 draws nothing."""
    trackers: Place[tuple[Literal["wandb", "tensorboard"], ...]] = ()
    """Where metrics go besides metrics.jsonl."""
    patience: Budget[NotNegative] = 0
    """Training stops after this many validations in a row without a new best; 0 = never."""
    release: Place[Literal["best", "last"]] = "best"
    """What stands in model/ in the end: the best validation, or the last step."""


class RunConfig(Config):
    """Base of the training scripts' configurations."""

    run: Place[Annotated[str, Field(min_length=1)]]
    """The output folder. Running the same command again resumes."""
    seed: Seed = 0
    """Root of all randomness."""
    steps: Budget[Positive] = 10_000
    """Optimizer steps in all; the schedule reads it. May grow when resuming."""
    batch_size: BatchSize = 64
    """Samples per optimizer step, over all processes and micro-batches."""
    accumulate: Positive = 1
    """Micro-batches per process and step."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """auto: bf16 where the processor computes in it (CUDA; AVX512_BF16 or AMX), elsewhere fp32. fp16: CUDA only."""
    device: Place[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: CUDA where there is one."""
    workers: Place[Annotated[int, Field(ge=0, le=MOST_THREADS)]] = 1
    """Threads that prepare batches ahead, where data are not in memory; 0 = none. The result does not depend on it."""
    init: str | None = None
    """Start from this release: a folder, a run's model/, or a Hub id (user/name, user/name@revision, user/name//subfolder)."""
    max_bad_steps: Place[NotNegative] = 0
    """Steps in a row with NaN or inf that are skipped before the run ends; 0 = the first one ends it."""
    deterministic: Place[bool] = True
    """On CUDA: deterministic kernels, so that the same command gives the same bits. An operation that has none warns: among them is
    the backward pass of torch's fused attention, which priors of transformers and PixelCNN's attention use."""
    timeout: Place[Annotated[float, Field(gt=0, le=LONGEST)]] = 300.0
    """Seconds after which a process that waits for another, or for a batch, gives up."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    log: LogConfig = LogConfig()
    """Cadences and trackers."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.optim.warmup > self.steps:
            raise ValueError(f"optim.warmup: {self.optim.warmup} is more than steps: {self.steps}")
        return self
