"""A run's folder, opened: config.yaml, metrics.jsonl, checkpoints/, model/; locked, compared, with its processes and trackers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from intarsia import machine, sharding
from intarsia.checkpoint import MANIFEST, newest_valid
from intarsia.cli import Flags, UserError
from intarsia.distributed import comm
from intarsia.files import RUN_FILES, json_bytes, read_json, writable_folder, write_atomic
from intarsia.hub_files import check_source
from intarsia.journal import Journal
from intarsia.lock import RunLock
from intarsia.release import replace_folder, restore_folder
from intarsia.run_config import RunConfig
from intarsia.run_state import compare_with_folder, has_results
from intarsia.stepping import state_bytes
from intarsia.together import on_main

Save = Callable[[Path], Any]
RELEASED = "release.json"  # in the run folder: of which step model/ is


def run_path(text: str, *, make: bool = True, own: Sequence[str] = RUN_FILES) -> Path:
    """The folder of a run: a relative path with its parents, an absolute one only below an existing folder.

    Args:
        make: make it, and write to it; else only look.
        own: the names that show it to be one already, as for ``files.foreign``.

    Raises:
        UserError: naming ``run``, where it cannot be written to, or is a data set of images.
    """
    folder = Path(text)
    if folder.is_absolute() and not folder.parent.is_dir():
        raise UserError(f"run: {folder}: the parent folder does not exist; expected a path below an existing folder")
    return writable_folder(folder, "run", UserError, make=make, own=own)


def check_start(config: RunConfig, flags: Flags) -> None:
    """Raises UserError where ``--resume`` names no checkpoint, HubError where ``init`` can be no release."""
    if flags.resume is not None and not (Path(flags.resume) / MANIFEST).is_file():
        expected = "expected a checkpoint, such as RUN/checkpoints/step-00000100; without the flag a run goes on from its newest"
        raise UserError(f"resume: {flags.resume!r} holds no {MANIFEST}; {expected}")
    if config.init is not None:
        check_source("init", config.init)


class RunFolder:
    """What a run has before any model is built, and what it writes besides checkpoints.

    Attributes:
        config, flags, kind, folder, device, comm, is_main.
        sharded: the processes hold a part of the weights each.
        dtype: of parameters and signals: float64 for precision fp64, else float32.
        precision: fp32, bf16, fp16 or fp64; never auto.

    Raises:
        UserError: a folder that cannot be written to, is in use, or lies on a full disk.
        ConfigError: a folder with results of another configuration; a device or precision that is not there.
        RunError: processes that do not find each other.
    """

    def __init__(self, config: RunConfig, flags: Flags | None = None, *, kind: str) -> None:
        self.config, self.flags, self.kind, self.comm = config, flags or Flags(), kind, comm
        check_start(config, self.flags)
        self.folder = run_path(config.run)
        self.checkpoints = self.folder / "checkpoints"
        device = machine.pick_device(config)
        self.precision = machine.pick_precision(config, device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self._lock = RunLock(self.folder) if machine.env_rank() == 0 else None
        try:
            machine.check_space(self.folder, machine.SPARE_BYTES, self.flags.allow_low_space)
            compare_with_folder(self.folder, config)
            if config.deterministic:
                machine.make_deterministic(device)
            foreign_group = dist.is_initialized()
            self._accelerator = machine.start_processes(config, device)
            self._owns_group = dist.is_initialized() and not foreign_group
            self.device: torch.device = self._accelerator.device
            self.is_main: bool = comm.rank == 0
            self.sharded = comm.world_size > 1 and sharding.requested()
            if self.sharded:
                sharding.check_sharded(config, kind, self.precision, comm.world_size)
            comm.barrier()  # every rank has compared its configuration with the old file
            with on_main("config.yaml", comm, self.device):
                if self.is_main:
                    restore_folder(self.folder / "model")
                    if not has_results(self.folder):  # else a command that is refused yet would change what its data are said to be
                        self._keep_config()
            self._journal = Journal(self.folder, config, comm, self.device)
        except BaseException:
            self._unlock()
            raise

    def _keep_config(self) -> None:
        write_atomic(self.folder / "config.yaml", self.config.to_yaml().encode())

    def begun_on(self, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        """What the run in this folder was begun on, as its file ``name`` says; where it begins now, ``facts``, which rank 0 writes there.
        A run that left neither a checkpoint nor a release begins now.

        Raises UserError for a file that cannot be read.
        """
        path = self.folder / name
        begun = read_json(path, UserError) if has_results(self.folder) and path.is_file() else None
        comm.barrier()  # every rank has looked
        with on_main(name, comm, self.device):
            if self.is_main and begun is None:
                write_atomic(path, json_bytes(facts))
        return facts if begun is None else begun

    def check_space(self, module: nn.Module, reserve: int = 0) -> None:
        """Raises UserError without room for two checkpoints and a release of ``module`` (it may be on meta), and ``reserve`` bytes."""
        weights, state = machine.tensor_bytes(module.state_dict().values()), state_bytes(module, self.config.optim)
        there = sum(f.stat().st_size for f in self.checkpoints.glob("step-*/*"))
        needed = 3 * weights + 2 * state - there
        machine.check_space(self.folder, machine.SPARE_BYTES + reserve + max(0, needed), self.flags.allow_low_space)

    def _newest(self) -> Path | None:
        """Rank 0 chooses; -1 stands for none."""
        step = -1
        with on_main("checkpoints", comm, self.device):
            if self.is_main and (found := newest_valid(self.checkpoints, self.say)):
                step = int(found.name[5:])
        step = int(comm.broadcast_(torch.tensor(step, device=self.device)))
        return self.checkpoints / f"step-{step:08d}" if step >= 0 else None

    def _circumstances(self) -> dict[str, Any]:
        """What is no part of the configuration and decides the last bits all the same."""
        return {"precision": self.precision, "threads": torch.get_num_threads(), "world_size": comm.world_size}

    def say(self, line: str) -> None:
        """One line to the user, from rank 0."""
        self._journal.say(line)

    def picture(self, name: str, step: int) -> None:
        """Sends the picture ``folder/name``, written by rank 0, to the trackers."""
        if self.is_main:
            self._journal.trackers.picture(Path(name).stem, self.folder / name, step + 1)

    def _release(self, save: Save, facts: dict[str, Any]) -> None:
        """Has ``save(folder)`` write the release and puts it in place as model/, whole or not at all; ``facts`` go into release.json."""
        save = sharding.saver(save, getattr(save, "__self__", None), comm)
        with on_main("model/", comm, self.device):
            if self.is_main:
                replace_folder(self.folder / "model", save)
        self._note_release(facts)

    def _release_last(self, save: Save, step: int, unless_best: bool) -> None:
        """At the end of a run: its last step takes the place of model/, unless that is of the best step and is to stay."""
        kept = self._released()
        stays = unless_best and (self.folder / "model").exists() and kept.get("release") != "last"
        if bool(comm.broadcast_(torch.tensor(int(stays), device=self.device))):  # as rank 0 sees it, before it writes
            self._note_release({"step": None, "release": "best"} | kept | {"finished": True})
            return
        if unless_best and kept:
            self.say("log.release: best, but an earlier end with log.release: last replaced the best weights; model/ is of the last step")
        self._release(save, {"step": step, "release": "last", "finished": True})

    def _check_unfinished(self) -> None:
        """Raises UserError where a finished run left its release, but nothing to go on from: a fresh start would replace it."""
        finished = self._released().get("finished")
        comm.barrier()  # every rank has looked
        if finished:
            why = f"{self.folder} holds the release of a finished run and no checkpoint to go on from"
            raise UserError(f"run: {why}; take another folder, or remove {self.folder / 'model'} to begin anew")

    def _note_release(self, facts: dict[str, Any]) -> None:
        with on_main(RELEASED, comm, self.device):
            if self.is_main:
                write_atomic(self.folder / RELEASED, json_bytes(facts))

    def _released(self) -> dict[str, Any]:
        """What release.json says; nothing for a run of an older version, or where there is no model/."""
        path = self.folder / RELEASED
        found = read_json(path, UserError) if path.is_file() and (self.folder / "model").exists() else None
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Ends trackers and frees the folder; a second call does nothing."""
        self._journal.trackers.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
