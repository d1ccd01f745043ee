"""A registry maps the ``type`` of a configuration to the class that it configures."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
V = TypeVar("V")


class Registry(Generic[T]):
    """Names -> (class, configuration class). The modules of ``package`` are imported at the first look-up.

    A new file in the package, or a ``@register`` anywhere in a user's program, adds a type.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._discovered = package is None
        self._classes: dict[str, type[T]] = {}
        self._configs: dict[str, type[Any]] = {}

    def register(self, name: str, config: type[Any]) -> Callable[[type[T]], type[T]]:
        """Class decorator: ``@QUANTIZERS.register("vq", VQConfig)``.

        Raises ValueError on a second use of a name or of a configuration class, and for the configuration of another registry.
        """

        def add(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known!r} and {cls!r}")
            if getattr(config, "registry", None) is not self:
                raise ValueError(f"{self.kind} {name!r}: {config.__name__} is no configuration of a {self.kind}")
            if config.type_name not in (None, name):
                raise ValueError(f"{self.kind} {name!r}: {config.__name__} already configures {config.type_name!r}")
            self._classes[name] = cls
            self._configs[name] = config
            config.type_name = name
            cls.type_name = name  # type: ignore[attr-defined]
            return cls

        return add

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # first, as the modules look things up while they are imported
        assert self._package is not None
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.ispkg:
                    importlib.import_module(f"{self._package}.{module.name}")
        except BaseException:
            self._discovered = False  # half a registry must not pass for a whole one
            raise

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._classes)

    def _look_up(self, table: dict[str, V], name: str) -> V:
        self._discover()
        if not isinstance(name, str) or name not in table:
            near = difflib.get_close_matches(str(name), table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"unknown {self.kind} {name!r}{hint} known: {', '.join(self.names())}")
        return table[name]

    def get(self, name: str) -> type[T]:
        """The class of that name; ValueError with the known names otherwise."""
        return self._look_up(self._classes, name)

    def config(self, name: str) -> type[Any]:
        """The configuration class of that name."""
        return self._look_up(self._configs, name)

    def build(self, config: Any, *args: Any, **kwargs: Any) -> T:
        """The object that ``config`` describes: its class called with (config, *args, **kwargs)."""
        return self.get(config.type_name)(config, *args, **kwargs)  # type: ignore[call-arg]
