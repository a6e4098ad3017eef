"""Communicators by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..registry import Registry

registry = Registry("communicator", "grace_ext.communicators")
names, get, register = registry.names, registry.get, registry.register
