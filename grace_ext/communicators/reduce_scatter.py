from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..compressors.base import Compressor, Exchanged, naming, sent_by
from ..compressors.fast_path import Payload
from ..errors import NOT_FLAGGED, IncompatiblePartsError, ParameterError
from ..parts.part import knob
from ..parts.requests import Gather, Scatter
from ..parts.tensor import StepInfo, TensorSpec
from . import register
from .base import Communicator, fields_by_rank
from .shards import shard_of, shards


@register("reduce_scatter")
@dataclass(frozen=True)
class ReduceScatter(Communicator):
    """Averages shards of the tensors, each on one rank, compresses the means again and gathers them: an all-reduce of compressed data.

    A tensor is cut into n shards, or into as many as have 16,384 elements; a smaller tensor is one shard. Each is compressed separately.
    Every rank sends a shard to its owner (all-to-all), which decodes and averages the n payloads, adds the shard's residual of earlier
    steps, compresses the sum, and sends it to all (all-gather). The owners of a tensor's shards follow from its name, size and n alone.
    Votes are counted per shard, and their result, in {-1, 0, 1}, needs no second error feedback.
    Sent per rank, on average: 2 (n-1)/n m bytes for a payload of m bytes, against (n-1) m with allgather, for two compressions; equal at
    n = 2.
    State: `shard_residual`, float32, of this rank's shard, empty if it has none; with follow_rate also `shard_rate`, float[1], the learning
    rate it belongs to.
    For compressors of fixed size without whole-tensor state; and for 'lqsgd', whose factors are the shards: they need no second error
    feedback.
    `feedback`: whether it keeps what the second compression loses. By default only if the compressor is biased; True is an error for an
    unbiased one, because error feedback of a random compressor of high variance grows without bound. follow_rate multiplies the second
    residual by lr_before / lr, as memory 'dist_ef_block' does with the first; it needs the learning rate, and a step with lr = 0 leaves
    the state unchanged. If a mean is out of float32's range, all ranks skip the step.
    Source: Zheng, Huang, Kwok 2019; Bernstein et al. 2018 (votes).
    """

    shared_state: ClassVar[tuple[str, ...]] = ("shard_rate",)
    sharded_state: ClassVar[tuple[str, ...]] = ("shard_residual",)
    feedback: bool | None = knob(None, "keep what the second compression loses; None: if the compressor is biased", kind=bool)
    follow_rate: bool = knob(False, "multiply the second residual by lr_before / lr at every step, as memory 'dist_ef_block' does")

    def __post_init__(self):
        super().__post_init__()
        if self.follow_rate and self.feedback is False:
            raise ParameterError(
                "reduce_scatter: follow_rate=True rescales the second residual, which feedback=False leaves out; drop one of them"
            )

    def check_memory(self, memory):
        if self.follow_rate and memory.in_updates:
            raise IncompatiblePartsError(
                f"memory {memory.name!r} works in units of the update already, and follow_rate=True would rescale the second residual "
                "once more; use reduce_scatter without follow_rate"
            )
        if memory.mean_state:
            raise IncompatiblePartsError(
                f"memory {memory.name!r} keeps the mean of what all ranks have sent, and 'reduce_scatter' compresses that mean once "
                "more, so that errors would stay in it; use communicator 'allgather' or 'allreduce'"
            )
        if memory.sends > 1:
            raise IncompatiblePartsError(
                f"memory {memory.name!r} sends two arrays in different units at some steps, and 'reduce_scatter' has only one residual for "
                "them; use communicator 'allgather' or 'allreduce'"
            )

    def check(self, compressor):
        super().check(compressor)
        if compressor.rounds:
            if self.feedback or self.follow_rate:
                raise IncompatiblePartsError(
                    f"{compressor} codes factors whose meaning changes with every step, so a residual of their means cannot be kept; use "
                    "reduce_scatter without feedback=True and follow_rate=True"
                )
            return
        if compressor.summable and compressor.selects:
            raise IncompatiblePartsError(
                f"{compressor.name!r} payloads can be summed as they are, and compressing the mean again would pick other positions; use "
                "communicator 'allreduce'"
            )
        if compressor.matrices_only:
            raise IncompatiblePartsError(
                f"{compressor.name!r} compresses matrices, and 'reduce_scatter' flat shards of them; use communicator "
                f"'{'allreduce' if compressor.summable else 'allgather'}'"
            )
        if self.feedback and compressor.unbiased and compressor.name != "none":
            raise IncompatiblePartsError(
                f"{compressor} is random and unbiased: error feedback of its second compression can grow without bound; leave out "
                "feedback=True"
            )
        if compressor.result == "signs":
            raise IncompatiblePartsError(
                f"the result of {compressor} is not a mean, and 'reduce_scatter' would compress it again as if it were; "
                "use communicator 'allgather'"
            )
        stateful = compressor.keeps_state and compressor.result != "vote"
        if stateful or compressor.whole_model or not compressor.fixed_size:
            why = "keeps state of the whole tensor" if stateful or compressor.whole_model else "sends payloads whose size varies"
            raise IncompatiblePartsError(
                f"{compressor.name!r} {why}, and 'reduce_scatter' compresses shards of a fixed size; use communicator 'allgather'"
                + (" or 'sparse_allreduce'" if compressor.selects else "")
            )

    @property
    def uses_lr(self) -> bool:  # type: ignore[override]
        return self.follow_rate

    def keeps_state(self, compressor):
        wanted = not compressor.unbiased if self.feedback is None else self.feedback
        return wanted and compressor.result != "vote" and compressor.name != "none" and not compressor.rounds

    def init(self, ops, compressor, spec, info):
        if not self.keeps_state(compressor):
            return {}
        mine = shard_of(spec.name, spec.size, info.size, info.rank)
        state = {"shard_residual": ops.zeros(mine.stop - mine.start)}
        return {**state, "shard_rate": ops.zeros(1)} if self.follow_rate else state

    def exchange(self, ops, compressor, x, spec, info, state):
        second, sent = compressor.recompressor(), _compressed(ops, compressor, x, spec, info)
        received = yield Scatter(fields_by_rank(compressor, sent.specs), sent.payloads)
        means = {rank: TensorSpec(f"{s.name} mean", s.shape, s.dtype) for rank, s in sent.specs.items()}
        payload, finite, changed = (), True, {}
        if info.rank in means:
            with naming(spec.name):
                mean = compressor.combine(ops, received, sent.specs[info.rank], info)
            payload, finite, changed = self._sent_again(ops, compressor, mean, means[info.rank], info, state)
        if self.follow_rate and self.keeps_state(compressor) and not self._idle(info):
            changed["shard_rate"] = ops.zeros(1) + self.learning_rate(info)
        fields = fields_by_rank(second, means)
        gathered = yield Gather(fields.get(info.rank, ()), payload, by_rank=fields, finite=finite)
        result = _joined(ops, list(_opened(ops, second, gathered, means, info, spec.name)))
        return Exchanged(result, sent.values, changed, sent.positions)

    def _sent_again(self, ops, compressor, mean, spec, info, state):
        """Compresses the mean of this rank's shard. Returns (payload, whether the mean is finite, what changes in the state)."""
        second, feedback = compressor.recompressor(), self.keeps_state(compressor)
        if feedback:
            mean = ops.cast(mean + self._residual(state, info), "float32")
        if not (finite := ops.all_finite(mean)):  # the sum is out of float32's range: every rank skips the step
            mean = ops.zeros(spec.size)
        payload, _ = second.compress(ops, mean, spec, info, {})
        changed = {}
        if feedback and not self._idle(info):
            changed["shard_residual"] = ops.cast(mean - second.decompress(ops, payload, spec, info), "float32")
        return payload, finite, changed

    def _residual(self, state, info):
        residual = state["shard_residual"]
        if not self.follow_rate:
            return residual
        return residual * (0.0 if self._idle(info) else self.rate_change(float(state["shard_rate"][0]), info))

    def _idle(self, info) -> bool:
        """Whether the optimizer multiplies this step's result by 0, so that what is sent is not applied."""
        return self.follow_rate and not self.learning_rate(info)

    def sum_of_codes(self, ops, coder, name, x, spec, info):
        ranges = shards(f"{spec.name} {name}", len(x), info.size)
        counts = {rank: r.stop - r.start for rank, r in ranges.items()}
        fields = {rank: coder.code_fields(name, count) for rank, count in counts.items()}
        own = {rank: coder.encode(ops, x[r]) for rank, r in ranges.items()}
        received, payload = (yield Scatter(fields, own)), ()
        if info.rank in ranges:
            total = np.zeros(counts[info.rank])
            for rank, its in enumerate(received):
                with sent_by(rank, spec.name):
                    total += coder.decode(ops, its, len(total))
            payload = coder.encode(ops, total / info.size)
        means = []
        for (rank, count), its in zip(counts.items(), (yield Gather(fields.get(info.rank, ()), payload, by_rank=fields)), strict=True):
            with sent_by(rank, spec.name):
                means.append(coder.decode(ops, its, count))
        decoded = [coder.decode(ops, own[rank], count) for rank, count in counts.items()]
        return np.concatenate(decoded), np.concatenate(means) * info.size

    def _coded_bytes(self, coder, spec, n):
        """Returns the bytes of what one of n ranks hands to collectives for coded arrays: all their shards, and the largest once more."""
        total = 0
        for name, count in coder.coded(spec).items():
            sizes = [r.stop - r.start for r in shards(f"{spec.name} {name}", count, n).values()]
            each = [sum(field.max_bytes for field in coder.code_fields(name, size)) for size in sizes]
            total += sum(each) + max(each)
        return total

    def input_bytes(self, compressor, spec, n):
        if compressor.rounds:
            return self._coded_bytes(compressor, spec, n)
        specs = [_shard(spec, spec.name, r) for r in shards(spec.name, spec.size, n).values()]
        second = compressor.recompressor()
        return sum(compressor.nbytes(s) for s in specs) + max(second.nbytes(s) for s in specs)

    def collectives(self, n, payload, dense):
        return [("alltoall", payload), ("allgather", payload / n)]

    def decodes(self, n):
        return 2  # on average n shards, each an n-th of a payload, and the result


class _Sent(NamedTuple):
    """Holds the payloads of one tensor's shards, by the ranks that they were sent to."""

    ops: Any
    compressor: Compressor
    info: StepInfo
    ranges: dict[int, slice]
    specs: dict[int, TensorSpec]
    payloads: dict[int, Payload]

    def values(self):
        return _joined(
            self.ops, [self.compressor.decompress(self.ops, self.payloads[rank], s, self.info) for rank, s in self.specs.items()]
        )

    def positions(self):
        found = []
        for rank, shard in self.ranges.items():
            positions = self.compressor.positions(self.ops, self.payloads[rank], self.specs[rank], self.info)
            if positions is None:
                return None
            found.append(positions + shard.start)
        return self.ops.concat(found)


# The exchanges of all tensors wait for the network together, so they keep little: comprehensions are in functions of their own, because a
# generator would keep a cell for every name that they use.
def _compressed(ops, compressor, x, spec, info) -> _Sent:
    ranges = shards(spec.name, spec.size, info.size)
    specs = {rank: _shard(spec, f"{spec.name}[{rank}]", r) for rank, r in ranges.items()}
    payloads = {rank: compressor.compress(ops, x[r], specs[rank], info, {})[0] for rank, r in ranges.items()}
    return _Sent(ops, compressor, info, ranges, specs, payloads)


def _opened(ops, compressor, payloads, specs, info, parameter):
    """Decodes the shards of the result. Raises PayloadError, which names the rank and the parameter."""
    for (rank, spec), payload in zip(specs.items(), payloads, strict=True):
        with sent_by(rank, parameter):
            values = compressor.decompress(ops, payload, spec, info)
            ops.require(ops.all_finite(values), NOT_FLAGGED)
        yield values


def _shard(spec: TensorSpec, name: str, shard: slice) -> TensorSpec:
    """Describes a shard of the tensor. It has the gradient's dtype, because compressor `none` sends it unchanged."""
    return TensorSpec(name, (shard.stop - shard.start,), spec.dtype)


def _joined(ops, pieces):
    return pieces[0] if len(pieces) == 1 else ops.concat(pieces)
