"""Asynchronous local-update training: makes a rank's messages, and applies the messages of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..compressors.base import sent_by
from ..driver import layout
from ..driver.driver import Driver
from ..errors import NOT_FLAGGED, PayloadError
from ..exchange.effects import Collective
from ..exchange.message import open_message, split_messages
from ..exchange.perform import perform
from ..exchange.transport import Transport
from ..parts.ops import Ops
from ..parts.payload import unpack
from ..parts.tensor import StepInfo
from .connection import Entry
from .model import LocalModel
from .settings import with_allgather


class _Outbox(Transport):
    """A transport of this rank alone, which keeps the bytes that it is given to send."""

    size, gathers_uneven = 1, True

    def __init__(self, ops: Ops, rank: int):
        self.ops, self.rank = ops, rank
        self.sent: list[bytes] = []

    def start(self, collective: Collective, name: str) -> Any:
        self.sent.append(self.ops.host(collective.array).tobytes())
        return collective.array

    def wait(self, handle: Any) -> Any:
        return [handle]


class Messages:
    """Runs asynchronous Qsparse-local-SGD (Basu et al. 2019, algorithm 2) on one of `size` ranks.

        p_i = m_i + x_i - y_i;   c_i = C(p_i);   m_i <- p_i - c_i                      `encode` makes the message
        x_i <- x_i - c_j / R for every message c_j since the last time;   y_i <- x_i   `apply`, in the order of the server's log
    R is the number of ranks, not of messages. A rank whose drift is not finite sends an empty message and goes back to the master copy.
    With a policy, a message is decoded by what the policy says for its sender's number of the message.
    The driver is the usual one, in a world of one rank: its memory sees this rank's own messages only.
    """

    def __init__(self, model: LocalModel, rank: int, size: int):
        self.model, self.ops, self.size = model, model.ops, size
        self._outbox = _Outbox(model.ops, rank)
        self.driver = Driver(with_allgather(model.settings.grace), model.ops, self._outbox)
        self.driver.skip_agreement()

    def encode(self, values: Mapping[str, Any]) -> bytes:
        """Returns the message of this rank's drift, empty if the drift is not finite. The memory counts it as sent."""
        self._outbox.sent = []
        drift = self.model.outgoing(values)
        perform(self.driver.exchange(drift), self._outbox, {})
        return b"".join(self._outbox.sent) if self.driver.committed else b""

    def apply(self, entries: Iterable[Entry]) -> dict[str, Any]:
        """Applies the entries of the log; returns the new model in the user's tensors. Raises PayloadError for a damaged message."""
        for entry in entries:
            if not 0 <= entry.rank < self.size:
                raise PayloadError(f"an entry of the log is of rank {entry.rank}, but there are {self.size} ranks", 0)
            if entry.data:
                for name, change in self._decoded(entry).items():
                    self.model.master[name] = self.model.master[name] - change / self.size
        self.model.last = self.model.step
        return self.model.values()

    def _decoded(self, entry: Entry) -> dict[str, Any]:
        """Decodes a whole message, by name, before anything of it is applied. Raises PayloadError, with the sender, if it is damaged."""
        try:
            return self._opened(entry)
        except PayloadError as error:
            raise error.at(entry.rank, error.parameter) from None

    def _opened(self, entry: Entry) -> dict[str, Any]:
        data = self.ops.upload(np.frombuffer(entry.data, np.uint8).copy())
        info = StepInfo(entry.number, entry.rank, 1, 1, self.driver.grace.seed)
        changes = {}
        buckets = [bucket for bucket in self.driver.buckets if any(spec.size for spec in bucket.specs)]
        for bucket, message in zip(buckets, split_messages(self.ops, data, len(buckets)), strict=True):
            parts = {spec.name: self.driver.grace.parts_for(spec, entry.number) for spec in bucket.specs}
            digest = layout.digest(self.driver.grace, bucket.specs, parts) if self.driver.grace.route.changes else bucket.digest
            body, finite = open_message(self.ops, message, digest=digest, step=entry.number, rank=entry.rank)
            if not finite:
                raise PayloadError("is of a drift that was not finite, which must not be sent", entry.rank)
            specs = [spec for spec in bucket.specs if spec.size]
            sent = [parts[spec.name][0] for spec in specs]
            fields = [(spec.name, compressor.fields(spec)) for spec, compressor in zip(specs, sent, strict=True)]
            for spec, compressor, payload in zip(specs, sent, unpack(self.ops, body, fields, entry.rank), strict=True):
                with sent_by(entry.rank, spec.name):
                    changes[spec.name] = compressor.decompress(self.ops, payload, spec, info)
                    if not self.ops.all_finite(changes[spec.name]):
                        raise PayloadError(NOT_FLAGGED)
        return changes
