"""Fixtures for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grace_ext.communicators import shards
from grace_ext.testing.worlds import WITH_DEVICE, World


@pytest.fixture(params=WITH_DEVICE, ids=lambda world: world.name)
def world(request) -> World:
    """Each installed tensor library in turn, and torch with tensors of a pretended device."""
    return request.param


@pytest.fixture
def small_shards(monkeypatch) -> Iterator[None]:
    """Lets small tensors be cut among the ranks, as large ones are."""
    monkeypatch.setattr(shards, "FEWEST", 1)
    shards.shards.cache_clear()
    yield
    shards.shards.cache_clear()
