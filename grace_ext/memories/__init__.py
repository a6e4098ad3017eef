"""Memories by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..parts.registry import memories as registry

names, get, register = registry.names, registry.get, registry.register
