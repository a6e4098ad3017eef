"""A communicator in a package of its own: `grace_ext.grace("randomk(ratio=0.1) + residual @ sharded")`."""

from dataclasses import dataclass
from itertools import pairwise

from grace_ext.communicators.base import Communicator, exchanged
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts import Field, Gather, Scatter


@dataclass(frozen=True)
class Sharded(Communicator):
    """Sums payloads by shards: every rank adds up one shard of all payloads, and all gather the sums.

    An all-reduce made of an all-to-all and an all-gather, for engines that have no fast one. Sent per rank: 2 (n-1)/n m bytes for payloads
    of m bytes. For compressors whose payload is one field that can be summed (none, fp16, randomk, randblock).
    """

    def check(self, compressor):
        super().check(compressor)
        if not compressor.summable or compressor.rounds or compressor.keeps_state:
            raise IncompatiblePartsError(f"'sharded' adds payloads up, and those of {compressor} cannot be summed; use 'allgather'")

    def exchange(self, ops, compressor, x, spec, info, state):
        payload, state = compressor.compress(ops, x, spec, info, state)
        (field,) = compressor.fields(spec)
        values, dtype = ops.from_bytes(payload[0], field.dtype), field.dtype
        bounds = [len(values) * rank // info.size for rank in range(info.size + 1)]
        shards = {rank: values[a:b] for rank, (a, b) in enumerate(pairwise(bounds))}
        kinds = {rank: (Field("shard", dtype, len(shard)),) for rank, shard in shards.items()}

        received = yield Scatter(kinds, {rank: (ops.to_bytes(shard, dtype),) for rank, shard in shards.items()})
        total = sum(ops.from_bytes(piece, dtype) for (piece,) in received) / info.divisor
        sums = yield Gather(kinds[info.rank], (ops.to_bytes(total, dtype),), by_rank=kinds)

        mean = ops.concat([ops.from_bytes(piece, dtype) for (piece,) in sums])
        aggregate = compressor.decompress(ops, (ops.to_bytes(mean, dtype),), spec, info)
        return exchanged(ops, compressor, payload, aggregate, spec, info, state)

    def collectives(self, n, payload, dense):
        return [("alltoall", payload), ("allgather", payload / n)]

    def decodes(self, n):
        return 1

    def input_bytes(self, compressor, spec, n):
        return 2 * compressor.nbytes(spec) + 8 * n
