"""Finds communicators by name: `names()` lists them, `get(name)` returns the class, and the decorator `register(name)` adds one."""

from ..parts.registry import communicators as registry

names, get, register = registry.names, registry.get, registry.register
