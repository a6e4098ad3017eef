"""The server where ranks meet: a TCP server in a thread of rank 0, by which ranks wait for each other outside of the engine's collectives.

No engine tells a rank that waits in a collective that another rank has left, and only MPI lets a rank send to another at any time. So the
ranks meet here before each exchange, with a time limit; if one has left or is at another step, the others get an error that says so. For
asynchronous ranks the server keeps a log of messages, from which each rank gets those that it has not had yet. All ranks apply the same
messages in the same order, so ranks that are equally far in the log agree bit for bit, and no message is applied twice.
The server knows nothing of models or compression. connection.py describes the format of what travels.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import RankLeftError
from .connection import ENTRY, GATHER, HELLO, MEET, POST, REQUEST, SECONDS, WAIT, Entry, receive, receive_one, send_one


class Server:
    """Listens in a thread, and answers the requests of `size` ranks. `timeout`: the most seconds that a request waits if nothing is heard
    of the ranks that it waits for; `max_ahead`: how many steps a rank may be ahead of the slowest."""

    def __init__(self, size: int, timeout: float, max_ahead: int):
        self.size, self.timeout, self.max_ahead = size, timeout, max_ahead
        self.token = secrets.token_bytes(32)
        self._socket = socket.create_server(("", 0), backlog=size)
        self.port = self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._log: list[Entry] = []
        self._dropped = 0  # how many entries every rank has had; they are not kept
        self._had = [0] * size  # by rank, as all lists here: how many entries it has had
        self._step = [0] * size  # its step at its last request
        # Its last request: kind, number, step and, for MEET, what is exchanged.
        self._asked: list[tuple[int, int, int, bytes]] = [(-1, 0, 0, b"")] * size
        self._heard = [0] * size  # how many requests it has made
        self._connections: list[socket.socket | None] = [None] * size
        self._rounds = [0] * size  # how many gatherings it has come to
        self._told = [0] * size  # how many of these it has been answered
        self._gathered = 0  # the log's length, with dropped entries, when the last rank came to the last gathering
        self._left: dict[int, int] = {}  # the step at which a rank left
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        """Accepts one connection of each rank. Connections without the job's token are closed."""
        missing = set(range(self.size))
        self._socket.settimeout(self.timeout)
        try:
            while missing:
                connection, _ = self._socket.accept()
                connection.settimeout(SECONDS)
                try:
                    token, rank = HELLO.unpack(receive(connection, HELLO.size))
                except (OSError, EOFError):
                    token, rank = b"", -1
                if not hmac.compare_digest(token, self.token) or rank not in missing:
                    connection.close()
                    continue
                missing.discard(rank)
                connection.settimeout(None)
                threading.Thread(target=self._serve, args=(connection, rank), daemon=True).start()
        except OSError:  # a rank did not connect in time
            pass
        finally:
            self._socket.close()
        with self._changed:
            self._left.update(dict.fromkeys(missing, 0))
            self._changed.notify_all()

    def _serve(self, connection: socket.socket, rank: int) -> None:
        """Answers one rank's requests until it leaves."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[rank] = connection
            while True:
                request = receive_one(connection)
                try:
                    reply = b"\0" + self._answer(rank, request)
                except RankLeftError as error:
                    reply = b"\1" + json.dumps([error.ranks, str(error)]).encode()
                send_one(connection, reply)
                with self._changed:
                    self._told[rank] = self._rounds[rank]
                    self._changed.notify_all()
        except (OSError, EOFError):
            pass
        finally:
            connection.close()
            with self._changed:
                self._left[rank] = self._step[rank]
                self._changed.notify_all()

    def _answer(self, rank: int, request: bytes) -> bytes:
        """Waits as the request asks; returns the entries of the reply. Raises RankLeftError, and EOFError for what is not a request."""
        if len(request) < REQUEST.size or request[0] not in (MEET, POST, GATHER):
            raise EOFError("not a request")  # then the connection is closed: the sender is not treated as a rank any more
        kind, number, step = REQUEST.unpack_from(request)
        if number >= 1 << 32:
            raise EOFError("not a request")  # an entry of the log has 32 bits for the number
        with self._changed:
            self._asked[rank] = (kind, number, step, request[REQUEST.size :] if kind == MEET else b"")
            self._step[rank] = step
            self._heard[rank] += 1
            if kind == MEET:
                self._meet(rank, number, step)
                return b""
            self._log.append(Entry(rank, number, request[REQUEST.size :]))
            self._changed.notify_all()
            if kind == POST:
                self._not_too_far_ahead(rank, step)
                return self._news(rank, self._dropped + len(self._log))
            self._gather(rank)
            return self._news(rank, self._gathered)  # a rank that was answered earlier may have posted more since

    def _meet(self, rank: int, number: int, step: int) -> None:
        """Waits until every rank has come to meeting `number`. Raises RankLeftError, also if they exchange different things there."""
        self._changed.notify_all()
        here = lambda r: self._asked[r][0] == MEET and self._asked[r][1] >= number  # noqa: E731
        self._wait_for(rank, lambda: [r for r in range(self.size) if not here(r)], f"synchronization {number} (step {step})")
        steps = [asked[2] for asked in self._asked]
        others = [asked for asked in self._asked if asked[1] == number]
        if any(asked[2] == step and asked[3] != self._asked[rank][3] for asked in others):
            raise RankLeftError(
                f"rank {rank}: at synchronization {number} (step {step}) some ranks exchange gradients and others models, as in sync(): "
                "all ranks must have made the same number of steps when they call it; drop the last batches of ranks that have more"
            )
        if any(asked[2] != step for asked in others):
            raise RankLeftError(
                f"rank {rank}: the ranks are at different steps at synchronization {number}: {steps} by rank; give all ranks the same "
                "schedule and the same number of steps, or use asynchronous=True"
            )

    def _gather(self, rank: int) -> None:
        """Waits until every rank has come to this gathering, so that all get the whole log. Rank 0 is answered last, because its process,
        and the server with it, may then end."""
        self._rounds[rank] += 1
        now = self._rounds[rank]
        if min(self._rounds) == now:
            self._gathered = self._dropped + len(self._log)
        self._wait_for(rank, lambda: [r for r in range(self.size) if self._rounds[r] < now], "the end of asynchronous steps, sync()")
        if rank == 0:
            self._wait_for(rank, lambda: [r for r in range(1, self.size) if self._told[r] < now and r not in self._left], "")

    def _not_too_far_ahead(self, rank: int, step: int) -> None:
        """Waits while this rank is more than `max_ahead` steps ahead of the slowest rank that still makes steps."""

        def behind() -> list[int]:
            working = [r for r in range(self.size) if self._rounds[r] <= self._rounds[rank] and r not in self._left]
            return [r for r in working if step - self._step[r] > self.max_ahead]

        self._wait_for(rank, behind, f"step {step} (max_ahead={self.max_ahead})", all_must_be_there=True)

    def _wait_for(self, rank: int, missing: Callable[[], list[int]], what: str, all_must_be_there: bool = False) -> None:
        """Waits until `missing()` is empty. Raises RankLeftError if a missing rank has left, or at the time limit, which starts anew when a
        missing rank makes a request. all_must_be_there: whether any rank that left is an error, missing or not."""
        until, heard = time.monotonic() + self.timeout, list(self._heard)
        while True:
            away = [r for r in (range(self.size) if all_must_be_there else missing()) if r in self._left and not self._at_rest(r, rank)]
            if away:
                where = ", ".join(f"rank {r} left (last heard of at step {self._left[r]})" for r in away)
                raise RankLeftError(f"rank {rank} waits at {what}, and {where}: it ended or lost its connection; see its own output", away)
            late = missing()
            if not late:
                return
            if any(self._heard[r] != heard[r] for r in late):
                until, heard = time.monotonic() + self.timeout, list(self._heard)
                self._still_there(rank)
            if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                where = ", ".join(f"rank {r} (last heard of at step {self._step[r]})" for r in late)
                raise RankLeftError(f"rank {rank} waited {self.timeout:g} s at {what}, and these did not come: {where}", late)

    def _still_there(self, rank: int) -> None:
        """Tells a waiting rank to go on waiting."""
        connection = self._connections[rank]
        if connection is not None:
            with suppress(OSError):  # the rank has gone: its own thread finds out
                send_one(connection, WAIT)

    def _at_rest(self, other: int, rank: int) -> bool:
        """Whether rank `other`, which left, ended with a gathering, so that this rank, which posts, need not wait for it."""
        return self._asked[other][0] == GATHER and self._asked[rank][0] == POST

    def _news(self, rank: int, end: int) -> bytes:
        """Returns the entries that this rank has not had, up to the log's length `end`, as bytes."""
        news = self._log[self._had[rank] - self._dropped : end - self._dropped]
        self._had[rank] = end
        keep = min(self._had) - self._dropped
        del self._log[:keep]
        self._dropped += keep
        pieces = []
        for entry in news:
            data = b"" if entry.rank == rank else entry.data
            pieces += [ENTRY.pack(entry.rank, entry.number, len(data)), data]
        return b"".join(pieces)


def address(server: Server) -> dict[str, Any]:
    """Returns what the other ranks need in order to connect: {'hosts', 'port', 'token'}."""
    return {"hosts": _own_addresses(), "port": server.port, "token": server.token.hex()}


def _own_addresses() -> list[str]:
    """Returns this host's IPv4 addresses, loopback last."""
    found = []
    try:
        found += [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:  # the host's name does not resolve
        pass
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                except OSError:  # an interface without an address
                    continue
                found.append(socket.inet_ntoa(answer[20:24]))
    except ImportError:  # not Linux
        pass
    return sorted(dict.fromkeys([*map(str, found), "127.0.0.1"]), key=lambda host: host.startswith("127."))
