from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

from ..compressors.base import Exchanged, sent_by
from ..compressors.forms.sparse import Selecting, values_knob
from ..errors import IncompatiblePartsError
from ..parts.requests import Gather, Scatter
from ..parts.tensor import TensorSpec
from . import register
from .base import Communicator, fields_by_rank
from .shards import shards


@dataclass(frozen=True)
class _NonZeros(Selecting):
    """Sends all elements that are not zero, exactly. Not registered: it only carries the regions of sparse_allreduce."""

    name: ClassVar[str] = "nonzeros"
    values: str = values_knob()

    def select(self, ops, x, spec, info, state):
        return ops.positions(x != 0), state


@lru_cache
def _nonzeros(values: str) -> _NonZeros:
    return _NonZeros(values=values)


@register("sparse_allreduce")
@dataclass(frozen=True)
class SparseAllreduce(Communicator):
    """Sums sparse payloads by region: one rank sums each region of a tensor, and all ranks gather the sums.

    What a rank selected is cut into n regions by position, or into as many as have 16,384 elements; a smaller tensor is one region. Every
    rank sends a region to its owner (all-to-all of variable sizes), which sums the n contributions; then all ranks gather the regions'
    nonzero sums. The result is that of allgather, up to the rounding of the division.
    Sent per rank, on average: k (n-1)/n elements, and (n-1)/n u of the union of all selections, against (n-1) k with allgather. It pays if
    the ranks select similar positions, or if n is large; u is at most min(d, n k). Every rank decodes the union once, not n payloads.
    For compressors that pick positions and send plain values (topk, threshold, dgc, sidco, ...). Source: the region-wise
    reduction of Ok-Topk (Li and Hoefler 2022), exact here.
    """

    def check(self, compressor):
        super().check(compressor)
        if not isinstance(compressor, Selecting):
            raise IncompatiblePartsError(
                f"'sparse_allreduce' sums plain values at positions, which {compressor.name!r} does not send; use communicator "
                "'allgather', or a compressor such as topk, threshold, dgc or sidco"
            )

    def exchange(self, ops, compressor, x, spec, info, state):
        positions, state = compressor.select(ops, x, spec, info, state)
        own = compressor.payload(ops, x, positions, spec)  # the values as they are sent, rounding included
        values = compressor.decompress(ops, own, spec, info)
        parts, whole = _nonzeros(compressor.values), _nonzeros("fp32")
        specs, pieces = _cut(ops, parts, values, spec, info)
        received = yield Scatter(fields_by_rank(parts, specs), pieces)
        payload, finite = (), True
        if mine := specs.get(info.rank):
            mean = parts.combine(ops, received, mine, info)
            if not (finite := ops.all_finite(mean)):  # the sum is out of float32's range: every rank skips the step
                mean = ops.zeros(mine.size)
            payload, _ = whole.compress(ops, mean, mine, info, {})
        fields = fields_by_rank(whole, specs)
        gathered = yield Gather(fields.get(info.rank, ()), payload, by_rank=fields, finite=finite)
        result = ops.concat(list(_opened(ops, whole, gathered, specs, info)))
        return Exchanged(result, partial(_itself, values), state, partial(compressor.positions, ops, own, spec, info))

    def input_bytes(self, compressor, spec, n):
        sizes = [TensorSpec("", (r.stop - r.start,)) for r in shards(spec.name, spec.size, n).values()]
        bounds = [_nonzeros("fp32").nbytes(s) for s in sizes]
        return sum(bounds) + max(bounds)

    def collectives(self, n, payload, dense):
        return [("alltoall", payload), ("allgather", min(dense, n * payload) / n)]

    def decodes(self, n):
        return 2  # on average n regions, each an n-th of a payload, and the result


def _cut(ops, parts, values, spec, info):
    """Returns (specs, payloads) of the regions, by rank."""
    ranges = shards(spec.name, spec.size, info.size)
    specs = {rank: TensorSpec(spec.name, (r.stop - r.start,)) for rank, r in ranges.items()}
    return specs, {rank: parts.compress(ops, values[r], specs[rank], info, {})[0] for rank, r in ranges.items()}


def _opened(ops, whole, payloads, specs, info):
    """Decodes the regions of the result. Raises PayloadError, which names the rank and the parameter."""
    for (rank, spec), payload in zip(specs.items(), payloads, strict=True):
        with sent_by(rank, spec.name):
            values = whole.decompress(ops, payload, spec, info)
        yield values


def _itself(values):
    return values
