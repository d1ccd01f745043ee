"""One optimizer step: autocast, gradients weighted by samples, one reduced flag for all that must be finite, AdamW or Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from intarsia.average import AveragedWeights
from intarsia.cli import RunError, UserError
from intarsia.distributed import Comm
from intarsia.machine import tensor_bytes
from intarsia.metrics_log import RunningMeans
from intarsia.muon import Muon, hidden_weights
from intarsia.parts import Part
from intarsia.run_config import OptimConfig, RunConfig
from intarsia.schedule import learning_rate
from intarsia.sharding import is_sharded, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

QUANTITIES = ("latents", "loss", "gradients")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_SCALE = 2.0**-14
NAMED = 3  # parameters that a message names


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Tensors with two axes or more decay; biases, norms and scalars do not, nor what lies within a module with ``decays = False``, such
    as a quantiser. With Muon the weights of hidden layers come first."""
    hidden = hidden_weights(module) if optim.muon else []
    taken = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    kept = {id(p) for m in module.modules() if not getattr(m, "decays", True) for p in m.parameters()}
    matrices = [p for p in rest if p.ndim >= 2 and id(p) not in kept]
    vectors = [p for p in rest if p.ndim < 2 or id(p) in kept]
    groups = [
        {"params": hidden, "weight_decay": optim.weight_decay, "peak": optim.muon, "hidden": True},
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def state_bytes(module: nn.Module, optim: OptimConfig) -> int:
    """What training keeps beside weights and gradients, in bytes: two moments (one of each weight that Muon trains) and averages."""
    trained = tensor_bytes(p for p in module.parameters() if p.requires_grad)
    single = tensor_bytes(hidden_weights(module)) if optim.muon else 0
    return trained * (3 if optim.average else 2) - single


def check_gradients(module: nn.Module) -> None:
    """Raises UserError, with the first names, where a parameter that requires a gradient has none after a backward.

    It would stay as it was drawn, in silence; among several processes DDP would wait for it in vain.
    """
    idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if not idle:
        return
    rest = f" and {len(idle) - NAMED} more" if len(idle) > NAMED else ""
    what = f"parameter{'s' if len(idle) > 1 else ''} {', '.join(idle[:NAMED])}{rest} get{'s' if len(idle) == 1 else ''} no gradient"
    advice = "the loss has to depend on it, or it is frozen (requires_grad False) or left out"
    raise UserError(f"{what}: every trained parameter must, in every step; {advice}")


class Stepper:
    """The model, its optimizer and what lies between a loss and the next weights.

    Attributes:
        model: what the loop calls: the module, DDP around it, or the module with its weights dealt to the processes.
        means: the running means of what is logged.
        bad_steps: skipped steps in a row.
        stop: 0, or the signal that some rank has received; the same on all ranks after ``step``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer_params: Any,
        *,
        config: RunConfig,
        precision: str,
        accelerator: Accelerator,
        comm: Comm,
        warn: Callable[[str], None],
    ) -> None:
        self.module, self.config, self.comm, self._warn = module, config, comm, warn
        self.device: torch.device = accelerator.device
        self._autocast = _AUTOCAST.get(precision)
        groups = parameter_groups(module, config.optim) if optimizer_params is None else list(optimizer_params)
        if not groups:
            raise ValueError("the module has no parameter to train")
        o = config.optim
        kind = Muon if o.muon else torch.optim.AdamW
        self.optimizer = kind(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
        self.trained: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = AveragedWeights(module, o.average) if o.average else None
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self.means = RunningMeans(self.device)
        self.model: nn.Module = module
        self.sharded = is_sharded(module)
        if comm.world_size > 1 and not self.sharded:
            self.model = self._distribute(accelerator)
        self.bad_steps = self.stop = 0
        self._gradients_seen = False  # whether a backward of this process was looked at
        self._reset_flags()

    def _distribute(self, accelerator: Accelerator) -> nn.Module:
        model: DistributedDataParallel = accelerator.prepare_model(self.module)
        # Buffers are statistics that update() keeps equal itself; DDP would overwrite them with those of rank 0.
        setattr(model, "forward_sync_buffers" if hasattr(model, "forward_sync_buffers") else "broadcast_buffers", False)
        model.register_comm_hook(None, lambda state, bucket: self._average_bucket(bucket))
        return model

    def _average_bucket(self, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own averaging, after a look at this rank's gradients: afterwards a NaN has no origin."""
        buffer = bucket.buffer()
        self._local_gradients &= torch.isfinite(buffer.sum())
        work = torch.distributed.all_reduce(buffer.div_(self.comm.world_size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def _reset_flags(self) -> None:
        self._finite_loss = torch.ones((), dtype=torch.bool, device=self.device)
        self._local_gradients = torch.ones((), dtype=torch.bool, device=self.device)

    def autocast(self) -> torch.autocast:
        """The run's mixed precision; off for fp32 and fp64."""
        return torch.autocast(self.device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None)

    @contextmanager
    def forward(self, part: Part) -> Iterator[None]:
        """Autocast for one part; gradients are synchronised in the last one only."""
        model = self.model
        if self.sharded:
            model.set_requires_gradient_sync(part.last)  # type: ignore[operator]
        with self.autocast(), model.no_sync() if isinstance(model, DistributedDataParallel) and not part.last else nullcontext():
            yield
        if part.ghost:
            self._discard_statistics()

    def _discard_statistics(self) -> None:
        if callable(discard := getattr(self.module, "discard", None)):
            discard()

    def backward(self, loss: Tensor, part: Part, stats: Mapping[str, Tensor] | None) -> None:
        """Adds the gradient of this part, weighted by its samples.

        Args:
            loss: (), the mean over the samples of the part.
            stats: scalars, means over the samples of the part, to log beside the loss.

        Raises:
            UserError: after the first backward, before any weight has changed, where a trained parameter of the module got no gradient.
        """
        if not part.ghost:
            self._finite_loss &= torch.isfinite(loss.detach())
        weighted = loss * part.weight
        with torch.autocast(self.device.type, enabled=False):
            (weighted if self.scaler is None else self.scaler.scale(weighted)).backward()  # type: ignore[no-untyped-call]
        if not self._gradients_seen and (part.last or not self.sharded):  # dealt gradients are there after the last part
            check_gradients(self.module)
            self._gradients_seen = True
        self.means.stage({"loss": loss, **(stats or {})}, part.share)

    def step(self, step: int, finite: Tensor | None, signal: int) -> bool:
        """Optimizer step number ``step`` (0-based): True where it was taken, False where it was skipped.

        Args:
            finite: () bool, the module's flag for its latents.
            signal: what this rank has received.

        Raises:
            RunError: on all ranks, before anything has changed, where a quantity on any rank is not finite.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        total = whole(norm)  # over all parts, where the gradients are dealt
        problems = self._reduce_flags(finite, torch.isfinite(total), signal)
        if problems:
            self._skip(step, problems)
            return False
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.optim.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, step, self.config.steps, group.get("peak"))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.means.commit()
        self.note({"gradient_norm": total})
        self.bad_steps = 0
        return True

    def _reduce_flags(self, finite: Tensor | None, gradients: Tensor, signal: int) -> dict[str, list[int]]:
        """{quantity: ranks} of what is not finite anywhere. The one collective, and the one host sync, of a step beside DDP's own."""
        world = self.comm.world_size
        latents = torch.ones((), dtype=torch.bool, device=self.device) if finite is None else finite
        # In several processes the reduced gradients are not finite on any rank if they are not on one.
        local = gradients if world == 1 else self._local_gradients
        flags = torch.stack([f.to(self.device) for f in (latents, self._finite_loss, local, gradients)]).logical_not().to(torch.int64)
        table = torch.zeros(world, 5, dtype=torch.int64, device=self.device)
        table[self.comm.rank, :4] = flags
        if signal:
            table[self.comm.rank, 4] = signal
        rows = self.comm.all_reduce_sum_(table).tolist()
        self._reset_flags()
        self.stop = self.stop or max(row[4] for row in rows)
        found = {name: [rank for rank, row in enumerate(rows) if row[i]] for i, name in enumerate(QUANTITIES)}
        if not any(found.values()) and any(row[3] for row in rows):
            found["gradients"] = [rank for rank, row in enumerate(rows) if row[3]]  # finite apart, not in their sum
        return {name: ranks for name, ranks in found.items() if ranks}

    def _skip(self, step: int, problems: dict[str, list[int]]) -> None:
        """Drops the step, or raises where that is not allowed."""
        what = "; ".join(f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in problems.items())
        message = f"step {step + 1}: not finite: {what}"
        overflow = False
        if self.scaler is not None:
            self.scaler.update()  # lowers the scale: unscale_ has seen the same gradients
            overflow = problems.keys() == {"gradients"} and self.scaler.get_scale() >= _LEAST_SCALE
        if not overflow:
            self.bad_steps += 1
            if self.bad_steps > self.config.max_bad_steps:
                raise RunError(message)
            self._warn(f"{message}; the step is skipped ({self.bad_steps} in a row, max_bad_steps is {self.config.max_bad_steps})")
        self.optimizer.zero_grad(set_to_none=True)
        self.means.discard()
        self._discard_statistics()

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds scalars of this step that are the same on all ranks."""
        self.means.stage(values, 1.0 if self.comm.rank == 0 else 0.0)
        self.means.commit()
