"""Fixtures for the whole suite."""

from __future__ import annotations

import pytest

from grace_ext.testing.worlds import WORLDS, World


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def world(request) -> World:
    """Each installed tensor library in turn."""
    return request.param
