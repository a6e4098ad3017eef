from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.requests import Gather
from . import register
from .base import Communicator, exchanged


class _EveryPayload(Communicator):
    """Shared by allgather and broadcast: every rank gets every payload, decodes all, and sums in rank order."""

    by_broadcast = False

    carries_payloads: ClassVar[bool] = True

    def exchange(self, ops, compressor, x, spec, info, state):
        payload, state = compressor.compress(ops, x, spec, info, state)
        return (yield from self.send(ops, compressor, payload, spec, info, state))

    def send(self, ops, compressor, payload, spec, info, state, out=None):
        payloads = yield Gather(compressor.fields(spec), payload, by_broadcast=self.by_broadcast)
        return exchanged(ops, compressor, payload, compressor.combine(ops, payloads, spec, info, out), spec, info, state)

    def collectives(self, n, payload, dense):
        return [("broadcast" if self.by_broadcast else "allgather", payload)]


@register("allgather")
@dataclass(frozen=True)
class Allgather(_EveryPayload):
    """Gathers every rank's payload on every rank; all decode, and sum in rank order, so that all have the same bits.

    For any compressor without rounds of its own. Sent per rank: (n-1) m bytes for payloads of m bytes. It beats a dense all-reduce of
    S bytes where m / S < 2 / n. Decoding costs n payloads a step.
    """


@register("broadcast")
@dataclass(frozen=True)
class Broadcast(_EveryPayload):
    """Every rank broadcasts its payload in turn; otherwise as allgather, with the same results.

    n collectives instead of one: n times the latency, for engines whose all-gather is poor. Payloads whose size varies from rank to rank
    need one small exchange of sizes first. Sent per rank: (n-1) m bytes on average.
    """

    by_broadcast = True
