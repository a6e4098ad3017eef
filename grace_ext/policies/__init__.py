"""Policies by name: `names()`, `get(name)` -> class, `register(name)` decorator."""

from ..registry import Registry

registry = Registry("policy", "grace_ext.policies")
names, get, register = registry.names, registry.get, registry.register
