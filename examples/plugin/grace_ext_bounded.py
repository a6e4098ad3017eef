"""A memory in a package of its own: `grace_ext.grace("topk(ratio=0.01) + bounded(limit=0.5)")`."""

from dataclasses import dataclass
from typing import ClassVar

from grace_ext.memories.base import Memory
from grace_ext.parts import knob


@dataclass(frozen=True)
class Bounded(Memory):
    """Error feedback that forgets what exceeds a limit: no element of the residual grows beyond it.

    p = e + g;  e <- p - C(p), each element cut to [-limit, limit].
    State: `residual` (e), float[d], zero at first, in units of the gradient.
    A low limit loses more of what was not sent; a high one lets old gradients return in bursts.
    """

    feeds_back: ClassVar[bool] = True
    limit: float = knob(1.0, "largest magnitude of an element of the residual", above=0, high=1e6, headline=True)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + grad

    def after(self, ops, compensated, sent, spec, info, state):
        unsent = self.unsent(ops, compensated, sent)
        unsent = ops.where(unsent > self.limit, self.limit, unsent)
        return {"residual": ops.cast(ops.where(unsent < -self.limit, -self.limit, unsent), "float32")}
