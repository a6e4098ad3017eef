"""Memories by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..registry import Registry

registry = Registry("memory", "grace_ext.memories")
names, get, register = registry.names, registry.get, registry.register
