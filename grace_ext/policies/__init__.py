"""Policies by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..parts.registry import policies as registry

names, get, register = registry.names, registry.get, registry.register
