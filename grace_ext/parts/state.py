"""The state of one tensor: flat arrays by key, in which a policy's keys begin with its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import Array

State = Mapping[str, "Array"]


def own_state(path: str, state: State) -> dict[str, Array]:
    """What of a tensor's state belongs to the policy at this place, by its own keys."""
    return {key[len(path) + 1 :]: array for key, array in state.items() if key.startswith(f"{path}:")}


def is_own(key: str) -> bool:
    """Whether a key of a tensor's state is a policy's. A rank may go on with another's."""
    return ":" in key


def as_state(path: str, own: State) -> dict[str, Array]:
    """The inverse."""
    return {f"{path}:{key}": array for key, array in own.items()}
