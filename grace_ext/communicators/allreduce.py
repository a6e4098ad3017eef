from __future__ import annotations

from dataclasses import dataclass

from ..errors import IncompatiblePartsError
from ..exchange import AllReduce
from . import register
from .base import Communicator


@register("allreduce")
@dataclass(frozen=True)
class Allreduce(Communicator):
    """Sums the payloads in the network and decodes the mean once.

    Only for payloads that can be added: shared positions (randomk), shared factors (powersgd), plain casts (none, fp16, bf16).
    Sent per rank: 2 (n-1)/n m bytes for a payload of m bytes (ring), whatever the number of ranks.
    """

    def exchange(self, ops, compressor, payload, spec, info):
        (field,) = compressor.fields(spec)
        mean = yield AllReduce(ops.from_bytes(payload[0], field.dtype), field.dtype)
        return compressor.decompress(ops, (ops.to_bytes(mean, field.dtype),), spec, info)

    def check(self, compressor):
        if not compressor.summable:
            raise IncompatiblePartsError(
                f"{compressor.name!r} payloads cannot be summed (each rank picks its own positions, scales or codes); "
                "use communicator 'allgather' or 'broadcast'"
            )
