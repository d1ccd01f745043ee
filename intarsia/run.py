"""Run: the services that a visible training loop calls. The loop itself stands in each script.

```python
with Run(config, flags, kind="tokenizer") as run:  # folder, lock, space, processes: before any model is built
    model = run.prepare(module)
    if not run.resume():
        ...  # a fresh start
    for step in run.steps():
        for part in run.parts(loader, step):
            with run.forward(part):
                loss, stats = model(...)
                run.backward(loss, part, stats)
        if run.optimizer_step(module.finite()):  # False: it held NaN or inf and was skipped
            run.note(module.update(run.rng(step), run.comm))
        run.log(step)
        if run.due("validate", step) and run.validated(step, figures, best="loss"):
            run.release(module.save_pretrained)
        run.checkpoint(step)
    run.finish(module.save_pretrained)
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from intarsia import machine
from intarsia.average import restored
from intarsia.checkpoint import save_checkpoint
from intarsia.cli import Flags
from intarsia.distributed import comm
from intarsia.parts import Feed, Part
from intarsia.prefetch import Loader
from intarsia.rng import StepRng, bits
from intarsia.run_config import RunConfig
from intarsia.run_folder import RunFolder, Save
from intarsia.run_state import RunState, load_for
from intarsia.schedule import learning_rate
from intarsia.sharding import gathered, shard
from intarsia.stepping import Stepper
from intarsia.stop import StopSignals
from intarsia.together import compare_ranks, on_main

Cadence = Literal["log", "validate", "pictures"]


class Run(RunFolder):
    """One training run in one folder; see RunFolder for how it is opened, and what that raises.

    Attributes:
        step: how many steps are done.
        module, model, optimizer: after ``prepare``; ``model`` is what the loop calls.
    """

    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, config: RunConfig, flags: Flags | None = None, *, kind: str) -> None:
        super().__init__(config, flags, kind=kind)
        self.step = 0
        self._end = config.steps if self.flags.max_steps is None else min(config.steps, self.flags.max_steps)
        self._in_loop = False
        self._feed = Feed(config, self.device, self.dtype, comm)
        self._signals = StopSignals()
        torch.manual_seed(config.seed)

    # Before the loop -------------------------------------------------------------------------------------------
    def prepare(self, module: nn.Module, optimizer_params: Any = None) -> nn.Module:
        """Moves ``module`` to the run's device (and float64), builds the optimizer; several processes replicate it (DDP) or, launched
        with FSDP, hold a part each.

        Args:
            optimizer_params: as for torch.optim; by default all that require a gradient, matrices with weight decay.

        Raises:
            UserError: where the disk has no room for two checkpoints and a release.
        """
        self.module = module.to(self.device, self.dtype if self.dtype == torch.float64 else None).train()
        if self.sharded:
            shard(self.module, self.device, comm.world_size)
        self._stepper = Stepper(
            module, optimizer_params, config=self.config, precision=self.precision, accelerator=self._accelerator, comm=comm, warn=self.say
        )
        self.model, self.optimizer = self._stepper.model, self._stepper.optimizer
        self._state = RunState(self._stepper, self._journal, {})
        self.check_space(module)
        return self.model

    def resume(self, extra: Mapping[str, nn.Module] | None = None) -> bool:
        """Continues from the newest valid checkpoint, or from --resume PATH; False where there is none.

        Args:
            extra: further modules whose state belongs into checkpoints.

        Raises:
            CheckpointError: where the one of --resume is damaged. RunError: where there are some and none is whole.
            ConfigError: where it is of another configuration. ValueError: where it does not fit the module.
            UserError: where there is none, and a finished run left its release here.
        """
        self._state.extra = dict(extra or {})
        path = Path(self.flags.resume) if self.flags.resume else self._newest()
        if path is not None:
            self.step, state, meta = load_for(self.config, path)
            self._state.restore(state, meta, comm)
            self.say(f"resuming {path} at step {self.step}")
            for name, now in self._circumstances().items():
                if meta[name] != now:
                    self.say(f"{name} was {meta[name]} and is {now}: the run goes on, but not with the bits of an unbroken one")
        else:
            self._check_unfinished()
        with on_main("config.yaml and metrics.jsonl", comm, self.device):
            if self.is_main:
                self._keep_config()
                self._journal.metrics.cut(self.step)
        return path is not None

    def weights_changed(self) -> None:
        """Call it where other weights were put into the prepared module (--init): the averages start from them."""
        if self._stepper.average is not None:
            self._stepper.average.restart()

    def following(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Around what writes to parameters past the optimizer, such as a code that is restarted: the averages take over these rows."""
        return nullcontext() if self._stepper.average is None else self._stepper.average.following(parameters)

    # The loop --------------------------------------------------------------------------------------------------
    def steps(self) -> Iterator[int]:
        """0-based step numbers, from the resumed one to the end, or until ``log.patience`` runs out.

        Raises:
            SystemExit: 143 after SIGTERM, 130 after SIGINT, when the step is done and a checkpoint of it is written.
        """
        if self._journal.out_of_patience:
            self.say(f"training is over: {self._journal.stale} validations without a new best (log.patience)")
            return
        self._in_loop = True
        with self._signals, self._journal.progress(self.step, self._end) as bar:
            while (step := self.step) < self._end:
                self._seed_torch(step)
                yield step
                self.step = step + 1
                bar.update()
                if signal := self._stepper.stop:
                    if not self._checkpoint_due(step):
                        self._save(self.step)
                    command = "the same command without --resume" if self.flags.resume else "the same command"
                    self.say(f"stopped by signal {signal} after step {self.step}; {command} goes on from there")
                    self.close()
                    raise SystemExit(128 + signal)
        self._in_loop = False

    def _seed_torch(self, step: int) -> None:
        """For what draws from torch's own generators (dropout): a function of seed, step and rank."""
        seed = int(bits(self.config.seed, "torch", comm.rank, step=step))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for CUDA each time
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def parts(self, loader: Loader, step: int) -> Iterator[Part]:
        """This process's micro-batches of ``step``, prepared ahead by ``workers`` threads."""
        return self._feed.parts(loader, step)

    def batches(self, loader: Loader, size: int, samples: int | None = None) -> Iterator[dict[str, Any]]:
        """This process's share of (the first ``samples`` of) ``loader``, not augmented, by ``size``: each sample on one process."""
        with gathered(self.module) if self.sharded else nullcontext():  # processes may have different numbers of batches
            yield from self._feed.batches(loader, size, samples)

    def first_batches(self, loader: Loader, samples: int) -> Iterator[dict[str, Any]]:
        """This process's contiguous share of the first ``samples`` of training's order, for initialisation."""
        return self._feed.first_batches(loader, samples)

    def forward(self, part: Part) -> AbstractContextManager[None]:
        """Autocast; gradients are synchronised in the last part only. ``backward`` belongs into the block, too."""
        return self._stepper.forward(part)

    def backward(self, loss: Tensor, part: Part, stats: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradient of ``loss`` (the mean over the part's samples), weighted by samples; remembers loss and ``stats``.

        Raises:
            UserError: the first time, where a trained parameter of the module got no gradient.
        """
        self._stepper.backward(loss, part, stats)

    def optimizer_step(self, finite: Tensor | None = None) -> bool:
        """True where the step was taken, False where it was skipped (``max_bad_steps``).

        Raises:
            RunError: on all ranks, before optimizer and statistics change, where latents (``finite``: () bool), loss or
                gradients of any rank hold NaN or inf.
        """
        return self._stepper.step(self.step, finite, self._signals.received)

    def rng(self, step: int) -> StepRng:
        """The draws of a step that belong to no sample."""
        return StepRng(self.config.seed, step, torch.zeros(1, dtype=torch.int64, device=self.device))

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision, outside of ``forward``."""
        return self._stepper.autocast()

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Averaged weights in place of the trained ones; on leaving, parameters and buffers are as before. Yields whether there are any."""
        if self._stepper.average is None:
            yield False
            return
        with restored(self.module):
            self._stepper.average.copy_in()
            yield True

    # What the loop leaves ----------------------------------------------------------------------------------------
    def due(self, what: Cadence, step: int) -> bool:
        """Whether the cadence of ``what`` falls on ``step``. The last step is always due, unless the cadence is 0."""
        log = self.config.log
        every = {"log": log.every, "validate": log.validate_every, "pictures": log.pictures_every}[what]
        return bool(every) and ((step + 1) % every == 0 or step + 1 == self._end)

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds scalars of this step that are the same on all ranks to what the next line of metrics shows."""
        self._stepper.note(values)

    def log(self, step: int) -> None:
        """At its cadence, writes the means since the last line."""
        if self.due("log", step):
            means = self._stepper.means.read(comm)
            self._journal.record(step, means | {"lr": learning_rate(self.config.optim, step, self.config.steps)})

    def validated(self, step: int, figures: Mapping[str, float], *, best: str, higher: bool = False) -> bool:
        """Records the figures of a validation, equal on all ranks; True where ``figures[best]`` is the best so far.

        Without a new best for ``log.patience`` validations in a row, this step becomes the last.

        Args:
            best: the figure that ranks validations; ``higher``: more is better.
        """
        improved = self._journal.validated(step, figures, best, higher)
        if self._journal.out_of_patience:
            self._end = step + 1
        return improved

    def _checkpoint_due(self, step: int) -> bool:
        return (step + 1) % self.config.log.checkpoint_every == 0 or step + 1 == self._end

    def checkpoint(self, step: int) -> None:
        """At its cadence and after the last step: ranks are compared, then rank 0 writes.

        Raises:
            RunError: on all ranks, where their weights or codebooks differ, or the disk is full.
        """
        if self._checkpoint_due(step):
            self._save(step + 1)

    def _save(self, done: int) -> None:
        compare_ranks(self.module, comm, done)
        state, meta = self._state.collect(comm)
        meta |= {"kind": self.kind, "config": self.config.to_dict(), **self._circumstances()}
        with on_main(f"checkpoint of step {done}", comm, self.device):
            if self.is_main:
                self._journal.metrics.flush_to_disk()
                save_checkpoint(self.checkpoints, done, state, meta, self.config.log.keep)

    def release(self, save: Save) -> None:
        """Has ``save(folder)`` write what ``model/`` holds from now on, whole or not at all: a new best."""
        self._release(save, {"step": self.step + 1, "release": "best", "finished": False})

    def finish(self, save: Save) -> None:
        """The end of the run: the release of the last step, unless a better one is kept (``log.release``); curves.png, where pictures are
        on."""
        self._release_last(save, self.step, unless_best=self.config.log.release == "best" and self._journal.best is not None)
        if self.config.log.pictures_every:
            with on_main("curves.png", comm, self.device):
                if self.is_main:
                    self._journal.draw_curves()
        self.close()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def close(self) -> None:
        """Gives back signal handlers, ends trackers and threads and frees the folder; a second call does nothing."""
        self._signals.restore()
        self._feed.close()
        super().close()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and self._in_loop:
            error.add_note(f"rank {comm.rank}, step {self.step + 1}")
            machine.tell_launcher(error)
        self.close()
