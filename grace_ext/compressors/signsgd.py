from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Compressor, sent_by
from .fast_path import Fused
from .forms.batched_signs import BatchedSigns
from .forms.scales import blocks

# Added for each rank that votes in the block: turns a tie into +1, reverses no majority, and keeps float32 sums of up to 1,023 ranks exact.
TIE_BREAK = 2.0**-13


class _Vote(Compressor):
    """The base of signsgd and signum. The result is the majority of the ranks' signs, whether ballots travel as one bit per element or are
    counted by an integer all-reduce."""

    result: ClassVar[str] = "vote"
    ties: str
    block: int | None

    def fields(self, spec):
        return Field("votes", "uint8", (self._blocks(spec)[1] + 7) // 8), Field("signs", "uint8", (spec.size + 7) // 8)

    def _blocks(self, spec):
        return blocks(spec.size, self.block)

    def ballot(self, ops, x, spec):
        """Returns the payload: in which blocks this rank votes, and its signs."""
        votes = ops.block_norms(x, self._blocks(spec)[0], np.inf) > 0
        return ops.pack(ops.as_int(votes), 1), ops.pack_signs(x)

    def _paper(self, ops, signs, votes):
        return ops.upload(np.packbits(votes, bitorder="little")), signs

    def _votes(self, ops, payload, spec):
        """Returns float32: 1 for each block in which the sender of this payload votes, else 0. Raises PayloadError."""
        number = self._blocks(spec)[1]
        most = 2 ** ((number - 1) % 8 + 1) - 1
        last = ops.copy(payload[0][-1:])
        ops.require((last <= most).all(), lambda: f"has vote flags that end in {int(last[0])}, expected at most {most} for {number} blocks")
        return ops.cast(ops.unpack(payload[0], 1, number), "float32")

    def _per_element(self, ops, votes, spec):
        """Returns float32[d]: the value of each element's block."""
        return ops.spread(votes, self._blocks(spec)[0], spec.size)

    def compress(self, ops, x, spec, info, state):
        return self.ballot(ops, x, spec), state

    def decompress(self, ops, payload, spec, info):
        votes, signs = self._votes(ops, payload, spec), ops.unpack_signs(payload[1], spec.size)
        return ops.where((votes if len(votes) == 1 else self._per_element(ops, votes, spec)) > 0, signs, 0.0)

    def accumulate(self, ops, total, payload, spec, info):
        total += self.decompress(ops, payload, spec, info)
        if self.ties == "plus":
            total += self._per_element(ops, self._votes(ops, payload, spec) * TIE_BREAK, spec)

    def aggregate(self, ops, total, spec, info):
        total[:] = ops.sign(total)
        return total

    def combine(self, ops, payloads, spec, info, out=None):
        block, number = self._blocks(spec)
        if not ops.kernels or (number > 1 and block % 8):
            return super().combine(ops, payloads, spec, info, out)
        by_rank = []
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                by_rank.append(self._votes(ops, payload, spec))
        total, votes, plus = ops.empty(spec.size) if out is None else out, np.concatenate(by_rank), self.ties == "plus"
        if number > 1:
            tie = votes * (TIE_BREAK if plus else 0)
            ops.kernels.sum_signs(total, ops.concat([signs for _, signs in payloads]), tie - votes, tie + votes, block, np.float32(1))
            return self.aggregate(ops, total, spec, info)
        ballots = [signs for (_, signs), voted in zip(payloads, votes, strict=True) if voted]
        ops.kernels.vote(total, ops.concat([ops.pack_signs(total[:0]), *ballots]), len(ballots), np.float32(plus and bool(ballots)))
        return total

    def batched(self, specs):
        return BatchedSigns(self, specs) if all(self._blocks(spec)[1] == 1 for spec in specs) else None

    def heads_of(self, ops, x, ends, sizes):
        """Returns which of the tensors that end there are not all zeros: uint8, 1 or 0 for each; see BatchedSigns."""
        return (ops.pack(ops.as_int(ops.sums_of_each(x, ends) > 0), 8),)

    def sides_of(self, ops, heads, summing):
        """Returns what elements below zero are worth, and the others; with what breaks ties if ranks are summed."""
        votes = heads[0]
        ops.require((votes <= 1).all(), "has vote flags above 1, for 1 block each")
        votes = ops.cast(votes, "float32")
        tie = votes * (TIE_BREAK if summing and self.ties == "plus" else 0)
        return tie - votes, tie + votes

    def counts(self, ops, payload, spec, info):
        """Returns int64: this rank's ballot in a form that can be summed, and for each block whether it votes."""
        signs = ops.as_int(self.decompress(ops, payload, spec, info))
        return ops.concat([signs, ops.unpack(payload[0], 1, self._blocks(spec)[1])])

    def number_of_counts(self, spec):
        return spec.size + self._blocks(spec)[1]

    def elected(self, ops, counts, spec, info):
        """Returns the result of the vote, given the sum of all ranks' counts."""
        total = ops.cast(counts[: spec.size], "float32")
        if self.ties == "plus":
            votes = ops.cast(ops.as_int(counts[spec.size :] > 0), "float32")
            total = total + self._per_element(ops, votes * TIE_BREAK, spec)
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
        ops.require((codes <= 2).all(), "has a code above 2")
        return ops.cast(codes - 1, "float32")


def ties_knob():
    return knob("zero", "result of a tied vote: zero is 0, plus is +1", choices=("zero", "plus"))


def block_knob():
    return knob(None, "elements that share a vote flag: a block of zeros casts no vote; None: the whole tensor", low=1)


@register("signsgd")
@dataclass(frozen=True)
class SignSGD(_Vote):
    """Sends signs, and returns their majority vote.

    The payload is sign(x_j), one bit; zeros count as +1, but a block (default: the whole tensor) that is zero everywhere casts no vote.
    The result is sign(sum over ranks), in {-1, 0, +1}: NOT divided by the world size, whatever `op` is.
    x: float[d] -> ceil(d / 8) bytes of signs, and one bit per block.
    Without `block`, rows of an embedding that never had a gradient move at every step, as zeros vote +1. Where no rank votes the result is
    0: with a `block` that divides the rows, a row moves only if a rank has a gradient for it. block=1 is exact for every element, and costs
    a second bit. In reduce_scatter blocks are counted from the start of each shard.
    Ties (an even number of votes) give 0, or +1 with ties='plus'. Neither unbiased nor a contraction; the step has length sqrt(d), so
    choose a learning rate 10 to 100 times lower than for SGD. Use it without a memory: a vote has no magnitude, so a residual of it says
    little. Votes fail on some simple problems; compressor 'efsignsgd', which also sends a scale and has a residual, does not.
    With allgather every rank counts all votes, with reduce_scatter each rank counts its shard (1 bit up, 2 bits down), with allreduce
    the network counts in 8-bit integers (16-bit beyond 127 ranks). Source: Bernstein et al. 2018. GRACE sends a byte per sign.
    """

    ties: str = ties_knob()
    block: int | None = block_knob()

    def fused(self, ops, grad, feedback, spec, info, state):
        if grad.dtype != np.float32 or self._blocks(spec)[1] > 1:
            return None
        if feedback.residual is None:
            done = ops.signs_of(grad)
            return done and Fused(self._paper(ops, done[0], [done[1]]), None)
        if (done := ops.compensate_signs(feedback, grad, 1)) is None:
            return None
        x, signs, (total,) = done
        if total:
            ops.kernels.subtract_signs(x, np.float32(-1), np.float32(1))
        return Fused(self._paper(ops, signs, [bool(total)]), x)


@register("signum")
@dataclass(frozen=True)
class Signum(_Vote):
    """Sends the signs of a running mean of the gradient, and returns their majority vote.

    m <- beta m + (1 - beta) x, m = 0 at first; the payload is sign(m_j), one bit. Result, blocks and communicators are those of signsgd; a
    block votes from its first gradient on.  x: float[d] -> ceil(d / 8) bytes of signs, and one bit per block.
    State: `signum_momentum`, float32[d], a copy (GRACE keeps a view of the gradient).
    A beta (`momentum`) nearer to 1 averages longer; with momentum=0 it is signsgd. The optimizer should have no momentum of its own. Use
    it without a memory, as signsgd. Source: Bernstein et al. 2018.
    """

    momentum: float = knob(0.9, "fraction of the running mean that is kept per step", low=0, high=0.9999, headline=True)
    ties: str = ties_knob()
    block: int | None = block_knob()

    def init(self, ops, spec, info):
        return {"signum_momentum": ops.zeros(spec.size)}

    def _mean(self, ops, x, state):
        return ops.sum_up(Feedback(state["signum_momentum"], self.momentum, 1 - self.momentum), x)

    def compress(self, ops, x, spec, info, state):
        mean = self._mean(ops, x, state)
        return self.ballot(ops, mean, spec), {"signum_momentum": mean}

    def exchange(self, ops, x, spec, info, state, communicator):
        mean = self._mean(ops, x, state)
        done = yield from communicator.exchange(ops, SignSGD(self.ties, self.block), mean, spec, info, state)
        return done._replace(state={**done.state, "signum_momentum": mean})
