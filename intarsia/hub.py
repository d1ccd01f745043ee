"""Pretrained: strict saving, loading and publishing of a model, and the fingerprint of what it computes.

A release (``model/1``) is a folder with ``config.json``, ``model.safetensors`` and a model card. Loading compares names,
shapes and dtypes with the model that the configuration describes, built on the meta device under a byte budget, before
anything is allocated; it never unpickles, and takes no code from a repository.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from intarsia.config import Config, ConfigError, hashed
from intarsia.files import foreign, json_bytes, read_json, write_atomic
from intarsia.hub_files import CARD, CONFIG, WEIGHTS, HubError, check_subfolder, fetch, model_card, push_folder, release_folder
from intarsia.meta import build_on_meta
from intarsia.registry import Registry
from intarsia.tensor_files import TensorFileError, compare, hash_tensors, module_tensors, read_header, read_into, save_tensors

FORMAT = "model/1"
_KEYS = ("format", "kind", "type", "config", "spec", "dtype", "fingerprint", "sha256")


def default_max_bytes() -> int:
    """Half of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Pretrained:
    """Mixin for registered modules: ``class Tokenizer(Pretrained, nn.Module)``, constructor ``(config, spec)``.

    The constructor must also work under ``torch.device("meta")``, and must set everything that is not a parameter or a
    persistent buffer from its arguments alone: that is what loading relies on.

    Attributes:
        registry, kind: set by the base class of a room; ``kind`` stands in ``config.json``.
        config: what the module was built from.
    """

    registry: ClassVar[Registry[Any]]
    kind: ClassVar[str]
    type_name: ClassVar[str]
    config: Any

    # Hooks -----------------------------------------------------------------------------------------------------
    def _spec_dict(self) -> dict[str, Any]:
        """What the constructor needs beside the configuration, as a plain tree."""
        raise NotImplementedError

    @classmethod
    def _spec_from_dict(cls, tree: Mapping[str, Any]) -> Any:
        """The constructor's second argument."""
        raise NotImplementedError

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """The tensors that decide what the fingerprint stands for: all, unless a class knows better."""
        return module_tensors(self._module())

    def fingerprint_config(self) -> dict[str, Any]:
        """The part of the configuration that enters the fingerprint, as a plain tree."""
        return cast(dict[str, Any], hashed(self.config))

    # Identity --------------------------------------------------------------------------------------------------
    def _module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 over kind, type, spec, ``fingerprint_config`` and ``fingerprint_tensors``: computed from the weights as they are now."""
        head = {"kind": self.kind, "type": self.type_name, "spec": self._spec_dict(), "config": self.fingerprint_config()}
        return hash_tensors(self.fingerprint_tensors(), json_bytes(head))

    @property
    def weights_sha256(self) -> str:
        """sha256 over the whole model: kind, type, spec, configuration, all parameters and persistent buffers."""
        head = {"kind": self.kind, "type": self.type_name, "spec": self._spec_dict(), "config": hashed(self.config)}
        return hash_tensors(module_tensors(self._module()), json_bytes(head))

    # Saving ----------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None, license: str | None = None) -> None:
        """Writes the release; ``config.json`` comes last, so that a torn one does not load.

        A release that the folder holds is replaced, a README.md by the model card.

        Args:
            metrics: figures for the model card.
            license: an identifier for the model card, left out where None: it is the publisher's to choose.

        Raises:
            FileExistsError: for a data set of images.
            HubError: where the module is not what its configuration builds, and would not load; for the folder of a run, which loads
                as its ``model/``.
        """
        folder = Path(folder)
        if (folder / "model" / CONFIG).is_file():
            raise HubError(f"{folder} is the folder of a run, which loads as its model/; expected another folder")
        if found := foreign(folder, (CONFIG, WEIGHTS)):
            raise FileExistsError(f"{folder}: {found}")
        tensors = module_tensors(self._module())
        dtype = self._check_rebuilds(tensors)
        tree = {
            "format": FORMAT,
            "kind": self.kind,
            "type": self.type_name,
            "config": self.config.to_dict(),
            "spec": self._spec_dict(),
            "dtype": str(dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
            "sha256": self.weights_sha256,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS, tensors)
        write_atomic(folder / CARD, self._card(metrics, license).encode())
        write_atomic(folder / CONFIG, json_bytes(tree))

    def _check_rebuilds(self, tensors: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype to which the freshly built module has to be cast to become this one."""
        known = self.registry.get(self.type_name)
        if known is not type(self):
            why = f"the type {self.type_name!r} is {known.__qualname__}, which it would load as; register the class under a name of its own"
            raise HubError(f"{type(self).__qualname__}: {why}")
        if self.config.type_name != self.type_name:
            why = f"its configuration is of the type {self.config.type_name!r}; expected that of {self.type_name!r}"
            raise HubError(f"{type(self).__qualname__}: {why}")
        spec = self._spec_from_dict(self._spec_dict())
        kinds = {t.dtype for t in tensors.values() if t.is_floating_point()} or {torch.float32}
        problem: TensorFileError | None = None
        for dtype in sorted(kinds, key=lambda d: (d.itemsize, str(d))):
            try:
                compare(tensors, module_tensors(build_on_meta(type(self), self.config, spec, dtype)), f"this {self.kind}")
                return dtype
            except TensorFileError as error:
                problem = error
        raise HubError(f"{problem}; it is not what its configuration builds")

    def _card(self, metrics: Mapping[str, float] | None, license: str | None) -> str:
        base = next(c for c in type(self).__mro__ if "kind" in vars(c))
        room = base.__module__.split(".")[0]
        module = room if hasattr(sys.modules.get(room), base.__name__) else base.__module__
        count = sum(t.numel() for t in self._module().parameters())
        body = (
            f"A {self.kind} of type `{self.type_name}` with {count:,} parameters.\n\n"
            f"```python\nfrom {module} import {base.__name__}\n\n{self.kind} = {base.__name__}.from_pretrained(path_or_repo)\n```\n\n"
            f"```yaml\n{self.config.to_yaml()}```\n\nFingerprint `{self.fingerprint}`."
        )
        tags = ["intarsia", self.kind, self.type_name]
        return model_card(f"{type(self).__name__} {self.kind}", body, tags=tags, license=license, metrics=metrics)

    # Loading ---------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        max_bytes: int | None = None,
    ) -> Self:
        """The registered class that ``config.json`` names, on the CPU, in eval mode.

        Args:
            path_or_repo: a run folder (its ``model/``), the folder of a release, or a Hub id: ``user/name``,
                ``user/name@revision``, ``user/name//subfolder``.
            subfolder: such as ``priors/0``, below that of the name.
            revision: a commit, branch or tag of the Hub; the weights come from the same commit as the configuration.
            local_files_only: take them from the Hub's cache.
            token: as in huggingface_hub; by default the environment's or that of the login.
            max_bytes: the memory that parameters and buffers may take; half of the machine's by default.

        Raises:
            HubError: a missing file, another format, kind or type, a wrong configuration, tensor or hash, or too many bytes.
        """
        prefix = check_subfolder(subfolder) + "/" if subfolder else ""
        path_or_repo = path_or_repo if subfolder else release_folder(path_or_repo)
        got = fetch(path_or_repo, [prefix + CONFIG], revision=revision, local_files_only=local_files_only, token=token)
        path = got.folder / (prefix + CONFIG)
        tree = _read_config(path)
        target, config, spec = cls._resolve(tree, path)
        dtype = getattr(torch, tree["dtype"])
        try:
            meta = build_on_meta(target, config, spec, dtype, default_max_bytes() if max_bytes is None else max_bytes)
        except Exception as error:  # whatever a constructor raises for a configuration that somebody else wrote
            raise HubError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        got = fetch(path_or_repo, [prefix + WEIGHTS], revision=got.revision, local_files_only=local_files_only, token=token)
        weights = got.folder / (prefix + WEIGHTS)
        try:
            compare(read_header(weights), module_tensors(meta), str(weights))
            with torch.random.fork_rng(devices=[]):  # building draws random weights; the caller's generator stays as it was
                module = target(config, spec).to(dtype)
            read_into(weights, module_tensors(module))
        except TensorFileError as error:
            raise HubError(str(error)) from None
        for key, value in (("fingerprint", module.fingerprint), ("sha256", module.weights_sha256)):
            if tree[key] != value:
                raise HubError(f"{weights}: the {key} is {value}; {CONFIG} says {tree[key]}")
        return cast(Self, module.eval())

    @classmethod
    def _resolve(cls, tree: Mapping[str, Any], path: Path) -> tuple[type[Any], Config, Any]:
        """The class, configuration and spec that a ``config.json`` describes."""
        if tree["kind"] != cls.kind:
            raise HubError(f"{path}: holds a {tree['kind']!r}; expected a {cls.kind!r}")
        try:
            target = cls.registry.get(tree["type"])
            if not issubclass(target, cls):
                raise HubError(f"{path}: holds the type {tree['type']!r}, which is no {cls.__name__}")
            config = cls.registry.config(tree["type"]).from_dict(tree["config"])
            if config.type_name != tree["type"]:
                raise HubError(f"{path}: type is {tree['type']!r}, but config.type is {config.type_name!r}")
            return target, config, target._spec_from_dict(tree["spec"])
        except ConfigError as error:
            raise HubError("; ".join(f"{path}: config.{line}" for line in error.errors)) from None
        except HubError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HubError(f"{path}: {type(error).__name__ if isinstance(error, KeyError) else 'spec'}: {error}") from error

    # Publishing ------------------------------------------------------------------------------------------------
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> str:
        """Publishes the release as one commit and returns the commit's id; the token is the environment's or that of the login."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics, license=license)
            return push_folder(repo_id, Path(folder), private=private, revision=revision, commit_message=commit_message)


def _read_config(path: Path) -> dict[str, Any]:
    """The checked top level of a ``config.json``."""
    tree = read_json(path, HubError)
    if not isinstance(tree, dict) or "format" not in tree:
        raise HubError(f"{path}: has no 'format'; expected {FORMAT!r}")
    if tree["format"] != FORMAT:
        raise HubError(f"{path}: format {tree['format']!r}; this version of intarsia reads {FORMAT!r}")
    if set(tree) != set(_KEYS):
        raise HubError(f"{path}: the keys are {', '.join(sorted(map(str, tree)))}; expected {', '.join(sorted(_KEYS))}")
    for key in _KEYS:
        wanted = dict if key in ("config", "spec") else str
        if not isinstance(tree[key], wanted):
            raise HubError(f"{path}: {key} is a {type(tree[key]).__name__}; expected a {wanted.__name__}")
    if tree["dtype"] not in ("float32", "float64", "float16", "bfloat16"):
        raise HubError(f"{path}: dtype {tree['dtype']!r}; expected float32, float64, float16 or bfloat16")
    return tree


