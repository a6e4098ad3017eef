"""The state of one tensor maps keys to flat arrays. The keys of a policy begin with the policy's path and a colon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import Array

State = Mapping[str, "Array"]


def own_state(path: str, state: State) -> dict[str, Array]:
    """Returns the part of a tensor's state that belongs to the policy at this path, by the policy's own keys."""
    return {key[len(path) + 1 :]: array for key, array in state.items() if key.startswith(f"{path}:")}


def is_own(key: str) -> bool:
    """Whether a key of a tensor's state belongs to a policy. A rank may take over such state from another rank."""
    return ":" in key


def as_state(path: str, own: State) -> dict[str, Array]:
    """Returns a policy's own state under the keys of the tensor's state: the inverse of `own_state`."""
    return {f"{path}:{key}": array for key, array in own.items()}
