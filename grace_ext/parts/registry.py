"""Maps names to classes, for the kinds of parts.

Built-in parts register themselves when their module is imported; the registry imports every module of its package at the first look-up,
so a new module in the package is enough. Parts of other packages are found by entry points, in the groups `grace_ext.compressors`,
`grace_ext.memories`, `grace_ext.communicators` and `grace_ext.policies` (name = class). No registration replaces another.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..errors import GraceError, UnknownPartError, shown, warn_user
from .part import Part

C = TypeVar("C", bound=type)


#: Held while parts are imported; one for all kinds, which may need each other.
LOADING = threading.RLock()


class Registry:
    """Holds the known parts of one kind. package: the package of the built-in parts, and the name of the entry-point group. also: modules
    of other packages that contain built-in parts, too."""

    def __init__(self, kind: str, package: str, also: tuple[str, ...] = ()):
        self.kind, self.package, self._also = kind, package, also
        self._classes: dict[str, type] = {}
        self._begun = False
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Returns a class decorator that registers a class and sets its attribute `name`. Raises GraceError if the name is taken."""

        def decorate(cls: C) -> C:
            self._add(name, cls)
            return cls

        return decorate

    def names(self) -> tuple[str, ...]:
        """Returns all known names, sorted."""
        self._load()
        return tuple(sorted(self._classes))

    def get(self, name: str) -> Any:
        """Returns the class of that name. Raises UnknownPartError, which lists the nearest names."""
        self._load()
        try:
            return self._classes[name]
        except (KeyError, TypeError):  # TypeError: the name is not hashable
            text = name if isinstance(name, str) else shown(name)
            nearest = difflib.get_close_matches(text.lower(), self._classes, n=3, cutoff=0.6)
            raise UnknownPartError(self.kind, name, nearest, self.names()) from None

    def _add(self, name: str, cls: type) -> None:
        missing = sorted(key for key in dir(cls) if getattr(getattr(cls, key), "__isabstractmethod__", False))
        if missing:
            raise GraceError(
                f"{self.kind} {name!r} cannot be registered: {cls.__module__}.{cls.__qualname__} does not define "
                f"{', '.join(missing)}, which every {self.kind} needs (docs/extending.md says what each returns)"
            )
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise GraceError(f"{self.kind} {name!r} is already {known.__module__}.{known.__qualname__}; choose another name")
        cls.name = name  # type: ignore[attr-defined]
        self._classes[name] = cls

    def _load(self) -> None:
        if self._loaded:
            return
        with LOADING:  # other threads wait until all parts are there; a part that is imported may look up a name itself
            if not self._begun:
                self._begun = True
                self._import()
                self._loaded = True

    def _import(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for name in self._also:
            importlib.import_module(name)
        for entry in entry_points(group=self.package):
            try:
                cls = entry.load()
                if not (isinstance(cls, type) and issubclass(cls, Part) and cls.kind == self.kind):
                    raise TypeError(f"{cls!r} is not a subclass of grace_ext's {self.kind} class")
                self._add(entry.name, cls)
            except Exception as error:  # a broken plugin must not disable every other part
                # A host may differ from rank 0's, and its own error would say no more than that the name is unknown.
                warn_user(f"{self.kind} {entry.name!r} of {entry.value} was not loaded: {error!r}", every_rank=True)


compressors = Registry("compressor", "grace_ext.compressors")
memories = Registry("memory", "grace_ext.memories")
communicators = Registry("communicator", "grace_ext.communicators")
policies = Registry("policy", "grace_ext.policies", also=("grace_ext.planning.auto",))  # auto uses the planner
mechanisms = Registry("mechanism", "grace_ext.privacy")  # what stands before "|"; there is one
