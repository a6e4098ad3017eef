"""Fuzzing targets for everything that a rank decodes outside of an exchange: positions, headers, the agreement before the first step,
policies' reports, and the messages, answers and requests of local training."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

import grace_ext
from grace_ext.compressors.forms.positions import CODINGS, decode_indices, encode_indices
from grace_ext.driver.driver import Driver
from grace_ext.errors import DisagreementError, PayloadError, RankLeftError
from grace_ext.exchange.message import HEADER, message, open_message, split_messages
from grace_ext.exchange.perform import perform
from grace_ext.exchange.transport import Transport
from grace_ext.local.connection import ENTRY, HELLO, LENGTH, REQUEST, Connection, Entry
from grace_ext.local.messages import Messages
from grace_ext.local.model import LocalModel
from grace_ext.local.server import Server
from grace_ext.local.settings import settings_of
from grace_ext.parts.field import Field
from grace_ext.parts.payload import unpack
from grace_ext.parts.tensor import TensorSpec

from .mutate import mutated


class Target:
    """A decoder to fuzz, with a name and valid inputs. `feed` returns the same as ExchangeTarget.feed."""

    name: str
    honest: list[bytes]

    def inputs(self, rng: random.Random) -> Iterator[tuple[int, bytes]]:
        while True:
            number = rng.randrange(len(self.honest))
            data = self.honest[number]
            yield number, mutated(data, (0, 4, 8, 16, 24, len(data) // 2, len(data)), rng)

    def feed(self, number: int, data: bytes) -> str:
        raise NotImplementedError


class Positions(Target):
    """Index codings: any bytes give k distinct ascending positions below d, or are refused."""

    CASES = ((1, 3), (3, 24), (40, 600), (200, 600), (599, 600), (7, 70_000), (700, 70_000), (65_537, 70_000))

    def __init__(self, ops: Any):
        self.name, self.ops, rng = "positions", ops, np.random.default_rng(0)
        self._cases = [(k, d, coding) for k, d in self.CASES for coding in CODINGS]
        drawn = [(np.sort(rng.permutation(d)[:k]).astype(np.int64), d, coding) for k, d, coding in self._cases]
        self.honest = [np.asarray(ops.host(encode_indices(ops, ops.upload(x), d, coding))).tobytes() for x, d, coding in drawn]

    def feed(self, number, data):
        k, d, coding = self._cases[number]
        try:
            found = decode_indices(self.ops, self.ops.upload(np.frombuffer(data, np.uint8).copy()), k, d, coding)
        except PayloadError:
            return "refused"
        found = np.asarray(self.ops.host(found))
        assert len(found) == k and (np.diff(found) > 0).all() and 0 <= found[0] and found[-1] < d
        return "accepted"


class Headers(Target):
    """Concatenated messages of two ranks: they are split by their headers, opened, and cut into fields."""

    FIELDS = (("a", (Field("x", "float32", 9), Field("y", "uint8", 40, variable=True))), ("b", (Field("z", "float16", 7, variable=True),)))

    def __init__(self, ops: Any):
        self.name, self.ops = "headers", ops
        body = np.frombuffer(bytes(36) + struct.pack("<I", 11) + bytes(11) + struct.pack("<I", 7) + bytes(14), np.uint8).copy()
        one = np.asarray(ops.host(message(ops, [ops.upload(body)], digest=1 << 40, step=5, finite=True))).tobytes()
        self.honest = [one + one]

    def feed(self, number, data):
        try:
            for rank, its in enumerate(split_messages(self.ops, self.ops.upload(np.frombuffer(data, np.uint8).copy()), 2)):
                body, _ = open_message(self.ops, its, digest=1 << 40, step=5, rank=rank)
                sizes = [len(array) for arrays in unpack(self.ops, body, self.FIELDS, rank) for array in arrays]
                assert sizes[0] == 36 and sizes[1] <= 40 and sizes[2] <= 14 and len(its) == HEADER.size + sum(sizes) + 8
        except PayloadError as error:
            assert error.rank in (0, 1)
            return "refused"
        return "accepted"


class Peer(Transport):
    """A transport of two ranks. In collectives with `word` in their names, the other rank sends `data`; otherwise the same as this rank."""

    gathers_uneven, rank, size = True, 0, 2

    def __init__(self, ops: Any, word: str):
        self.ops, self.word, self.data, self.seen = ops, word, None, b""

    def start(self, collective, name):
        return collective, self.word in name

    def wait(self, handle):
        collective, chosen = handle
        if collective.kind == "allreduce":
            return self.ops.copy(collective.array)
        if not chosen:
            return [collective.array, collective.array]
        self.seen = np.asarray(self.ops.host(collective.array)).tobytes()
        theirs = self.seen if self.data is None else self.data
        return [collective.array, self.ops.upload(np.frombuffer(theirs, np.uint8).copy())]


class Said(Target):
    """The agreement of the first step, or a policy's report at the end of a step."""

    def __init__(self, ops: Any, name: str, spec: str, word: str, step: int):
        self.name, self.ops, self._spec, self._word, self._step = name, ops, spec, word, step
        self.honest = []
        peer = self._run(None)
        self.honest = [peer.seen]
        if word == "agree":  # the second input is damaged inside the JSON, which stays valid JSON
            self.honest.append(peer.seen)

    def _run(self, data: bytes | None) -> Peer:
        peer = Peer(self.ops, self._word)
        peer.data = data
        driver = Driver(grace_ext.grace(self._spec), self.ops, peer)
        driver.register([TensorSpec("w", (24, 18)), TensorSpec("b", (300,))])
        driver.step, driver.agreed = self._step, self._word != "agree"
        rng, handles = np.random.default_rng(0), {}
        for name, spec in driver.specs.items():
            perform(driver.put(name, self.ops.emit(self.ops.upload(rng.standard_normal(spec.size).astype("f")), spec)), peer, handles)
        perform(driver.finish(), peer, handles)
        return peer

    def inputs(self, rng):
        for number, data in super().inputs(rng):
            yield number, self._restated(rng) if number else data

    def _restated(self, rng: random.Random) -> bytes:
        said = json.loads(self.honest[0][HEADER.size :])
        values = [None, [], {}, "", 0, -1, 1.5, True, 10**30, [[]], [[0]], "x" * 50, [[["w"]]]]
        for _ in range(rng.randint(1, 2)):
            key = rng.choice(list(said))
            if rng.random() < 0.3:
                del said[key]
            else:
                said[key] = rng.choice(values)
            if not said:
                break
        text = np.frombuffer(json.dumps(said).encode(), np.uint8).copy()
        return np.asarray(self.ops.host(message(self.ops, [self.ops.upload(text)], digest=0, step=0, finite=True))).tobytes()

    def feed(self, number, data):
        try:
            self._run(data)
        except PayloadError as error:
            assert error.rank in (0, 1)
            return "refused"
        except DisagreementError:
            return "refused"
        return "accepted"


class Asynchronous(Target):
    """Entries of the log of asynchronous local training, which a rank applies to its model."""

    def __init__(self, ops: Any, spec: str):
        self.name, self.ops = f"asynchronous {spec}", ops
        self.values = {"w": np.ones((24, 18), np.float32), "b": np.ones(300, np.float32)}
        sender = self._messages(1)
        moved = {name: x + np.random.default_rng(1).standard_normal(x.shape).astype("f") for name, x in self.values.items()}
        self.honest = [sender.encode(moved)]
        self.receiver = self._messages(0)

    def _messages(self, rank: int) -> Messages:
        settings = settings_of(self._spec_of(self.name), every=2, asynchronous=True)
        model = LocalModel(settings, self.ops)
        model.begin([TensorSpec(name, x.shape) for name, x in self.values.items()], self.values)
        made = Messages(model, rank, 2)
        made.driver.register(model.drift_specs)
        return made

    @staticmethod
    def _spec_of(name: str) -> str:
        return name.removeprefix("asynchronous ")

    def feed(self, number, data):
        before = {name: self.ops.copy(x) for name, x in self.receiver.model.master.items()}
        try:
            self.receiver.apply([Entry(1, 0, data)])
        except PayloadError as error:
            assert error.rank == 1
            after = self.receiver.model.master
            assert all(np.array_equal(*map(self._host, (before[name], after[name]))) for name in before), "a refused message was applied"
            return "refused"
        for name, x in self.receiver.model.master.items():
            assert self._host(x).size == self.values[name].size and not np.isnan(self._host(x)).any()
        self.receiver.model.master = before
        return "accepted"

    def _host(self, x: Any) -> np.ndarray:
        return np.asarray(self.ops.host(x))


class Answers(Target):
    """Answers that a rank receives from the server where ranks meet."""

    def __init__(self) -> None:
        self.name = "meeting, answers"
        entries = b"".join(ENTRY.pack(rank, rank, 5 + rank) + bytes(5 + rank) for rank in range(3))
        self.honest = [LENGTH.pack(1 + len(x)) + tag + x for tag, x in ((b"\0", entries), (b"\0", b""), (b"\1", b'[[1, 2], "left"]'))]
        self.honest.append(LENGTH.pack(1) + b"\2" + self.honest[0])

    def feed(self, number, data):
        ours, theirs = socket.socketpair()
        try:
            line = Connection.__new__(Connection)
            line.rank, line._timeout, line.sent, line._socket = 0, 1.0, 0, ours
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            entries = line.post(3, 7, b"own")
        except (RankLeftError, PayloadError):
            return "refused"
        finally:
            ours.close()
            theirs.close()
        assert sum(len(entry.data) for entry in entries) <= len(data) + 3
        return "accepted"


class Requests(Target):
    """Requests that the server receives from a rank: it answers, or closes the connection."""

    def __init__(self) -> None:
        self.name = "meeting, requests"
        requests = [REQUEST.pack(kind, 1, 1) + b"payload" * kind for kind in range(3)]
        self.honest = [LENGTH.pack(len(x)) + x for x in requests] + [b"".join(LENGTH.pack(len(x)) + x for x in requests)]

    def feed(self, number, data):
        meeting = Server.__new__(Server)
        _without_socket(meeting)
        with socket.create_server(("127.0.0.1", 0)) as server:
            theirs = socket.create_connection(server.getsockname())
            ours, _ = server.accept()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            meeting._serve(ours, 0)
            theirs.settimeout(5.0)
            answered = _rest(theirs)
        assert meeting._left, "the line was closed, and nobody was told"
        return "accepted" if answered else "refused"


def _without_socket(meeting: Server) -> None:
    """Initializes a server for one rank, without a socket and a thread that accepts others."""
    import threading

    meeting.size, meeting.timeout, meeting.max_ahead = 1, 0.01, 1
    meeting._changed, meeting._log, meeting._dropped = threading.Condition(), [], 0
    meeting._had, meeting._step, meeting._asked, meeting._rounds, meeting._told = [0], [0], [(-1, 0, 0, b"")], [0], [0]
    meeting._gathered, meeting._left, meeting._heard, meeting._connections = 0, {}, [0], [None]


def greeted(hello: bytes) -> bool:
    """Whether a server of one rank accepts a stranger with this greeting. Otherwise it must close the connection and continue to work."""
    meeting = Server(1, 5.0, 1)
    with socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
        with contextlib.suppress(OSError):  # the server may close the connection before it has read everything
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(5.0)
        refused = not _rest(stranger)
    with socket.create_connection(("127.0.0.1", meeting.port)) as rank:
        rank.sendall(HELLO.pack(meeting.token, 0) + LENGTH.pack(REQUEST.size) + REQUEST.pack(0, 1, 1))
        rank.settimeout(5.0)
        assert rank.recv(9) == LENGTH.pack(1) + b"\0"
    return not refused


def _rest(line: socket.socket) -> bytes:
    try:
        return line.recv(100)
    except ConnectionError:
        return b""


def of_whole_steps(ops: Any) -> list[Any]:
    """Returns the targets out of which an error has to come on devices, too, where the host waits for checks at the end of a step only."""
    said = [
        Said(ops, "agreement", "topk(ratio=0.1) + residual", "agree", 0),
        Said(ops, "agreement of a policy", "by_name({'w': 'topk + residual'}, default='none')", "agree", 0),
        Said(ops, "report of lgreco", "lgreco(topk(ratio=0.1) + residual, every=2, window=1)", "settle", 1),
    ]
    logs = [Asynchronous(ops, spec) for spec in ("topk(ratio=0.1) + residual", "threshold(threshold=0.5) + residual", "qsgd")]
    return [*said, *logs]


def others(ops: Any) -> list[Any]:
    """Returns all targets of this file, for the arrays of a library on the host."""
    return [Positions(ops), Headers(ops), *of_whole_steps(ops), Answers(), Requests()]
