from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..compressors.base import sent_by
from ..parts.requests import Gather
from . import register
from .base import Communicator, exchanged, fields_of


class _EveryPayload(Communicator):
    """Gives every rank every payload; each rank decodes all and sums them in rank order. The base of allgather and broadcast."""

    by_broadcast = False

    carries_payloads: ClassVar[bool] = True

    def exchange(self, ops, compressor, x, spec, info, state):
        payload, state = compressor.compress(ops, x, spec, info, state)
        return (yield from self.send(ops, compressor, payload, spec, info, state))

    def send(self, ops, compressor, payload, spec, info, state, out=None):
        payloads = yield Gather(fields_of(compressor, spec), payload, by_broadcast=self.by_broadcast)
        return exchanged(ops, compressor, payload, compressor.combine(ops, payloads, spec, info, out), spec, info, state)

    def sum_of_codes(self, ops, coder, name, x, spec, info):
        own = coder.encode(ops, x)
        payloads = yield Gather(coder.code_fields(name, len(x)), own, by_broadcast=self.by_broadcast)
        total = np.zeros(len(x))
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                total += coder.decode(ops, payload, len(x))
        return coder.decode(ops, own, len(x)), total

    def collectives(self, n, payload, dense):
        return [("broadcast" if self.by_broadcast else "allgather", payload)]


@register("allgather")
@dataclass(frozen=True)
class Allgather(_EveryPayload):
    """Gathers every rank's payload on every rank; each decodes all and sums them in rank order, so that all ranks get the same bits.

    For any compressor without rounds of its own. Sent per rank: (n-1) m bytes for payloads of m bytes. It sends less than a dense
    all-reduce of S bytes if m / S < 2 / n. Each rank decodes n payloads per step.
    """


@register("broadcast")
@dataclass(frozen=True)
class Broadcast(_EveryPayload):
    """Broadcasts every rank's payload in turn; the results are the same as with allgather.

    It starts n collectives instead of one, with n times the latency, for engines whose all-gather is poor. Payloads whose size varies
    between ranks need one small exchange of sizes first. Sent per rank: (n-1) m bytes on average.
    """

    by_broadcast = True
