"""The driver: one rank's pending gradients, their order, rounds, commit and rollback. Written once for every world.

It never touches a network. Its methods are generators of two effects, Start(name, collective) and Wait(name), and one more, Split, once,
where an exchange has two levels. `perform` executes them on a transport, and cluster.py for N ranks in one process.

Why it cannot deadlock, whatever order the gradients arrive in:
  1. Buckets are made from the parameter list alone, which all ranks share (checked in 5), and are started in one fixed order: bucket i
     never before bucket i - 1. A bucket whose turn it is starts inside `put`, so communication overlaps the backward pass.
  2. `put` only starts; nothing waits inside a hook. All waiting is in `finish`, which every rank calls once a step.
  3. `finish` first starts all buckets that remain (a parameter without a gradient takes part with zeros), so that when the first
     Wait happens, every rank has started, or will start without waiting for anyone, the first round of every bucket.
  4. Later rounds are started in the order (round, bucket), each after the wait for that bucket's round before it. So the sequence of
     starts is the same on all ranks: engines that match collectives by name and engines that match by order both pair them rightly.
  5. At the first step `put` starts nothing. `finish` first exchanges (spec, parameters, version) under a constant name, and raises on
     every rank alike if they differ; so ranks that disagree never start collectives that do not match.

Commit. A part returns new state; it is kept aside until every bucket is through, and committed only if every rank was finite in every
bucket. An exception anywhere leaves the state of the last committed step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .agreement import agree, compare, few
from .choices import Choices
from .compressors.forms.merged import SMALL
from .errors import GraceError, NamesError, PayloadError, TensorChangedError, UnsupportedDtypeError, UnsupportedError
from .exchange.bucket import exchange_bucket
from .exchange.effects import Collective, Effects, Split, Start, Wait
from .exchange.hierarchy import TwoLevel
from .exchange.message import message, open_message
from .exchange.perform import at_once
from .exchange.tensor import Job, Outcome, initial_state, replaced
from .parts.ops import Array, Ops
from .parts.state import as_state, is_own, own_state
from .parts.tensor import DTYPES, StepInfo, TensorSpec

if TYPE_CHECKING:
    from .composition.composition import Grace, Parts
    from .exchange.transport import Transport
    from .recorder import Recorder

LOG = logging.getLogger("grace_ext")
BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Consecutive parameters that travel in one message, and the exchange under way for them."""

    def __init__(self, specs: list[TensorSpec]):
        self.specs = sorted(specs, key=lambda spec: spec.size > SMALL)  # neighbours can be merged, see exchange.py
        self.names = frozenset(spec.name for spec in specs)
        self.digest, self.number = 0, 0
        self.running: Generator | None = None
        self.waiting: list[str] = []
        self.turn = 0
        self.missing = len(specs)  # gradients that are still to come in this step
        self.buffers: list[Array] = []  # of its collectives in this step
        self.outputs: dict[str, Any] = {}
        self.states: dict[str, dict[str, Array]] = {}
        self.finite = True  # on every rank


class Driver:
    """One rank of one exchange. `divisor` is the world size for a mean, 1 for a sum; `read_lr` gives the current learning rate; `in_place`:
    the results are written over the gradients, where they are what `ops.overwrite` can write to."""

    _next_number = 0  # free for the names of a driver's collectives, in this process

    def __init__(
        self,
        grace: Grace,
        ops: Ops,
        transport: Transport,
        *,
        divisor: int | None = None,
        read_lr: Callable[[], float | None] = lambda: None,
        bucket_bytes: int = BUCKET_BYTES,
        diverging: bool = False,
        in_place: bool = False,
    ):
        diverges = [memory.name for memory in grace.memories if memory.diverges]
        if diverges and not diverging:
            raise UnsupportedError(
                f"memory {diverges[0]!r} lets the ranks' models differ between resets; it works with a wrapper that averages models "
                "(LocalSGD), not behind an optimizer that expects the same gradient everywhere"
            )
        if grace.two_level and not transport.splits:
            raise UnsupportedError(
                f"{grace} needs groups of ranks for 'hierarchical', which are not available here; use what is between the nodes by itself"
            )
        self.grace, self.ops, self.transport = grace, ops, transport
        self._two_level: TwoLevel | None = None  # known once ranks have agreed
        self.divisor = transport.size if divisor is None else divisor
        self.read_lr, self.bucket_bytes = read_lr, bucket_bytes
        self._in_place = in_place
        self._ended = time.perf_counter()  # when the last step did
        self._compute = float("inf")  # seconds from there to the end of a backward pass: the fewest, as some have a pause in them
        self.prefix = ""  # of the names of collectives; agreed on at the first step
        self.specs: dict[str, TensorSpec] = {}
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[str, Bucket] = {}
        self._choices = Choices(grace)
        self._by_rate = [part for leaf in grace.leaves for part in (leaf.memory, leaf.communicator) if part.uses_lr]
        self.state: dict[str, dict[str, Array]] = {}
        self._foreign = False  # the state is of another rank, and lacks what was that rank's own
        self._saved_on = ""  # the node that the state was this rank's on, where it goes in two levels
        self.step = 0
        self.agreed = False
        #: Whether the last step's state was committed: every rank was finite in every bucket.
        self.committed = True
        self._before: dict[str, dict[str, Array]] | None = None  # the state before that, only where `roll_back` may be called
        #: Bytes this rank handed to collectives in the last finished step, headers and all rounds included.
        self.wire_bytes = 0
        #: Where metrics are on.
        self.recorder: Recorder | None = None
        self.abandon()

    @property
    def _whole_model(self) -> str:
        """Why the parameters must travel in one bucket, or ''."""
        parts = [part for leaf in self.grace.leaves for part in (leaf.compressor, leaf.memory) if part.whole_model]
        if not parts:
            return ""
        return (
            f"{parts[0]} looks at the gradients of the whole model at once, and here they are exchanged in several buckets: make one "
            "bucket (DDP: bucket_cap_mb larger than the model), use the wrapper's DistributedOptimizer, or a part that works tensor by "
            "tensor"
        )

    # --- what takes part ----------------------------------------------------------------------------------------------
    def register(self, specs: Iterable[TensorSpec]) -> None:
        """Fixes the parameters, in an order that is the same on all ranks, and packs them into buckets, last parameters first
        (their gradients come first in a backward pass)."""
        specs = list(specs)
        names = [spec.name for spec in specs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise NamesError(f"parameter names must be unique; given more than once: {', '.join(twice)}")
        for spec in specs:
            if spec.dtype not in DTYPES:
                raise UnsupportedDtypeError(
                    f"the gradient of {spec.name!r} is {spec.dtype}; only floating point gradients ({', '.join(DTYPES)}) can be compressed"
                )
        self.specs, self._choices = {spec.name: spec for spec in specs}, Choices(self.grace, specs)
        nbytes = {spec.name: spec.nbytes for spec in reversed(specs)}
        self.buckets = [Bucket([self.specs[name] for name in names]) for names in self.packed(nbytes)]
        self._plan()
        try:
            self._check_state(self.state, fill=self._foreign)  # loaded before the parameters were known
        except GraceError:
            self.specs, self.buckets = {}, []
            raise

    def packed(self, nbytes: Mapping[str, int]) -> list[list[str]]:
        """The names of these parameters, in this order, by what travels together: small enough that a bucket's network time is another's
        computing time."""
        limit = float("inf") if self._whole_model else self.bucket_bytes
        groups: list[list[str]] = []
        held = 0
        for name, size in nbytes.items():
            if not groups or held + size > limit:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += size
        return groups

    def _tell(self, sentences: list[str]) -> None:
        # Not by a warning: one rank alone must not raise where warnings are errors, because the others would wait for it.
        for sentence in sentences if self.transport.rank == 0 else ():
            LOG.warning(sentence)

    def regroup(self, groups: Iterable[Iterable[str]]) -> None:
        """Packs the registered parameters into these buckets instead, which all ranks must pass alike, for a framework that makes buckets
        of its own. State is kept by name, so nothing else changes. Buckets that have started in this step must stay as they are."""
        lists = [list(names) for names in groups]
        if self._whole_model and len(lists) > 1:
            raise UnsupportedError(self._whole_model)
        if sorted(itertools.chain.from_iterable(lists)) != sorted(self.specs):
            raise NamesError("the buckets must hold every registered parameter once")
        if any(bucket.names != set(names) for bucket, names in zip(self.buckets[: self._next], lists, strict=False)):
            raise GraceError("a bucket that has started cannot be regrouped")
        later = [[self.specs[name] for name in names] for names in lists[self._next :]]
        self.buckets = self.buckets[: self._next] + [Bucket(group) for group in later]
        self._plan()

    def _plan(self) -> None:
        """What follows from the buckets, and does not change from step to step."""
        self._bucket_of = {spec.name: bucket for bucket in self.buckets for spec in bucket.specs}
        for number, bucket in enumerate(self.buckets):
            bucket.number = number
        self._choose(anew=True)
        for bucket in self.buckets[self._next :]:
            bucket.missing = sum(spec.name not in self._arrived for spec in bucket.specs)

    def _choose(self, anew: bool = False) -> None:
        """What each tensor goes through at this step, and what says so in the headers of messages."""
        if self._choices.choose(self.step, self.state) or anew:
            for bucket in self.buckets:
                bucket.digest = self._digest(bucket.specs)

    def check(self, name: str, tensor: Any) -> None:
        """Raises if this tensor is not what was registered under its name."""
        spec = self.specs.get(name)
        if spec is None:
            raise NamesError(f"unknown parameter {name!r}; this exchange was set up for: {few(self.specs)}")
        shape, dtype = self.ops.describe(tensor)
        if (shape, dtype) != (spec.shape, spec.dtype):
            raise TensorChangedError(
                f"{name!r} was {spec.dtype}{list(spec.shape)} and is now {dtype}{list(shape)}; "
                "state is kept by name, so shapes and dtypes must stay (a new model needs a new optimizer)"
            )

    def check_rate(self, lr: float | None) -> None:
        """Raises LearningRateError if a part needs the learning rate and there is none."""
        for part in self._by_rate:
            part.rate(dataclasses.replace(self._step_info(), lr=lr))

    # --- one step -----------------------------------------------------------------------------------------------------
    @property
    def under_way(self) -> bool:
        """A step has begun, and has not ended."""
        return bool(self._arrived) or self._info is not None

    @property
    def parts(self) -> dict[str, Parts]:
        """What each tensor goes through at the step that is under way, or was the last."""
        return self._choices.parts

    def put(self, name: str, tensor: Any) -> Effects:
        """Takes one gradient and starts every bucket whose turn it is. Never waits. The tensor must not change until `finish`."""
        self.check(name, tensor)
        if name in self._arrived:
            raise GraceError(f"a second gradient for {name!r} came before the step was finished")
        self._arrived[name] = tensor
        self._bucket_of[name].missing -= 1
        try:
            if self.agreed:
                ready = self._start_ready()
                yield from self.recorder.effects(ready) if self.recorder else ready
        except BaseException:
            self.abandon()  # nothing can be known of what was started
            raise

    def finish(self) -> Effects:
        """Ends the step: returns {name: result} for every registered parameter, in the gradients' shapes and dtypes."""
        self._compute = min(self._compute, time.perf_counter() - self._ended)
        outputs = yield from self.recorder.effects(self._finish()) if self.recorder else self._finish()
        if self.recorder:
            self.recorder.finished()
        return outputs

    def _finish(self) -> Effects:
        try:
            self.check_rate(self.read_lr())
            if not self.agreed:
                yield from self.agree()
            yield from self._start_ready(all_of_them=True)
            while any(bucket.running for bucket in self.buckets):
                for bucket in self.buckets:
                    if bucket.running:
                        results = []
                        for name in bucket.waiting:
                            results.append((yield Wait(name, bucket.specs)))
                        yield from self._advance(bucket, results)
            if all(bucket.finite for bucket in self.buckets):
                yield from self._settle()
            return self._commit()
        finally:
            self.abandon()
            self._ended = time.perf_counter()

    def _start_ready(self, all_of_them: bool = False) -> Effects:
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if not all_of_them and bucket.missing:
                return
            self._next += 1
            if self._info is None:
                self._info = self._step_info()
                self._choose()
                if self.recorder:
                    self.recorder.begin(self._info)
            jobs = [self._job(spec) for spec in bucket.specs]
            how = self._two_level.exchange if self._two_level else partial(exchange_bucket, self.ops)
            exchange = how(jobs, self._info, bucket.digest, self.transport.carry)
            bucket.running = self.recorder.bucket(exchange) if self.recorder else exchange
            yield from self._advance(bucket, None)

    def _advance(self, bucket: Bucket, results: list[Any] | None) -> Effects:
        assert bucket.running is not None
        try:
            collectives = bucket.running.send(results)
        except StopIteration as stop:
            bucket.running = None
            if results:
                results.clear()  # views of the buffers, which are given back
            self._take(bucket, *stop.value)
            return
        bucket.turn += 1
        bucket.waiting = []
        for collective in collectives:
            # The turn makes names unique within a step; labels repeat from step to step, so engines that cache by name may.
            name = f"{self.prefix}/{bucket.number}/{bucket.turn}/{collective.label}"
            bucket.waiting.append(name)
            self._bytes += collective.nbytes
            bucket.buffers.append(collective.array)
            yield Start(name, collective, bucket.specs)

    def _take(self, bucket: Bucket, outcomes: list[Outcome], finite: bool) -> None:
        """What a bucket's exchange gave: tensors of the user's at once, the state for later. Empties the list."""
        bucket.finite = finite
        for spec in reversed(bucket.specs):
            output, state = outcomes.pop()
            if not finite and spec.size:
                output = self.ops.full_nan(spec.size)
            bucket.states[spec.name] = self._choices.observe(self.ops, spec, output, state, self._info) if finite else state
            gradient = self._arrived.get(spec.name) if self._in_place else None
            if gradient is not None and self.ops.overwrite(gradient, output, spec):
                bucket.outputs[spec.name] = gradient
            else:
                bucket.outputs[spec.name] = self.ops.emit(output, spec)
        del output
        self.ops.recycle(bucket.buffers)

    def _settle(self) -> Effects:
        """What policies learn of all ranks' gradients: gathers the reports that are due, before the step is committed."""
        for path, (policy, specs) in self._choices.due(self.step, self.state).items():
            states = {spec: own_state(path, self._bucket_of[spec.name].states[spec.name]) for spec in specs}
            found = yield from policy.survey(self.transport, specs, self._compute, f"{self.prefix}/survey/{path}")
            report = self.ops.upload(policy.report(self.ops, states, found).view(np.uint8))
            mine = message(self.ops, [report], digest=0, step=self.step, finite=True)
            wanted = Collective("allgather", mine, "settle", sizes=(len(mine),) * self.transport.size)
            received = yield from at_once(self.transport, wanted, f"{self.prefix}/settle/{path}")
            self._bytes += len(mine)
            bodies = [open_message(self.ops, data, digest=0, step=self.step, rank=rank)[0] for rank, data in enumerate(received)]
            for rank, body in enumerate(bodies):
                if len(body) != len(report):
                    raise PayloadError(f"is a policy's report of {len(body)} bytes, this rank's has {len(report)}", rank)
            reports = [np.frombuffer(self.ops.host(body).tobytes(), np.float32) for body in bodies]
            changes, said = policy.settle(self.ops, reports, states, found)
            self._tell(said)
            for spec, changed in zip(specs, changes, strict=True):
                self._bucket_of[spec.name].states[spec.name].update(as_state(path, changed))

    def _commit(self) -> dict[str, Any]:
        outputs = {name: output for bucket in self.buckets for name, output in bucket.outputs.items()}
        self.committed = all(bucket.finite for bucket in self.buckets)
        if self.committed:
            old, self.state = self.state, {name: state for bucket in self.buckets for name, state in bucket.states.items()}
            self._choices.committed()
            if self._before is None:
                self._recycle(old)
            else:
                self._before = old
        self.step += 1
        self.wire_bytes = self._bytes
        if self.recorder:
            self.recorder.ended(self.buckets)
        return {name: outputs[name] for name in self.specs}

    def _recycle(self, old: dict[str, dict[str, Array]]) -> None:
        """Gives back the arrays of a state that is over, where they are not in use any more."""
        for name, arrays in old.items():
            self.ops.recycle(replaced(arrays, self.state.get(name, {})))

    def roll_back(self) -> None:
        """Takes the last step's commit back, where there was one. Only after `join_agreement`."""
        if self.committed and self._before is not None:
            self.state, self.committed = self._before, False
            self._choices.forget()

    def abandon(self) -> None:
        """Forgets the step under way, where there is one. The state is that of the last commit."""
        self._arrived: dict[str, Any] = {}
        self._next = self._bytes = 0
        self._info: StepInfo | None = None
        for bucket in self.buckets:
            bucket.running, bucket.waiting, bucket.turn, bucket.missing = None, [], 0, len(bucket.specs)
            bucket.buffers, bucket.outputs, bucket.states, bucket.finite = [], {}, {}, True

    def _step_info(self) -> StepInfo:
        return StepInfo(self.step, self.transport.rank, self.transport.size, self.divisor, self.grace.seed, self.read_lr())

    def _job(self, spec: TensorSpec) -> Job:
        assert self._info is not None
        state = self._choices.fitting(self.ops, spec, self.state.get(spec.name, {}), self._info)
        tensor = self._arrived.get(spec.name)
        grad = self.ops.zeros(spec.size) if tensor is None else self.ops.ingest(tensor)
        out = grad if self._in_place and tensor is not None and spec.dtype == "float32" else None
        compressor, memory, communicator = self._choices.parts[spec.name]
        state = self._choices.measure(self.ops, spec, grad, state, self._info)
        watch = self.recorder.watches[spec.name] if self.recorder else None
        return Job(spec, compressor, memory, communicator.inner(compressor), grad, state, out, watch)

    # --- agreement ----------------------------------------------------------------------------------------------------
    def agree(self) -> Effects:
        """All ranks must compress alike: compares what each would do, and raises on every rank alike if they differ.

        Also finds a number for the names of this driver's collectives that no other driver of any rank has: two models may be under way
        at once, and ranks may have made different numbers of drivers before (for process sets)."""
        said = yield from agree(self.ops, self.transport, self._described())
        if self.grace.two_level:
            self._two_level = TwoLevel(self.transport.rank, [other["node"] for other in said], self.ops)
            self._check_nodes([(other["saved_on"], other["node"]) for other in said if other["saved_on"]])
            counts = [len(members) for members in self._two_level.members]
            if self.grace.diverges and len(set(counts)) > 1:
                raise UnsupportedError(
                    f"{self.grace} on nodes of {counts} ranks: in two levels a node counts once, and the mean of the models, which undoes "
                    "errors, counts ranks; use as many ranks on every node, or a flat communicator"
                )
            yield Split(self._two_level.groups)
        self._tell(self._choices.notices())
        number = max(other["number"] for other in said)
        Driver._next_number = number + 1
        self.prefix = f"grace/{number}"
        if self.recorder and all(other["judges"] for other in said):
            yield from self.recorder.advice.probe(self.transport)
        self.agreed = True

    def _check_nodes(self, moves: list[tuple[str, str]]) -> None:
        """All ranks of a node hold one memory, of the node's gradients; where they share nodes otherwise than when it was saved, there is
        no such memory. moves: by rank, the node then and now."""
        then, now = ({move[i] for move in moves} for i in (0, 1))
        if not len(set(moves)) == len(then) == len(now):
            raise GraceError(
                f"these states were saved by ranks that shared {len(then)} nodes otherwise than they share {len(now)} now, and each holds "
                "its node's memory: start the ranks as they were, or use grace_ext.save and grace_ext.load(..., resize='mean')"
            )

    def compare(self, digests: Mapping[str, str]) -> Effects:
        """Raises DisagreementError, on every rank alike, where ranks do not compress alike, are at different steps, or have different
        digests of parameters (agreement.digest_of, by name). Between steps only."""
        if self._arrived:
            raise GraceError("parameters are compared between steps: call it after the optimizer's step, before the next backward pass")
        yield from compare(self.ops, self.transport, self._described(), digests)

    def _described(self) -> dict[str, Any]:
        """What this rank says of itself."""
        self._choose()
        return {
            "spec": str(self.grace),
            "seed": self.grace.seed,
            "parameters": [[s.name, list(s.shape), s.dtype] for s in self.specs.values()],
            "op": self._op,
            "buckets": [[spec.name for spec in bucket.specs] for bucket in self.buckets],
            "digests": [bucket.digest for bucket in self.buckets] if self.grace.policy else [],
            "step": self.step,
            "number": Driver._next_number,
            "node": self.transport.node if self.grace.two_level else "",
            "saved_on": self._saved_on,
            "judges": bool(self.recorder and self.recorder.advice.judges_times),
        }

    def move(self, transport: Transport, divisor: int) -> None:
        """Goes on among other ranks, with an empty memory and a new agreement; parameters are to be registered again, as on a rank that has
        just joined. What was under way is forgotten: its engine has ended."""
        self.abandon()
        self.transport, self.divisor, self._two_level = transport, divisor, None
        self.agreed, self.prefix, self.state, self._saved_on = False, "", {}, ""
        self.register(())

    def join_agreement(self, prefix: str) -> None:
        """For one of several drivers that make up one step, whose ranks have agreed already: names of collectives begin with `prefix`,
        and the state before each commit is kept, so that all can roll back where one could not commit."""
        if self._whole_model:
            raise UnsupportedError(self._whole_model)
        self.prefix, self.agreed, self._before = prefix, True, {}

    def _digest(self, specs: list[TensorSpec]) -> int:
        about = [[s.name, s.shape, s.dtype] for s in specs]
        if self.grace.policy:
            about += [[str(part) for part in self._choices.parts[s.name]] for s in specs]
        text = json.dumps([str(self.grace), self.grace.seed, about])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    # --- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """{'version', 'spec', 'op', 'rank', 'size', 'step', 'state': {'residual/<parameter>': array}}: copies, of this rank; with
        'hierarchical' also 'node', which tells the ranks' nodes apart."""
        flat = {f"{key}/{name}": self.ops.copy(array) for name, state in self.state.items() for key, array in state.items()}
        return {
            "version": 1, "spec": str(self.grace), "op": self._op, "rank": self.transport.rank, "size": self.transport.size,
            "step": self.step, "state": flat, **({"node": self._node} if self.grace.two_level else {}),
        }  # fmt: skip

    @property
    def _op(self) -> str:
        return "sum" if self.divisor == 1 and self.transport.size > 1 else "mean"

    @property
    def _node(self) -> str:
        """What tells nodes apart, without a host's name."""
        return hashlib.blake2b(self.transport.node.encode(), digest_size=8).hexdigest()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` gave on the same rank. Of another rank's (a checkpoint of rank 0 alone) what all ranks
        share is taken, and what is each rank's own starts anew, with a warning. Raises GraceError, and changes nothing, if the state does
        not fit, or if the memory makes no sense without every rank's part (ef21, diana)."""
        self.state, self.step = self.read_state(saved), int(saved["step"])
        self._choices.forget()
        self._foreign = saved["rank"] != self.transport.rank
        self._saved_on = "" if self._foreign else saved.get("node", "")
        if self._foreign:
            warnings.warn(
                f"this state was saved by rank {saved['rank']} and is loaded on rank {self.transport.rank}: this rank's memory starts at "
                "zero. Save the state of every rank to resume exactly",
                stacklevel=3,
            )

    def read_state(self, saved: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
        """The arrays of a state by parameter, copied and checked. Raises GraceError if it is not for this exchange."""
        if saved.get("version") != 1:
            raise GraceError(f"this state has version {saved.get('version')!r}, expected 1")
        if saved["spec"] != str(self.grace):
            raise GraceError(f"this state was saved with {saved['spec']!r}, the exchange is {str(self.grace)!r}")
        if saved["size"] != self.transport.size:
            raise GraceError(
                f"this state was saved by one of {saved['size']} ranks, there are {self.transport.size}; save with grace_ext.save, "
                "and grace_ext.load(..., resize='mean') fits it to another number of ranks, or leave it out to start with an empty memory"
            )
        foreign = saved["rank"] != self.transport.rank
        together = [memory.name for memory in self.grace.memories if not memory.resumes_alone]
        if foreign and saved["state"] and together:
            raise GraceError(
                f"this state was saved by rank {saved['rank']} and this is rank {self.transport.rank}: memory "
                f"{together[0]!r} keeps on every rank what belongs together; save and load the state of every rank, or leave it "
                "out to start anew"
            )
        shared = self._choices.shared()
        state: dict[str, dict[str, Array]] = {}
        for key, array in saved["state"].items():
            part, name = key.split("/", 1)
            state.setdefault(name, {}).update({part: self.ops.copy(array)} if not foreign or part in shared or is_own(part) else {})
        if self.specs:
            self._check_state(state, fill=foreign)
        return state

    def _check_state(self, state: dict[str, dict[str, Array]], *, fill: bool) -> None:
        """Raises GraceError if it does not fit; `fill` adds what is missing, as at the first step."""
        info = self._step_info()
        for name, arrays in state.items():
            if name not in self.specs:
                raise GraceError(f"the state has memory for {name!r}, and there is no such parameter; there are: {few(self.specs)}")
            spec = self.specs[name]
            if self.grace.policy:
                allowed = self._choices.lengths(self.ops, spec, info) if spec.size else {}
                odd = {key: len(array) for key, array in arrays.items() if len(array) not in allowed.get(key, ())}
                if odd:
                    raise GraceError(f"the state of {name!r} has {odd} elements, possible are {allowed}")
                continue
            expected = initial_state(self.ops, spec, self.grace.parts_for(spec), info) if spec.size else {}
            if fill:
                arrays.update({key: array for key, array in expected.items() if key not in arrays})
            shapes, found = ({key: len(array) for key, array in x.items()} for x in (expected, arrays))
            if shapes != found:
                raise GraceError(f"the state of {name!r} has {found} elements, expected {shapes}")
