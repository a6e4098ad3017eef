"""Bugs that fuzzing, or writing its targets, found: each was a crash, a wrong name in an error, or memory allocated on a peer's word."""

from __future__ import annotations

import json
import socket
import struct
import tracemalloc

import numpy as np
import pytest

from grace_ext.arrays.compiled import host_ops
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.errors import PayloadError, RankLeftError
from grace_ext.exchange.message import HEADER, message
from grace_ext.local.connection import ENTRY, GATHER, LENGTH, REQUEST, Connection, Entry, receive_one

from .decoders import Asynchronous, Requests, Said

OPS = host_ops(NumpyOps)


def spoken(text: bytes) -> bytes:
    """Returns a message of the agreement with this text."""
    return message(OPS, [np.frombuffer(text, np.uint8).copy()], digest=0, step=0, finite=True).tobytes()


@pytest.mark.parametrize(
    "change", [None, b"", b"\xff\xfe", b"{", b"[]", b"7", b"[" * 100_000, {"number": "9"}, {"number": -1}, {"number": 10**400},
               {"parameters": 3}, {"parameters": [[]]}, {"parameters": [["w"], 0]}, {"node": 1}, {"spec": ...}, {"seed": ...},
               {"number": ...}, {"node": ...}, {"judges": ...}],
    ids=lambda change: str(change)[:24],
)  # fmt: skip
def test_what_a_rank_says_before_the_first_step(change):
    target = Said(OPS, "agreement", "topk(ratio=0.1) + residual", "agree", 0)
    said = json.loads(target.honest[0][HEADER.size :])
    if isinstance(change, dict):
        said = {key: value for key, value in {**said, **change}.items() if value is not ...}
        change = json.dumps(said).encode()
    if change is None:
        assert target._run(spoken(json.dumps(said).encode())).seen
        return
    with pytest.raises(PayloadError, match="a rank's description of itself") as caught:
        target._run(spoken(change))
    assert caught.value.rank == 1


def test_a_policys_report_of_another_length():
    target = Said(OPS, "report", "lgreco(topk(ratio=0.1) + residual, every=2, window=1)", "settle", 1)
    honest = target.honest[0]
    for body in (honest[HEADER.size : -4], honest[HEADER.size : -1], honest[HEADER.size :] + bytes(4), b""):
        data = message(OPS, [np.frombuffer(body, np.uint8).copy()], digest=0, step=1, finite=True).tobytes()
        with pytest.raises(PayloadError, match="report of") as caught:
            target._run(data)
        assert caught.value.rank == 1
    nonsense = np.frombuffer(honest[HEADER.size :], np.float32).copy()
    for value in (-1.0, np.nan, np.inf, 3e38):
        nonsense[:] = value
        target._run(message(OPS, [nonsense.view(np.uint8)], digest=0, step=1, finite=True).tobytes())


def test_an_asynchronous_message_is_applied_whole_or_not_at_all_and_names_its_sender():
    target = Asynchronous(OPS, "topk(ratio=0.1) + residual")
    before = {name: x.copy() for name, x in target.receiver.model.master.items()}
    damaged = bytearray(target.honest[0])
    damaged[-54:] = b"\xff" * 54  # the positions of the last tensor
    truncated = target.honest[0][:-3]
    for data in (bytes(damaged), truncated):
        with pytest.raises(PayloadError) as caught:
            target.receiver.apply([Entry(1, 0, data)])
        assert caught.value.rank == 1
        assert all(np.array_equal(before[name], x) for name, x in target.receiver.model.master.items())
    with pytest.raises(PayloadError, match="of rank 2, but there are 2"):
        target.receiver.apply([Entry(2, 0, target.honest[0])])


def test_an_asynchronous_message_of_nan_is_refused():
    target = Asynchronous(OPS, "topk(ratio=0.1) + residual")
    data = bytearray(target.honest[0])
    struct.pack_into("<f", data, HEADER.size, np.nan)
    with pytest.raises(PayloadError, match="not finite") as caught:
        target.receiver.apply([Entry(1, 0, bytes(data))])
    assert caught.value.rank == 1 and caught.value.parameter == "b"  # parameters travel last first


def answered(reply: bytes, before: bytes = b"") -> list[Entry]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Connection.__new__(Connection)
        line.rank, line._timeout, line.sent, line._socket = 0, 1.0, 0, ours
        theirs.sendall(before + LENGTH.pack(len(reply)) + reply)
        theirs.shutdown(socket.SHUT_WR)
        return line.post(3, 7, b"own")


@pytest.mark.parametrize("reply", [b"\0" + ENTRY.pack(1, 2, 100) + bytes(99), b"\0" + bytes(ENTRY.size - 1), b"", b"\3", b"\2\0", b"\1",
                                   b"\1{}", b"\1[1, 2]", b"\1[[1], 2]", b"\1[[\"a\"], \"b\"]", b"\1\xff"])  # fmt: skip
def test_an_answer_of_the_meeting_that_is_none(reply):
    with pytest.raises(PayloadError) as caught:
        answered(reply)
    assert caught.value.rank == 0


def test_answers_that_are():
    entry = b"\0" + ENTRY.pack(1, 2, 4) + b"data"
    assert answered(entry) == answered(entry, 2 * (LENGTH.pack(1) + b"\2")) == [Entry(1, 2, b"data")]  # told twice to wait
    with pytest.raises(RankLeftError, match="gone") as caught:
        answered(b'\1[[2], "gone"]')
    assert caught.value.ranks == (2,)


def test_memory_is_not_taken_on_a_peers_word():
    """If a peer announces a terabyte and sends a few bytes, at most 4 MiB are allocated."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(LENGTH.pack(1 << 40) + bytes(1000))
        theirs.shutdown(socket.SHUT_WR)
        tracemalloc.start()
        try:
            with pytest.raises(EOFError):
                receive_one(ours)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_long_message_arrives_whole():
    ours, theirs = socket.socketpair()
    data = np.random.default_rng(0).bytes(100_000)
    with ours, theirs:
        theirs.sendall(LENGTH.pack(len(data)) + data)
        assert receive_one(ours) == data


@pytest.mark.parametrize("request_", [b"", b"\0" * 5, REQUEST.pack(9, 1, 1), REQUEST.pack(255, 1, 1) + b"x", REQUEST.pack(1, 1 << 32, 1)])
def test_a_request_that_is_none_closes_the_line(request_):
    """An invalid request ends no thread, and the other ranks learn that this rank has left."""
    target = Requests()
    assert target.feed(0, LENGTH.pack(len(request_)) + request_) == "refused"
    good = REQUEST.pack(GATHER, 1, 1) + b"x"
    assert target.feed(0, LENGTH.pack(len(good)) + good) == "accepted"
