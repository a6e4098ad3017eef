"""Where ranks wait for each other outside of the engine's collectives: a TCP server in a thread of rank 0.

No engine tells a rank that waits in a collective that another has left, and none but MPI lets one rank send to another when it pleases.
So before each exchange ranks meet here, with a time limit, and one that left, or that is at another step, is an error that says so;
and the messages of asynchronous ranks are put in order here: a log, from which each rank gets what it has not had yet. All ranks apply
the same messages in the same order, so they agree, bit for bit, wherever they are as far in the log, and no message is applied twice.
The server knows nothing of models or compression. What travels is described in connection.py.
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
    """The server. `timeout`: seconds that a request waits for other ranks of which nothing is heard meanwhile; `max_ahead`: steps that a
    rank may be ahead of the slowest."""

    def __init__(self, size: int, timeout: float, max_ahead: int):
        self.size, self.timeout, self.max_ahead = size, timeout, max_ahead
        self.token = secrets.token_bytes(32)
        self._socket = socket.create_server(("", 0), backlog=size)
        self.port = self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._log: list[Entry] = []
        self._dropped = 0  # entries that every rank has had, and that are not kept
        self._had = [0] * size  # by rank: how many entries it was sent
        self._step = [0] * size  # its step when it last asked
        self._asked: list[tuple[int, int, int, bytes]] = [(-1, 0, 0, b"")] * size  # kind, number, step and, of a meeting, what for
        self._heard = [0] * size  # how many requests it made
        self._lines: list[socket.socket | None] = [None] * size
        self._rounds = [0] * size  # how often it came to gather
        self._told = [0] * size  # gatherings it was answered
        self._gathered = 0  # how long the log, what was dropped included, was when the last rank came to the last gathering
        self._left: dict[int, int] = {}  # step at which it left
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        """Takes one connection of each rank. A stranger's is closed."""
        missing = set(range(self.size))
        self._socket.settimeout(self.timeout)
        try:
            while missing:
                line, _ = self._socket.accept()
                line.settimeout(SECONDS)
                try:
                    token, rank = HELLO.unpack(receive(line, HELLO.size))
                except (OSError, EOFError):
                    token, rank = b"", -1
                if not hmac.compare_digest(token, self.token) or rank not in missing:
                    line.close()
                    continue
                missing.discard(rank)
                line.settimeout(None)
                threading.Thread(target=self._serve, args=(line, rank), daemon=True).start()
        except OSError:  # nobody came in time
            pass
        finally:
            self._socket.close()
        with self._changed:
            self._left.update(dict.fromkeys(missing, 0))
            self._changed.notify_all()

    def _serve(self, line: socket.socket, rank: int) -> None:
        """Answers one rank's requests until it leaves."""
        try:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines[rank] = line
            while True:
                request = receive_one(line)
                try:
                    reply = b"\0" + self._answer(rank, request)
                except RankLeftError as error:
                    reply = b"\1" + json.dumps([error.ranks, str(error)]).encode()
                send_one(line, reply)
                with self._changed:
                    self._told[rank] = self._rounds[rank]
                    self._changed.notify_all()
        except (OSError, EOFError):
            pass
        finally:
            line.close()
            with self._changed:
                self._left[rank] = self._step[rank]
                self._changed.notify_all()

    def _answer(self, rank: int, request: bytes) -> bytes:
        if len(request) < REQUEST.size or request[0] not in (MEET, POST, GATHER):
            raise EOFError("no request")  # its line is closed: whoever sends this is no rank any more
        kind, number, step = REQUEST.unpack_from(request)
        if number >= 1 << 32:
            raise EOFError("no request")  # no entry of the log can hold such a number
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
            return self._news(rank, self._gathered)  # one that has gone on since may have sent more

    def _meet(self, rank: int, number: int, step: int) -> None:
        """Waits until every rank has come to meeting `number`, at the same step."""
        self._changed.notify_all()
        here = lambda r: self._asked[r][0] == MEET and self._asked[r][1] >= number  # noqa: E731
        self._wait_for(rank, lambda: [r for r in range(self.size) if not here(r)], f"synchronization {number} (step {step})")
        steps = [asked[2] for asked in self._asked]
        others = [asked for asked in self._asked if asked[1] == number]
        if any(asked[2] == step and asked[3] != self._asked[rank][3] for asked in others):
            raise RankLeftError(
                f"rank {rank}: at synchronization {number} (step {step}) some ranks exchange gradients and others models, as in sync(): "
                "all must have made as many steps when they call it; drop the last batches of those that have more"
            )
        if any(asked[2] != step for asked in others):
            raise RankLeftError(
                f"rank {rank}: synchronization {number} is at other steps on other ranks: {steps} by rank; give all ranks the same "
                "schedule and as many steps, or use asynchronous=True"
            )

    def _gather(self, rank: int) -> None:
        """Waits until every rank has come to this gathering; then all have the whole log. Rank 0, which may end the process when it has its
        answer, gets it last."""
        self._rounds[rank] += 1
        now = self._rounds[rank]
        if min(self._rounds) == now:
            self._gathered = self._dropped + len(self._log)
        self._wait_for(rank, lambda: [r for r in range(self.size) if self._rounds[r] < now], "the end of asynchronous steps, sync()")
        if rank == 0:
            self._wait_for(rank, lambda: [r for r in range(1, self.size) if self._told[r] < now and r not in self._left], "")

    def _not_too_far_ahead(self, rank: int, step: int) -> None:
        """Waits while the slowest of those that still make steps is further behind than allowed."""

        def behind() -> list[int]:
            working = [r for r in range(self.size) if self._rounds[r] <= self._rounds[rank] and r not in self._left]
            return [r for r in working if step - self._step[r] > self.max_ahead]

        self._wait_for(rank, behind, f"step {step} (max_ahead={self.max_ahead})", all_must_be_there=True)

    def _wait_for(self, rank: int, missing: Callable[[], list[int]], what: str, all_must_be_there: bool = False) -> None:
        """Waits until `missing()` is empty, within the time limit, which begins anew where one that is missing goes on and makes requests.
        Raises RankLeftError where one that is missing has left."""
        until, heard = time.monotonic() + self.timeout, list(self._heard)
        while True:
            away = [r for r in (range(self.size) if all_must_be_there else missing()) if r in self._left and not self._at_rest(r, rank)]
            if away:
                where = ", ".join(f"rank {r} left (last heard of at step {self._left[r]})" for r in away)
                raise RankLeftError(f"rank {rank} waits at {what}, and {where}: it ended, or lost its connection; see its own output", away)
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
        """Tells one that waits that it is not forgotten."""
        line = self._lines[rank]
        if line is not None:
            with suppress(OSError):  # it has gone: its own thread finds out
                send_one(line, WAIT)

    def _at_rest(self, other: int, rank: int) -> bool:
        """Whether one that left had gathered with all before, and owes this rank nothing but the next gathering."""
        return self._asked[other][0] == GATHER and self._asked[rank][0] == POST

    def _news(self, rank: int, end: int) -> bytes:
        """The entries that this rank has not had, up to the log's length `end`."""
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


def address(meeting: Server) -> dict[str, Any]:
    """How to reach it, for the other ranks."""
    return {"hosts": _own_addresses(), "port": meeting.port, "token": meeting.token.hex()}


def _own_addresses() -> list[str]:
    """This host's addresses, loopback last."""
    found = []
    try:
        found += [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:  # a name that does not resolve
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
    except ImportError:  # no Linux
        pass
    return sorted(dict.fromkeys([*map(str, found), "127.0.0.1"]), key=lambda host: host.startswith("127."))
