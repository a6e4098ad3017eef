"""Compressors by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..registry import Registry

registry = Registry("compressor", "grace_ext.compressors")
names, get, register = registry.names, registry.get, registry.register
