"""A rank's connection to the server where the ranks meet (server.py), and the format of what travels on it.

All numbers are little-endian:
    request = length u64 | kind u8, number u64, step u64 | message (for MEET: what is exchanged)
    reply   = length u64 | 0 and entries of the log; or 1 and an error's ranks and text as JSON; or 2, which means: go on waiting
    entry   = rank u32, number u32, length u64 | message (length 0: it is the message of the rank that asked, or it was empty)
A connection begins with the job's token, which the ranks share by the engine, and the rank.
"""

from __future__ import annotations

import json
import socket
import struct
import weakref
from typing import Any, NamedTuple

from ..errors import GraceError, PayloadError, RankLeftError

REQUEST, ENTRY, LENGTH, HELLO = struct.Struct("<BQQ"), struct.Struct("<IIQ"), struct.Struct("<Q"), struct.Struct("<32sI")
MEET, POST, GATHER = range(3)
WAIT = b"\2"
RECEIVED_AT_ONCE = 1 << 20
SECONDS = 10.0  # a rank waits so long for a connection, and so much longer than the time limit for the server's answer


class Entry(NamedTuple):
    """One message of the server's log: its sender, the number of the sender's exchange, and its bytes."""

    rank: int
    number: int
    data: bytes


class Connection:
    """Connects one rank to the server. `where`: the result of `address` on rank 0. Raises RankLeftError."""

    def __init__(self, rank: int, where: dict[str, Any], timeout: float):
        self.rank, self._timeout = rank, timeout
        self.sent = 0  # bytes sent so far
        self._socket = _connect(where["hosts"], where["port"])
        weakref.finalize(self, self._socket.close)  # the server treats a closed connection as a rank that left
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(timeout + SECONDS)
        self._socket.sendall(HELLO.pack(bytes.fromhex(where["token"]), rank))

    def meet(self, number: int, step: int, what: str = "models") -> None:
        """Waits until all ranks are ready to exchange `what`. Raises RankLeftError."""
        self._ask(MEET, number, step, what.encode())

    def post(self, number: int, step: int, message: bytes, gather: bool = False) -> list[Entry]:
        """Appends a message to the log; returns the entries up to it that this rank has not had, in order. With `gather` it first waits for
        all ranks, and returns their messages too. Raises RankLeftError, and PayloadError for an answer that cannot be read."""
        body = self._ask(GATHER if gather else POST, number, step, message)
        entries, at = [], 0
        while at < len(body):
            if at + ENTRY.size > len(body):
                raise PayloadError("ends inside the header of an entry of the log", 0)
            rank, its_number, length = ENTRY.unpack_from(body, at)
            at += ENTRY.size
            if length > len(body) - at:
                raise PayloadError(f"has an entry of {length} bytes in its log, but only {len(body) - at} bytes are left", 0)
            data = message if (rank, its_number) == (self.rank, number) else body[at : at + length]
            entries.append(Entry(rank, its_number, data))
            at += length
        return entries

    def _ask(self, kind: int, number: int, step: int, message: bytes = b"") -> bytes:
        request = REQUEST.pack(kind, number, step) + message
        self.sent += len(request)
        try:
            send_one(self._socket, request)
            while (reply := receive_one(self._socket)) == WAIT:
                pass
        except (OSError, EOFError) as error:
            raise RankLeftError(f"rank {self.rank}: rank 0, where ranks meet, has left or does not answer ({error})", (0,)) from None
        if reply[:1] == b"\0":
            return reply[1:]
        raise _error(reply)


def _error(reply: bytes) -> GraceError:
    """Returns the error that the server sent instead of an answer."""
    try:
        ranks, text = json.loads(reply[1:])
        if reply[:1] == b"\1" and isinstance(text, str) and all(isinstance(rank, int) for rank in ranks):
            return RankLeftError(text, ranks)
    except (ValueError, TypeError, RecursionError):
        pass
    return PayloadError("is neither an answer of the server nor an error", 0)


def _connect(hosts: list[str], port: int) -> socket.socket:
    tried = []
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=SECONDS)
        except OSError as error:
            tried.append(f"{host}:{port} ({error})")
    raise RankLeftError(
        f"rank 0, where ranks meet, cannot be reached at {', '.join(tried)}: let the firewall between the hosts pass TCP ports that the "
        "system chooses",
        (0,),
    )


def send_one(connection: socket.socket, data: bytes) -> None:
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive_one(connection: socket.socket) -> bytes:
    return receive(connection, LENGTH.unpack(receive(connection, LENGTH.size))[0])


def receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()  # grows with the bytes that arrive: the length is only what a peer claims
    while len(data) < count:
        piece = connection.recv(min(count - len(data), RECEIVED_AT_ONCE))
        if not piece:
            raise EOFError("the connection was closed")
        data += piece
    return bytes(data)
