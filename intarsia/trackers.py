"""Optional trackers. None of them may block, ask, or end a training: what fails is reported once and left out from then on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where metrics and pictures go besides the run folder. ``step``: steps that are done."""


    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases. The mode is decided before it can ask: WANDB_MODE, else online where there is a login, else offline."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        self._wandb = wandb
        try:
            self._run = self._start(folder, config, mode)
        except wandb.errors.CommError:
            if mode != "online":
                raise
            self._run = self._start(folder, config, "offline")  # a login, but no way to the server

    def _start(self, folder: Path, config: Mapping[str, Any], mode: Any) -> Any:
        """One run of the tracker for one run folder, however often it is resumed."""
        identity = folder / ".wandb-id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        settings = self._wandb.Settings(init_timeout=20, console="off")
        return self._wandb.init(
            project="intarsia",
            name=folder.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode=mode,
            settings=settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard event files in ``tensorboard/`` of the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy
        from PIL import Image

        self._writer.add_image(name, numpy.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


class Trackers:
    """All configured trackers as one. ``warn`` takes a line for the user."""

    def __init__(self, names: tuple[str, ...], folder: Path, config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._active.__setitem__(name, TRACKERS[name](folder, config)))  # type: ignore[misc]

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a tracker's failure, of any kind, never ends a training
            self._active.pop(name, None)
            first = (str(error).splitlines() or [""])[0]
            self._warn(f"tracker {name}: {type(error).__name__}: {first}; it is left out from here on")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._active.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step))  # type: ignore[misc]

    def picture(self, name: str, path: Path, step: int) -> None:
        for tracker_name, tracker in list(self._active.items()):
            self._try(tracker_name, lambda tracker=tracker: tracker.picture(name, path, step))  # type: ignore[misc]

    def close(self) -> None:
        for name, tracker in list(self._active.items()):
            self._try(name, tracker.close)
        self._active = {}
