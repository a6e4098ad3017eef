from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Compressor
from .fast_path import Fused

if TYPE_CHECKING:
    pass

# Added for each rank that votes: turns a tie into +1, reverses no majority, and keeps float32 sums of up to 1,023 ranks exact.
TIE_BREAK = 2.0**-13


class _Vote(Compressor):
    """The base of signsgd and signum. The result is the majority of the ranks' signs, whether ballots travel as one bit per element or are
    counted by an integer all-reduce."""

    wants_memory: ClassVar[bool] = True
    result: ClassVar[str] = "vote"
    natural_memory: ClassVar[str] = "none"  # a vote has no magnitude, so a residual of it says little
    ties: str

    def fields(self, spec):
        return Field("votes", "uint8", 1), Field("signs", "uint8", (spec.size + 7) // 8)

    def ballot(self, ops, x):
        """Returns the payload: whether this rank votes, and its signs."""
        return self._paper(ops, ops.pack_signs(x), ops.any_nonzero(x))

    def _paper(self, ops, signs, votes):
        return ops.upload(np.array([votes], np.uint8)), signs

    def compress(self, ops, x, spec, info, state):
        return self.ballot(ops, x), state

    def decompress(self, ops, payload, spec, info):
        votes = int(payload[0][0])
        if votes > 1:
            raise PayloadError(f"has a vote flag of {votes}, expected 0 or 1")
        return ops.unpack_signs(payload[1], spec.size) if votes else ops.zeros(spec.size)

    def accumulate(self, ops, total, payload, spec, info):
        total += self.decompress(ops, payload, spec, info)
        if self.ties == "plus" and int(payload[0][0]):
            total += TIE_BREAK

    def aggregate(self, ops, total, spec, info):
        total[:] = ops.sign(total)
        return total

    def combine(self, ops, payloads, spec, info, out=None):
        flags = {int(payload[0][0]) for payload in payloads}
        if not ops.kernels or not flags <= {0, 1}:
            return super().combine(ops, payloads, spec, info, out)
        total, ballots = ops.empty(spec.size) if out is None else out, [payload[1] for payload in payloads if int(payload[0][0])]
        tie = 1 if self.ties == "plus" and ballots else 0
        ops.kernels.vote(total, ops.concat([ops.pack_signs(total[:0]), *ballots]), len(ballots), np.float32(tie))
        return total

    def counts(self, ops, payload, spec, info):
        """Returns int64[d + 1]: this rank's ballot in a form that can be summed, and whether it votes."""
        signs = ops.as_int(self.decompress(ops, payload, spec, info))
        return ops.concat([signs, ops.arange(1) + int(payload[0][0])])

    def elected(self, ops, counts, spec, info):
        """Returns the result of the vote, given the sum of all ranks' counts."""
        total = ops.cast(counts[:-1], "float32")
        if self.ties == "plus" and int(counts[-1]):
            total = total + TIE_BREAK
        return self.aggregate(ops, total, spec, info)

    def recompressor(self):
        return _Elected()


class _Elected(Compressor):
    """Sends the result of a vote, in {-1, 0, +1}, in 2 bits per element. Not registered: used by reduce_scatter for its shards."""

    result: ClassVar[str] = "vote"

    def fields(self, spec):
        return (Field("codes", "uint8", (2 * spec.size + 7) // 8),)

    def compress(self, ops, x, spec, info, state):
        return (ops.pack(ops.as_int(x) + 1, 2),), state

    def decompress(self, ops, payload, spec, info):
        codes = ops.unpack(payload[0], 2, spec.size)
        if int(codes.max()) > 2:
            raise PayloadError("has a code above 2")
        return ops.cast(codes - 1, "float32")


def ties_knob():
    return knob("zero", "result of a tied vote: zero is 0, plus is +1", choices=("zero", "plus"))


@register("signsgd")
@dataclass(frozen=True)
class SignSGD(_Vote):
    """Sends signs, and returns their majority vote.

    The payload is sign(x_j), one bit; zeros count as +1, but a tensor that is zero everywhere casts no vote. The result is sign(sum over
    ranks), in {-1, 0, +1}: NOT divided by the world size, whatever `op` is.  x: float[d] -> ceil(d / 8) + 1 bytes.
    Ties (an even number of votes) give 0, or +1 with ties='plus'. Neither unbiased nor a contraction; the step has length sqrt(d), so
    choose a learning rate 10 to 100 times lower than for SGD. Without error feedback it fails on simple problems; 'efsignsgd' with
    'residual' does not. With allgather every rank counts all votes, with reduce_scatter each rank counts its shard (1 bit up, 2 bits
    down), with allreduce the network counts in 8-bit integers (16-bit beyond 127 ranks). Source: Bernstein et al. 2018. GRACE sends a
    byte per sign.
    """

    ties: str = ties_knob()

    def fused(self, ops, grad, feedback, spec, info, state):
        if grad.dtype != np.float32:
            return None
        if feedback.residual is None:
            done = ops.signs_of(grad)
            return done and Fused(self._paper(ops, *done), None)
        if (done := ops.compensate_signs(feedback, grad, 1)) is None:
            return None
        x, signs, (total,) = done
        if total:
            ops.kernels.subtract_signs(x, np.float32(-1), np.float32(1))
        return Fused(self._paper(ops, signs, bool(total)), x)


@register("signum")
@dataclass(frozen=True)
class Signum(_Vote):
    """Sends the signs of a running mean of the gradient, and returns their majority vote.

    m <- beta m + (1 - beta) x, m = 0 at first; the payload is sign(m_j), one bit. Result and communicators are those of signsgd.
    x: float[d] -> ceil(d / 8) + 1 bytes.  State: `signum_momentum`, float32[d], a copy (GRACE keeps a view of the gradient).
    A beta (`momentum`) nearer to 1 averages longer; with momentum=0 it is signsgd. The optimizer should have no momentum of its own.
    Source: Bernstein et al. 2018.
    """

    momentum: float = knob(0.9, "fraction of the running mean that is kept per step", low=0, high=0.9999, headline=True)
    ties: str = ties_knob()

    def init(self, ops, spec, info):
        return {"signum_momentum": ops.zeros(spec.size)}

    def _mean(self, ops, x, state):
        return ops.sum_up(Feedback(state["signum_momentum"], self.momentum, 1 - self.momentum), x)

    def compress(self, ops, x, spec, info, state):
        mean = self._mean(ops, x, state)
        return self.ballot(ops, mean), {"signum_momentum": mean}

    def exchange(self, ops, x, spec, info, state, communicator):
        mean = self._mean(ops, x, state)
        done = yield from communicator.exchange(ops, SignSGD(self.ties), mean, spec, info, state)
        return done._replace(state={**done.state, "signum_momentum": mean})
