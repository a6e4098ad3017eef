"""Tests the server where ranks of LocalSGD meet, over real sockets, with a thread per rank."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import grace_ext.local.server as meeting_module
from grace_ext.errors import RankLeftError
from grace_ext.local.connection import HELLO, Connection
from grace_ext.local.server import Server, address


def lines(size, timeout=20.0, max_ahead=1000):
    meeting = Server(size, timeout, max_ahead)
    where = address(meeting)
    return [Connection(rank, where, timeout) for rank in range(size)]


def at_once(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(30) for future in [pool.submit(call) for call in calls]]


def outcome(call):
    def run():
        try:
            return call()
        except RankLeftError as error:
            return error

    return run


def test_nobody_goes_on_before_all_are_here():
    a, b, c = lines(3)
    passed = []
    threads = [threading.Thread(target=lambda line=line: (line.meet(0, 8), passed.append(line.rank))) for line in (a, b)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not passed
    c.meet(0, 8)
    for thread in threads:
        thread.join(10)
    assert sorted(passed) == [0, 1]


def test_steps_that_differ_are_told_on_every_rank():
    errors = at_once(*(outcome(lambda line=line: line.meet(0, 8 + line.rank // 2)) for line in lines(3)))
    assert all("[8, 8, 9] by rank" in str(error) for error in errors)


def test_what_is_exchanged_must_be_the_same():
    """If one rank ends with sync() and another makes a step, both get an error, because their collectives would not match."""
    errors = at_once(*(outcome(lambda line=line: line.meet(0, 8, ("models", "gradients")[line.rank])) for line in lines(2)))
    assert all("at synchronization 0 (step 8) some ranks exchange gradients and others models" in str(error) for error in errors)


def test_one_that_is_slow_but_goes_on_is_waited_for():
    """The timeout limits silence only: a rank that reports more often is waited for three times as long."""
    a, b = lines(2, timeout=1.0)
    done = []
    waiting = threading.Thread(target=lambda: done.append(a.post(0, 9, b"a", gather=True)))
    waiting.start()
    for number in range(6):
        time.sleep(0.5)
        b.post(number, number, b"b")
    b.post(6, 6, b"b", gather=True)
    waiting.join(10)
    assert [entry.data for entry in done[0]] == [b"a", *[b"b"] * 7]


def test_a_rank_that_left_is_told_at_once():
    a, b, c = lines(3)
    at_once(*(lambda line=line: line.meet(0, 5) for line in (a, b, c)))
    b._socket.close()
    begun = time.monotonic()
    errors = at_once(*(outcome(lambda line=line: line.meet(1, 10)) for line in (a, c)))
    assert time.monotonic() - begun < 5
    assert all("rank 1 left (last heard of at step 5)" in str(error) and error.ranks == (1,) for error in errors)


def test_a_rank_that_does_not_come_is_told_after_the_timeout():
    a, *_ = lines(3, timeout=0.5)
    begun = time.monotonic()
    with pytest.raises(RankLeftError, match=r"waited 0.5 s .* rank 1 \(last heard of at step 0\), rank 2"):
        a.meet(0, 4)
    assert 0.4 < time.monotonic() - begun < 5


def test_the_log_has_one_order_and_every_message_once():
    ranks = lines(4)

    def post(line):
        got = []
        for number in range(25):
            got += line.post(number, number, b"%d-%d" % (line.rank, number))
        return got + line.post(25, 25, b"", gather=True)

    logs = at_once(*(lambda line=line: post(line) for line in ranks))
    assert all(log == logs[0] for log in logs)
    assert sorted((e.rank, e.number, e.data) for e in logs[0]) == sorted(
        (rank, number, b"%d-%d" % (rank, number) if number < 25 else b"") for rank in range(4) for number in range(26)
    )


def test_what_is_posted_after_a_gathering_is_not_part_of_it(monkeypatch):
    """Even if rank 1 gets its answer late, it does not contain what rank 2 posted after its own answer."""
    real = Server._gather

    def late(self, rank):
        real(self, rank)
        if rank == 1:
            assert self._changed.wait_for(lambda: any(entry.data == b"later" for entry in self._log), 10)

    monkeypatch.setattr(Server, "_gather", late)
    a, b, c = lines(3)
    first, second, third = at_once(
        lambda: a.post(0, 4, b"a", gather=True),
        lambda: b.post(0, 4, b"b", gather=True),
        lambda: c.post(0, 4, b"c", gather=True) + c.post(1, 5, b"later"),
    )
    assert sorted(entry.data for entry in second) == [b"a", b"b", b"c"]
    assert first == second == third[:3] and third[3].data == b"later"
    assert [entry.data for entry in b.post(1, 5, b"mine")] == [b"later", b"mine"]


def test_one_that_is_too_far_ahead_waits_and_the_slowest_never_does():
    fast, slow = lines(2, max_ahead=3)
    fast.post(0, 3, b"x")
    went_on = threading.Event()
    thread = threading.Thread(target=lambda: (fast.post(1, 6, b"y"), went_on.set()))
    thread.start()
    assert not went_on.wait(0.3)
    assert [e.data for e in slow.post(0, 2, b"z")] == [b"x", b"y", b"z"]
    assert not went_on.wait(0.3)
    slow.post(1, 3, b"w")
    assert went_on.wait(10)
    thread.join()
    # A rank that gathers makes no more steps, so no rank waits for it.
    ended = threading.Thread(target=lambda: slow.post(2, 3, b"", gather=True))
    ended.start()
    time.sleep(0.2)
    fast.post(2, 60, b"v")
    fast.post(3, 60, b"", gather=True)
    ended.join(10)


def test_an_asynchronous_rank_that_left_is_told_without_waiting():
    a, b = lines(2)
    b.post(0, 4, b"x")
    b._socket.close()
    time.sleep(0.2)
    with pytest.raises(RankLeftError, match="rank 1 left"):
        a.post(0, 2, b"y")


def test_one_may_leave_after_a_gathering():
    a, b = lines(2, timeout=2.0, max_ahead=3)
    at_once(lambda: a.post(0, 4, b"", gather=True), lambda: b.post(0, 4, b"", gather=True))
    b._socket.close()
    time.sleep(0.2)
    a.post(1, 8, b"y")  # a rank that has gathered does not limit how far others are ahead
    with pytest.raises(RankLeftError, match="rank 1 left"):
        a.post(2, 8, b"", gather=True)


def test_rank_0_gets_the_gathering_last(monkeypatch):
    """Rank 0 may end its process, and the server in it, as soon as it has the result."""
    real, times = meeting_module.send_one, []

    def slowly(line, data):
        times.append(time.monotonic())
        time.sleep(0.2)
        real(line, data)

    monkeypatch.setattr(meeting_module, "send_one", slowly)
    a, b = lines(2)
    at_once(lambda: a.post(0, 1, b"", gather=True), lambda: b.post(0, 1, b"", gather=True))
    first, second = sorted(times)
    assert second - first >= 0.2


def test_rank_0_leaving_is_told():
    meeting = Server(2, 20.0, 1000)
    where = address(meeting)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        line = Connection(1, {**where, "hosts": ["127.0.0.1"], "port": elsewhere.getsockname()[1]}, 20.0)
        accepted, _ = elsewhere.accept()
        accepted.close()
        with pytest.raises(RankLeftError, match="rank 0, where ranks meet, has left"):
            line.meet(0, 0)
    Connection(0, where, 20.0), Connection(1, where, 20.0)


def test_strangers_are_sent_away():
    meeting = Server(2, 20.0, 1000)
    where = address(meeting)
    with socket.create_connection(("127.0.0.1", where["port"]), timeout=10) as stranger:
        stranger.sendall(HELLO.pack(b"x" * 32, 1))
        assert stranger.recv(1) == b""
    a, b = (Connection(rank, where, 20.0) for rank in range(2))
    at_once(lambda: a.meet(0, 1), lambda: b.meet(0, 1))


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RankLeftError, match=f"cannot be reached at 127.0.0.1:{port}"):
        Connection(1, {"hosts": ["127.0.0.1"], "port": port, "token": "00" * 32}, 1.0)
