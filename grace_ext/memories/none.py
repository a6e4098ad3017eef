from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.ops import Feedback
from . import register
from .base import Memory


@register("none")
@dataclass(frozen=True)
class NoMemory(Memory):
    """Keeps nothing: what compression loses is lost. Suited to unbiased compressors. State: none."""

    elementwise: ClassVar[bool] = True

    def init(self, ops, spec, info):
        return {}

    def feedback(self, state):
        return Feedback(None)

    def before(self, ops, grad, spec, info, state):
        return grad

    def after(self, ops, compensated, sent, spec, info, state):
        return state
