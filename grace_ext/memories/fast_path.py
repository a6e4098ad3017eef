"""The compiled form that a memory may have. An author need not read this: without it the plain form runs, and gives the same bytes.

A memory that adds a residual and keeps what was not sent can leave both to the compressor, which does them in the pass that compresses
(compressors/fast_path.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..compressors.base import Exchanged
    from ..parts.ops import Array, Feedback, Ops
    from ..parts.state import State


class FastPath:
    """The compiled form of a memory; the default of `feedback` says that there is none. `Memory` inherits it."""

    #: Whether tensors laid end to end may go through it as one: it has `feedback`, keeps nothing but 'residual', and asks for no more.
    elementwise: ClassVar[bool] = False

    def feedback(self, state: State) -> Feedback | None:
        """Returns what is added to `incoming` before compression. None if the memory has no such form: the result must be the aggregate,
        and what is kept must be all that was not sent, under the key 'residual', and what `marked` gives."""
        return None

    def incoming(self, grad: Array, state: State) -> Array:
        """Returns what stands in the gradient's place, given the state with what `absorb` changed of it."""
        return grad

    def marked(self, ops: Ops, sent: Exchanged, state: State) -> State:
        """Returns what changes in the state because of where values were sent, for a payload of one round."""
        return {}
