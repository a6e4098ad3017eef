from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import IncompatiblePartsError
from ..parts.field import HALVES, ITEMSIZE
from ..parts.requests import AllReduce
from . import register
from .base import Communicator, exchanged


@register("allreduce")
@dataclass(frozen=True)
class Allreduce(Communicator):
    """Sums the payloads in the network and decodes the mean once.

    Only for payloads that can be added: shared positions (randomk), shared factors (powersgd), an agreed scale (scaled_int), plain casts
    (none, fp16, bf16), and votes (signsgd, signum), which are counted in the smallest of 8-, 16- and 32-bit integers that holds n of them.
    A sum of 16-bit values is rounded to 16 bits, which no memory sees: error feedback returns what a rank's own payload lost, not that.
    Sent per rank: 2 (n-1)/n m bytes for a payload of m bytes (ring), which is below 2 m for any number of ranks.
    """

    carries_payloads: ClassVar[bool] = True

    def exchange(self, ops, compressor, x, spec, info, state):
        payload, state = compressor.compress(ops, x, spec, info, state)
        return (yield from self.send(ops, compressor, payload, spec, info, state))

    def send(self, ops, compressor, payload, spec, info, state, out=None):
        if compressor.result == "vote":
            counts = yield AllReduce(compressor.counts(ops, payload, spec, info), _counter(info.size))
            return exchanged(ops, compressor, payload, compressor.elected(ops, counts, spec, info), spec, info, state)
        (field,) = compressor.fields(spec)
        narrow = field.dtype in HALVES
        mean = yield AllReduce(payload[0] if narrow else ops.from_bytes(payload[0], field.dtype), field.dtype)
        aggregate = compressor.decompress_into(ops, (mean if narrow else ops.to_bytes(mean, field.dtype),), spec, info, out)
        return exchanged(ops, compressor, payload, aggregate, spec, info, state)

    def input_bytes(self, compressor, spec, n):
        return ITEMSIZE[_counter(n)] * compressor.number_of_counts(spec) if compressor.result == "vote" else compressor.nbytes(spec)

    def collectives(self, n, payload, dense):
        return [("allreduce", payload)]

    def decodes(self, n):
        return 1

    def check(self, compressor):
        if not (compressor.summable or compressor.result == "vote"):
            raise IncompatiblePartsError(
                f"{compressor.name!r} payloads cannot be summed (each rank picks its own positions, scales or codes); "
                "use communicator 'allgather' or 'broadcast'"
            )
        super().check(compressor)


def _counter(n: int) -> str:
    """Returns the dtype of the integers that count the votes of n ranks."""
    return "int8" if n <= 127 else "int16" if n <= 32767 else "int32"
