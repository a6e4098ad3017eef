"""Fuzzing targets for everything that a rank decodes in an exchange: any composition, fed with damaged messages of its peer.

The exchange of one bucket runs as in the driver, on rank 0 of two. All replies of its collectives were recorded in a valid exchange of both
ranks; one message of rank 1, or one sum, is replaced.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import grace_ext
from grace_ext.driver.choices import Choices
from grace_ext.driver.driver import Driver
from grace_ext.errors import PayloadError
from grace_ext.exchange import fusing
from grace_ext.exchange.bucket import exchange_bucket
from grace_ext.exchange.effects import Start
from grace_ext.exchange.lockstep import LockstepTransport, execute
from grace_ext.exchange.message import HEADER
from grace_ext.exchange.tensor import Job, initial_state
from grace_ext.parts.tensor import StepInfo, TensorSpec

from .mutate import mutated

SMALL = {"first": (600,), "second": (24, 18)}
#: Large enough for kernels to work in pieces.
LARGE = {"large": (70_001,)}
DIGEST, STEP = 0x1234_5678_9ABC_DEF0, 3
#: Reasons of a PayloadError about the whole message, which names no parameter.
OF_THE_MESSAGE = re.compile(r"header|does not start|payload version|another spec|is of step|unknown flags|truncated|belong to no tensor")


@dataclass(frozen=True)
class Slot:
    """A reply that can be replaced, a gathered message or a sum: its round, its collective, and its valid bytes."""

    turn: int
    place: int
    gathered: bool
    honest: bytes
    edges: tuple[int, ...]


class ExchangeTarget:
    """Fuzzes one composition on one tensor library."""

    def __init__(self, ops: Any, text: str, shapes: dict[str, tuple[int, ...]] = SMALL):
        self.name, self.ops, self.size = text, ops, 2
        grace = grace_ext.grace(text)
        self.specs = [TensorSpec(name, shape) for name, shape in shapes.items()]
        choices = Choices(grace, self.specs)
        choices.choose(STEP, {})
        elements = sum(spec.size for spec in self.specs)
        self._infos = [StepInfo(STEP, rank, self.size, self.size, 0, 0.1, elements=elements) for rank in range(self.size)]
        self._jobs = [self._made(choices, info) for info in self._infos]
        self.slots: list[Slot] = []
        self._replies = self._honest()

    def _made(self, choices: Choices, info: StepInfo) -> list[Job]:
        rng, made = np.random.default_rng(info.rank), []
        for spec in self.specs:
            compressor, memory, communicator = choices.parts[spec.name]
            inner = communicator.inner(compressor)
            grad = self.ops.upload(rng.standard_normal(spec.size).astype(np.float32))
            state = initial_state(self.ops, spec, (compressor, memory, inner), info)
            made.append(Job(spec, compressor, memory, inner, grad, state))
        return made

    def _run(self, rank: int) -> Any:
        return exchange_bucket(self.ops, self._jobs[rank], self._infos[rank], DIGEST, _carry)

    def _honest(self) -> list[list[Any]]:
        """Runs a valid exchange. Returns rank 0's replies by round, and fills `slots`."""
        layouts: list[Any] = []
        plain = fusing.unpack

        def unpack(ops, body, tensors, rank):
            tensors = list(tensors)
            layouts.append((rank, [field for _, fields in tensors for field in fields]))
            return plain(ops, body, tensors, rank)

        replies, ranks, asked = [], [self._run(0), self._run(1)], []
        with mock.patch.object(fusing, "unpack", unpack):
            answers: list[Any] = [None, None]
            while True:
                found = [_next(rank, answer) for rank, answer in zip(ranks, answers, strict=True)]
                if found[0] is None:
                    break
                asked.append(found[0])
                answers = [list(x) for x in zip(*(execute(pair, self.ops) for pair in zip(*found, strict=True)), strict=True)]
                replies.append(answers[0])
        fields = iter([its for rank, its in layouts[: len(layouts) // 2] if rank == 1] + [[]] * 99)
        for turn, collectives in enumerate(asked):
            for place, collective in enumerate(collectives):
                reply = replies[turn][place]
                gathered = isinstance(reply, list)
                data = np.asarray(self.ops.host(reply[1] if gathered else reply)).tobytes()
                edges = _edges(data, next(fields)) if gathered else (0, len(data) - 4, len(data))
                self.slots.append(Slot(turn, place, gathered, data, edges))
                del collective
        return replies

    def inputs(self, rng: random.Random) -> Iterator[tuple[int, bytes]]:
        """Yields damaged messages without end, as (slot, bytes)."""
        while True:
            number = rng.randrange(len(self.slots))
            yield number, mutated(self.slots[number].honest, self.slots[number].edges, rng)

    def feed(self, number: int, data: bytes) -> str:
        """Returns 'refused' or 'accepted'. Raises if an error is not a PayloadError that names rank and parameter, or a result is wrong."""
        slot = self.slots[number]
        running, result = self._run(0), None
        try:
            running.send(None)
            for turn, replies in enumerate(self._replies):
                running.send(self._replaced(slot, replies, data) if turn == slot.turn else list(replies))
        except StopIteration as stop:
            result = stop.value
        except PayloadError as error:
            assert error.rank == (1 if slot.gathered else None), error  # a sum has no rank
            assert error.parameter in [spec.name for spec in self.specs] or OF_THE_MESSAGE.search(error.reason), error
            return "refused"
        assert result is not None, "the exchange asks for more than an honest one"
        self._check(slot, data, *result)
        return "accepted"

    def _replaced(self, slot: Slot, replies: list[Any], data: bytes) -> list[Any]:
        replies = list(replies)
        if slot.gathered:
            replies[slot.place] = [replies[slot.place][0], self.ops.upload(np.frombuffer(data, np.uint8).copy())]
        else:
            before = np.asarray(self.ops.host(replies[slot.place]))
            whole = (data + slot.honest[len(data) :])[: len(slot.honest)]  # an engine's sum always has the requested length
            replies[slot.place] = self.ops.upload(np.frombuffer(whole, before.dtype).copy())
        return replies

    def _check(self, slot: Slot, data: bytes, outcomes: list[Any], finite: bool) -> None:
        for job, (output, state, _) in zip(self._jobs[0], outcomes, strict=True):
            host = np.asarray(self.ops.host(output))
            assert host.shape == (job.spec.size,) and host.dtype == np.float32, (host.shape, host.dtype)
            lengths = {key: len(array) for key, array in state.items()}
            assert lengths == {key: len(array) for key, array in job.state.items()}, lengths
            if finite and slot.gathered:
                # An Inf is allowed, because a sum of finite numbers may overflow, on all ranks alike; a NaN is not.
                assert not np.isnan(host).any(), "NaN, and not flagged"


class StepTarget(ExchangeTarget):
    """Fuzzes a whole step of rank 0's driver, out of which an error has to come. On a device it may come later than out of the exchange of
    its bucket, because the host does not wait for checks there."""

    def _run(self, rank: int) -> Any:
        """Yields the collectives of each round, as `exchange_bucket` does. Returns the results and the driver."""
        driver = Driver(grace_ext.grace(self.name), self.ops, LockstepTransport(rank, self.size, self.ops, 1), read_lr=lambda: 0.1)
        driver.register(self.specs)
        driver.step, driver.agreed = STEP, True
        gradients = {job.spec.name: self.ops.emit(self.ops.copy(job.grad), job.spec) for job in self._jobs[rank]}
        effects, answer = driver.exchange(gradients), None
        started: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        while True:
            try:
                effect = effects.send(answer)
            except StopIteration as stop:
                return stop.value, driver
            answer = None
            if isinstance(effect, Start):
                started[effect.name] = effect.collective
            elif effect.name not in answers:
                answers = dict(zip(started, (yield list(started.values())), strict=True))
                started = {}
            if not isinstance(effect, Start):
                answer = answers.pop(effect.name)

    def _check(self, slot: Slot, data: bytes, results: dict[str, Any], driver: Driver) -> None:
        for spec in self.specs:
            shape, dtype = self.ops.describe(results[spec.name])
            assert (shape, dtype) == (spec.shape, spec.dtype), (shape, dtype)
            host = np.asarray(self.ops.host(self.ops.ingest(results[spec.name])))
            if driver.committed and slot.gathered:
                assert not np.isnan(host).any(), "NaN, and not flagged"
        for job in self._jobs[0] if driver.committed else ():
            lengths = {key: len(array) for key, array in driver.state[job.spec.name].items()}
            assert lengths == {key: len(array) for key, array in job.state.items()}, lengths


def _carry(collective: Any) -> Any:
    return (yield collective)


def _next(running: Any, answer: Any) -> Any:
    try:
        return running.send(answer)
    except StopIteration:
        return None


def _edges(data: bytes, fields: list[Any]) -> tuple[int, ...]:
    """Returns where the fields of a message begin and end, counts and header fields included."""
    at, found = HEADER.size, [0, 2, 3, 4, 8, 16, HEADER.size]
    for field in fields:
        size = field.max_bytes
        if field.variable:
            found.append(at + 4)
            size = 4 + int.from_bytes(data[at : at + 4], "little") * (field.max_bytes - 4) // max(1, field.count)
        at += size
        found += [at, at - 4]
    return tuple(found)
