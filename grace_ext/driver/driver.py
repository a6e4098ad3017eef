"""The driver: one rank's pending gradients, their order, rounds, commit and rollback. Written once for every world.

It never touches a network. Its methods are generators of two effects, Start(name, collective) and Wait(name), and one more, Split, once,
if an exchange has two levels. exchange/perform.py executes them on a transport, exchange/lockstep.py for N ranks in one process.

Why it cannot deadlock, whatever order the gradients arrive in:
  1. Buckets are made from the parameter list alone, which all ranks share (checked in 5), and are started in one fixed order: bucket i
     never before bucket i - 1. A bucket whose turn it is starts inside `put`, so communication overlaps the backward pass.
  2. `put` only starts; nothing waits inside a hook. All waiting is in `finish`, which every rank calls once per step.
  3. `finish` first starts all buckets that remain (a parameter without a gradient takes part with zeros), so that when the first
     Wait happens, every rank has started, or will start without waiting for anyone, the first round of every bucket.
  4. Later rounds are started in the order (round, bucket), each after the wait for that bucket's round before it. So the sequence of
     starts is the same on all ranks: engines that match collectives by name and engines that match by order both pair them rightly.
     Sums over the ranks that hold rows of the same matrices (TensorSpec.rows) are such later rounds, too, on a transport of their own.
     These matrices are in buckets of their own, which are the same on all ranks of both kinds, and take as many rounds on each of them;
     so there is one order of all collectives by (round, bucket), and every rank starts its own in this order before it waits for one.
  5. At the first step `put` starts nothing. `finish` first exchanges (spec, parameters, version) under a constant name, and raises on
     every rank alike if they differ; so ranks that disagree never start collectives that do not match.

Commit. A part returns new state; it is kept aside until every bucket is through, and committed only if every rank was finite in every
bucket. An exception anywhere leaves the state of the last committed step. A caller may also finish a step without a commit, or roll a
commit back; every rank must do so alike, and the digests of the next step say whether they did (`revoked`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ..composition.composition import Parts, uncompressed
from ..composition.grace import Grace
from ..errors import GraceError, NamesError, UnsupportedError, warn_user
from ..exchange.bucket import exchange_bucket
from ..exchange.effects import Effects, Split, Start, Wait
from ..exchange.hierarchy import TwoLevel
from ..exchange.tensor import Job, Outcome, initial_state, replaced
from ..exchange.transport import Transport
from ..parts.ops import Array, Flag, Ops
from ..parts.tensor import StepInfo, TensorSpec
from ..privacy.mechanism import Mechanism
from . import layout, state
from .agreement import FIX, FIX_START, agree, check_nodes, check_values, differ
from .choices import Choices
from .layout import BUCKET_BYTES, Bucket
from .observer import Observer

LOG = logging.getLogger("grace_ext")
NOT_PRIVATE = (
    "the gradient of {!r} was about to leave this rank without noise, because this way of training does not make gradients private. Ways "
    "that do are listed in docs/privacy.md: hvd.DistributedOptimizer(privacy=...) is one"
)
ADDED_UP = (
    "the gradients of each example have one dimension more than the parameter, in front; that of {!r}, of shape {}, has shape {}. Examples "
    "cannot be clipped one by one any more when they are added up"
)


class Driver:
    """One rank of one exchange.

    divisor: None for a mean, whose divisor is the number of ranks; 1 for a sum. read_lr: returns the current learning rate, or None.
    diverging: whether the caller averages models, so that results may differ from rank to rank (memory 'cser').
    in_place: whether results are written over the gradients, if `ops.overwrite` can.
    compressing: False for a rank alone, which need not send anything: then only memories act, and votes."""

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
        compressing: bool = True,
    ):
        diverges = [memory.name for memory in grace.memories if memory.diverges]
        if diverges and not diverging:
            raise UnsupportedError(
                f"memory {diverges[0]!r} lets the ranks' models differ between resets; it works with a wrapper that averages models "
                "(LocalSGD), not behind an optimizer that expects the same gradient everywhere"
            )
        if grace.two_level and not transport.splits:
            raise UnsupportedError(
                f"{grace} needs groups of ranks for 'hierarchical', which are not available here; use the communicator between the nodes "
                "by itself"
            )
        self.grace, self.ops, self.transport = grace, ops.deferring(), transport
        self._two_level: TwoLevel | None = None  # known once ranks have agreed
        self._set_divisor(divisor)
        self.read_lr, self.bucket_bytes = read_lr, bucket_bytes
        self._in_place, self.compressing = in_place, compressing
        self._ended = time.perf_counter()  # when the last step did
        self._compute = float("inf")  # seconds from there to the end of a backward pass: the fewest, as some have a pause in them
        self.prefix = ""  # of the names of collectives; agreed on at the first step
        self.specs: dict[str, TensorSpec] = {}
        self.buckets: list[Bucket] = []
        self._bucket_of: dict[str, Bucket] = {}
        self._choices = Choices(grace)
        self._by_rate = [part for leaf in grace.leaves for part in (leaf.memory, leaf.communicator) if part.uses_lr]
        self.state: dict[str, dict[str, Array]] = {}
        self._foreign = False  # whether the state is another rank's, and lacks what was that rank's own
        self._saved_on = ""  # the node that the state was this rank's on, if it is exchanged in two levels
        self._nodes = 0  # the number of nodes that the state is of, if that is known
        #: The elements of the whole model: those of the registered parameters, unless the caller sets more, of which these are a part.
        self.elements = 0
        self.step = 0
        self.agreed = False
        #: Whether the last step's state was committed: every rank was finite in every bucket, and nobody revoked it.
        self.committed = True
        self._rate: float | None = None  # the learning rate that the digests name
        #: The names of the parameters whose sparse gradients the caller exchanges beside this; the ranks must agree on them.
        self.sparse: list[str] = []
        #: Whether the gradients of the step under way that others exchange (sparse ones) are finite, as all ranks must say alike: else the
        #: optimizer will skip the step, and nothing is committed.
        self.others_finite = True
        #: How many steps were revoked: by `finish(commit=False)`, `roll_back` or `revoke`.
        self.revoked = 0
        self._keeps_before = False
        self._before: dict[str, dict[str, Array]] | None = None  # the state before the last commit, only if it may be rolled back
        #: Bytes that this rank handed to collectives in the last finished step, headers and all rounds included.
        self.wire_bytes = 0
        self.observer = Observer()
        #: Returns digests of the parameters (agreement.digest_of, by name), which must be the same when ranks agree; None: not compared.
        self.starting: Callable[[], dict[str, str]] | None = None
        #: Whether they may differ then, because the caller's users broadcast them after the first step; the caller compares them again.
        self.tolerates_start = False
        #: Whether they did differ, and have not been compared again.
        self.started_apart = False
        #: Makes gradients private, and counts how often it has; None if that was not asked for.
        self.mechanism = None if grace.privacy is None else Mechanism(grace.privacy, ops)
        self._private: dict[str, Any] = {}  # by name: what `privatize` has made for this step
        self._arrived: dict[str, Any] = {}
        self._info: StepInfo | None = None  # of the step under way
        self._next = self._bytes = 0  # the bucket whose turn it is; bytes handed to collectives so far
        self.abandon()

    def observe(self, observer: Observer) -> None:
        """Lets this observer watch the driver from the next step on. Raises GraceError in the middle of a step."""
        if self.under_way:
            raise GraceError("metrics are turned on between steps, not while gradients are under way")
        self.observer = observer

    # --- parameters ---------------------------------------------------------------------------------------------------
    def register(self, specs: Iterable[TensorSpec]) -> None:
        """Fixes the parameters, in an order that is the same on all ranks, and packs them into buckets, last parameters first
        (their gradients come first in a backward pass). Raises NamesError, UnsupportedDtypeError, or GraceError if a state that was loaded
        before does not fit them."""
        self.specs = layout.checked(specs)
        self.elements = sum(spec.whole.size for spec in self.specs.values())
        self._choices = Choices(self.grace, self.specs.values())
        groups = layout.in_buckets(list(self.specs.values()), self.packed)
        self.buckets = [Bucket([self.specs[name] for name in names]) for names in groups]
        self._lay_out()
        try:
            state.check(self.ops, self.grace, self.specs, self.step_info(), self.state, fill=self._foreign)
        except GraceError:
            self.specs, self.buckets = {}, []
            raise

    def packed(self, nbytes: Mapping[str, int]) -> list[list[str]]:
        """Splits the names of these parameters, given in order with their bytes, into the groups that travel together."""
        return layout.packed(nbytes, float("inf") if layout.one_bucket_because(self.grace) else self.bucket_bytes)

    def _log(self, sentences: list[str]) -> None:
        # Not by a warning: one rank alone must not raise if warnings are errors, because the others would wait for it.
        for sentence in sentences if self.transport.rank == 0 else ():
            LOG.warning(sentence)

    def log_notices(self) -> None:
        """Logs on rank 0 what policies have to say about the parameters; `agree` does so."""
        self._log(self._choices.notices())

    def regroup(self, groups: Iterable[Iterable[str]]) -> None:
        """Packs the registered parameters into these buckets instead, for a framework that makes buckets of its own. All ranks must pass
        the same groups. State is kept by name, so nothing else changes. Buckets that have started in this step must stay as they are."""
        lists = [list(names) for names in groups]
        because = layout.one_bucket_because(self.grace)
        if because and len(lists) > 1:
            raise UnsupportedError(because)
        if sorted(itertools.chain.from_iterable(lists)) != sorted(self.specs):
            raise NamesError("the buckets must hold every registered parameter once")
        if any(bucket.names != set(names) for bucket, names in zip(self.buckets[: self._next], lists, strict=False)):
            raise GraceError("a bucket that has started cannot be regrouped")
        later = [[self.specs[name] for name in names] for names in lists[self._next :]]
        self.buckets = self.buckets[: self._next] + [Bucket(group) for group in later]
        self._lay_out()

    def _lay_out(self) -> None:
        """Sets what follows from the buckets, and does not change from step to step."""
        self._bucket_of = {spec.name: bucket for bucket in self.buckets for spec in bucket.specs}
        for number, bucket in enumerate(self.buckets):
            bucket.number = number
        self._choose(anew=True)
        for bucket in self.buckets[self._next :]:
            bucket.missing = sum(spec.name not in self._arrived for spec in bucket.specs)

    def _choose(self, anew: bool = False) -> None:
        """Chooses what each tensor goes through at this step, which the digest in the headers of messages names; it also names the learning
        rate, if a part uses it, and how many steps were revoked."""
        before, self._rate = self._rate, self.read_lr() if self._by_rate else None
        if self._choices.choose(self.step, self.state) or anew or self._rate != before:
            rate = 0 if self._rate is None else zlib.crc32(struct.pack("<d", self._rate))
            for bucket in self.buckets:
                bucket.digest = layout.digest(self.grace, bucket.specs, self._choices.parts) ^ (self.revoked & 1) ^ rate

    def check(self, name: str, tensor: Any) -> None:
        """Raises NamesError or TensorChangedError if this tensor is not what was registered under its name."""
        layout.check_tensor(self.specs, name, *self.ops.describe(tensor))

    def check_rate(self, lr: float | None) -> None:
        """Raises LearningRateError if a part needs the learning rate and there is none."""
        for part in self._by_rate:
            part.learning_rate(dataclasses.replace(self.step_info(), lr=lr))

    def set_learning_rate(self, lr: float | None) -> None:
        """Sets the learning rate of the steps to come, in place of what `read_lr` returned."""
        self.read_lr = lambda: lr

    # --- one step -----------------------------------------------------------------------------------------------------
    @property
    def under_way(self) -> bool:
        """Whether a step has begun, and has not ended."""
        return bool(self._arrived) or self._info is not None

    @property
    def parts(self) -> dict[str, Parts]:
        """By name: the parts that each tensor goes through at the step that is under way, or was the last."""
        return self._choices.parts

    def privatize(self, gradients: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """Returns private gradients of all parameters, which are what `put` takes then; these gradients themselves if privacy was not asked
        for. gradients: as for Mechanism.release. Raises NamesError or TensorChangedError if one of them does not fit its parameter."""
        if self.mechanism is None:
            return dict(gradients)
        for name, gradient in gradients.items():
            shape, dtype = self.ops.describe(gradient)
            if self.grace.per_example:
                if len(shape) != len(specs[name].shape) + 1:
                    raise UnsupportedError(f"{self.grace}: {ADDED_UP.format(name, specs[name].shape, shape)}")
                shape, dtype = shape[1:], specs[name].dtype
            layout.check_tensor(specs, name, shape, dtype)
        self._private = self.mechanism.release(gradients, specs, self.step_info())
        return dict(self._private)

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, those before a checkpoint included. Raises UnsupportedError if gradients
        are not made private."""
        if self.mechanism is None:
            raise UnsupportedError(f"{self.grace} makes no gradient private, so there is no epsilon: pass privacy=Privacy(...)")
        return self.mechanism.privacy.epsilon(delta, self.mechanism.releases)

    def exchange(self, gradients: Mapping[str, Any]) -> Effects:
        """Makes one whole step with these gradients, by name: `privatize`, `put` for all, then `finish`, whose results it returns."""
        try:
            gradients = self.privatize(gradients, self.specs)
            for name in reversed(self.specs):  # the order of the buckets, which therefore start as early as they can
                yield from self.put(name, gradients[name])
            return (yield from self.finish())
        finally:
            self.abandon()  # if the generator was closed, because another rank failed

    def put(self, name: str, tensor: Any) -> Effects:
        """Takes one gradient and starts every bucket whose turn it is. Never waits. The tensor must not change until `finish`."""
        self.check(name, tensor)
        if name in self._arrived:
            raise GraceError(f"a second gradient for {name!r} came before the step was finished")
        if self.mechanism is not None and self._private.get(name) is not tensor:
            raise UnsupportedError(f"{self.grace}: {NOT_PRIVATE.format(name)}")
        self._arrived[name] = tensor
        self._bucket_of[name].missing -= 1
        try:
            if self.agreed:
                yield from self.observer.effects(self._start_ready())
        except BaseException:
            self.abandon()  # nothing can be known of what was started
            raise

    def finish(self, *, commit: bool = True, revocable: bool = False) -> Effects:
        """Ends the step. Returns {name: result} for every registered parameter, in the gradients' shapes and dtypes.

        commit: False leaves state and step as they were, for gradients that shall not count; every rank must do so alike. revocable: keeps
        the state before the commit, so that `undo` can restore it until the next step begins."""
        self._compute = min(self._compute, time.perf_counter() - self._ended)
        outputs = yield from self.observer.effects(self._finish(commit, revocable))
        self.observer.finished()
        return outputs

    def _finish(self, commit: bool, revocable: bool) -> Effects:
        try:
            if self.mechanism is not None and (missing := [name for name in self.specs if name not in self._arrived]):
                raise UnsupportedError(f"{self.grace}: {NOT_PRIVATE.format(missing[0])}")  # that there is none is said without noise
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
            self._judge()
            if all(bucket.finite for bucket in self.buckets):
                yield from self._settle()
            return self._commit(commit, revocable)
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
                self._info = self.step_info()
                self._choose()
                self.forget_before()
                self.observer.begin(self._info)
            jobs = [self._job(spec, self._info) for spec in bucket.specs]
            how = self._two_level.exchange if self._two_level else partial(exchange_bucket, self.ops)
            bucket.running = self.observer.bucket(how(jobs, self._info, bucket.digest, self.transport.carry))
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

    def _take(self, bucket: Bucket, outcomes: list[Outcome], finite: Flag) -> None:
        """Takes what a bucket's exchange gave: makes the user's tensors at once, keeps the states for later, and empties the list."""
        assert self._info is not None
        bucket.finite = finite
        together = []  # results that overwrite the gradients
        for spec in reversed(bucket.specs):
            output, after, _ = outcomes.pop()
            bucket.states[spec.name] = self._choices.observe(self.ops, spec, output, after, self._info, finite)
            if self.ops.defers and self._in_place and spec.name in self._arrived:
                together.append((self._arrived[spec.name], self.ops.emit(output, spec)))
                bucket.outputs[spec.name] = self._arrived[spec.name]
            else:
                self._give(bucket, spec, output)
        del output
        self.ops.overwrite_all(together)
        self.ops.recycle(bucket.buffers)

    def _give(self, bucket: Bucket, spec: TensorSpec, output: Array) -> None:
        """Makes the user's tensor of a result: over the gradient, or a new one."""
        gradient = self._arrived.get(spec.name) if self._in_place else None
        if gradient is not None and self.ops.overwrite(gradient, output, spec):
            bucket.outputs[spec.name] = gradient
        else:
            bucket.outputs[spec.name] = self.ops.emit(output, spec)

    def _judge(self) -> None:
        """Learns which buckets were finite on every rank, and makes the results of the others NaN. Here the host waits for a device: once a
        step, after all was started. Raises PayloadError if a payload was not what it must be."""
        for bucket, finite in zip(self.buckets, self.ops.judged([bucket.finite for bucket in self.buckets]), strict=True):
            bucket.finite = finite
            for spec in () if finite else bucket.specs:
                if spec.size:
                    self._give(bucket, spec, self.ops.full_nan(spec.size))

    def _settle(self) -> Effects:
        """Lets policies decide by what all ranks report, before the step is committed."""
        after = {name: arrays for bucket in self.buckets for name, arrays in bucket.states.items()}
        sent, said = yield from self._choices.settle(
            self.transport, self.prefix, self._info or self.step_info(), self.state, after, self._compute
        )
        self._bytes += sent
        self._log(said)

    def _commit(self, commit: bool, revocable: bool) -> dict[str, Any]:
        outputs = {name: output for bucket in self.buckets for name, output in bucket.outputs.items()}
        self.committed = commit and self.others_finite and all(bucket.finite for bucket in self.buckets)
        if not commit:
            self.revoke()
        if self.committed:
            old, self.state = self.state, {name: arrays for bucket in self.buckets for name, arrays in bucket.states.items()}
            self._choices.committed()
            if revocable or self._keeps_before:
                self._before = old
            else:
                self._recycle(old)
        self.step += commit  # what is revoked counts as not made
        self.wire_bytes = self._bytes
        self.observer.ended(self.buckets)
        return {name: outputs[name] for name in self.specs}

    def _recycle(self, old: dict[str, dict[str, Array]]) -> None:
        """Gives back the arrays of a state that is over, unless they are still in use."""
        for name, arrays in old.items():
            self.ops.recycle(replaced(arrays, self.state.get(name, {})))

    def roll_back(self) -> None:
        """Restores the state before the last commit, if it was kept. Every rank must do so alike, between steps."""
        if self.committed and self._before is not None:
            self.state, self.committed = self._before, False
            self._choices.forget()
            self.revoke()

    def undo(self) -> None:
        """Makes the last step, which was finished as `revocable`, count as not made. Every rank must do so alike, between steps."""
        self.roll_back()
        self.step -= 1

    def forget_before(self) -> None:
        """Gives back the state before the last commit: it will not be rolled back."""
        if not self._keeps_before:
            self._before = None

    def revoke(self) -> None:
        """Counts a step whose gradients do not count, which changes the digests: ranks that do not all do so are told at their next
        step."""
        self.revoked += 1
        self._choose(anew=True)

    def abandon(self) -> None:
        """Forgets the step under way, if there is one. The state is that of the last commit."""
        self._arrived, self._private, self._info = {}, {}, None
        self._next = self._bytes = 0
        self.others_finite = True
        self.ops.forget()
        for bucket in self.buckets:
            bucket.clear()

    def step_info(self) -> StepInfo:
        """Returns what parts are told of the step under way, or of the next one."""
        world = self.transport.rank, self.transport.size, self.divisor
        return StepInfo(self.step, *world, self.grace.seed, self.read_lr(), self.elements)

    def _job(self, spec: TensorSpec, info: StepInfo) -> Job:
        before = self._choices.fitting(self.ops, spec, self.state.get(spec.name, {}), info)
        tensor = self._arrived.get(spec.name)
        grad = self.ops.zeros(spec.size) if tensor is None else self.ops.ingest(tensor)
        out = grad if self._in_place and tensor is not None and spec.dtype == "float32" else None
        parts = self._choices.parts[spec.name]
        if not self.compressing:
            before = before or ({} if spec.empty else initial_state(self.ops, spec, parts, info))  # complete, for other numbers of nodes
            parts = uncompressed(parts)
        compressor, memory, communicator = parts
        before = self._choices.measure(self.ops, spec, grad, before, info)
        return Job(spec, compressor, memory, communicator.inner(compressor), grad, before, out, self.observer.watch(spec.name))

    # --- agreement ----------------------------------------------------------------------------------------------------
    def agree(self) -> Effects:
        """Compares what each rank would do, and raises DisagreementError on every rank alike if they differ.

        It also finds a number for the names of this driver's collectives that no other driver of any rank has: two models may be under way
        at once, and ranks may have made different numbers of drivers before (for process sets)."""
        digests = self.starting() if self.starting else None
        said, values = yield from agree(self.ops, self.transport, self._described(), digests)
        self.started_apart = differ(values) and None not in values
        if not self.tolerates_start:
            check_values(values, FIX_START)
        if self.grace.two_level:
            self._two_level = TwoLevel(self.transport.rank, [other["node"] for other in said], self.ops)
            check_nodes(said)
            self._nodes = self._two_level.nodes
            counts = [len(members) for members in self._two_level.members]
            if self.grace.diverges and len(set(counts)) > 1:
                raise UnsupportedError(
                    f"{self.grace} on nodes of {counts} ranks: in two levels a node counts once, and the mean of the models, which undoes "
                    "errors, counts ranks; use as many ranks on every node, or a flat communicator"
                )
            yield Split(self._two_level.groups)
            self.compressing = self._two_level.nodes > 1
        self.log_notices()
        number = max(other["number"] for other in said)
        Driver._next_number = number + 1
        self.prefix = f"grace/{number}"
        if all(other["judges"] for other in said):
            yield from self.observer.probe(self.transport)
        self.agreed = True

    def skip_agreement(self, step: int = 0) -> None:
        """Begins at this step without asking other ranks: for a world of one rank, a simulation, a rehearsal."""
        self.agreed, self.step = True, step

    def compare(self, digests: Mapping[str, str]) -> Effects:
        """Raises DisagreementError, on every rank alike, if ranks do not compress alike, are at different steps, or have different
        digests of parameters (agreement.digest_of, by name). Between steps only."""
        if self._arrived:
            raise GraceError("parameters are compared between steps: call it after the optimizer's step, before the next backward pass")
        _, values = yield from agree(self.ops, self.transport, self._described(), digests)
        check_values(values, FIX_START if self.started_apart else FIX)
        self.started_apart = False

    def _described(self) -> dict[str, Any]:
        """Returns this rank's description of itself, for the agreement."""
        self._choose()
        return {
            "spec": str(self.grace),
            "seed": self.grace.seed,
            "parameters": [[s.name, list(s.shape), s.dtype, *([s.rows] if s.rows else [])] for s in self.specs.values()],
            "sparse": self.sparse,
            "rate": self._rate,
            "op": self._op,
            "buckets": [[spec.name for spec in bucket.specs] for bucket in self.buckets],
            "digests": [bucket.digest for bucket in self.buckets] if self.grace.policy else [],
            "step": self.step,
            "revoked": self.revoked,
            "number": Driver._next_number,
            "node": self.transport.node if self.grace.two_level else "",
            "saved_on": self._saved_on,
            "judges": self.observer.judges_times,
        }

    def move(self, transport: Transport, divisor: int | None) -> None:
        """Goes on among other ranks, with an empty memory and a new agreement. Parameters must be registered again, as on a rank that has
        just joined. The step under way is forgotten: its engine has ended."""
        self.abandon()
        self.transport, self._two_level, self.compressing = transport, None, True
        self._set_divisor(divisor)
        self.agreed, self.prefix, self.state, self._saved_on, self._nodes, self.revoked = False, "", {}, "", 0, 0
        self.register(())

    def join_agreement(self, prefix: str) -> None:
        """Makes this one of several drivers that make up one step, whose ranks have agreed already: names of collectives begin with
        `prefix`, and the state before each commit is kept, so that all can roll back if one could not commit."""
        because = layout.one_bucket_because(self.grace)
        if because:
            raise UnsupportedError(because)
        self.prefix, self.agreed, self._keeps_before = prefix, True, True

    # --- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns {'version', 'spec', 'seed', 'op', 'rank', 'size', 'step', 'state': {'residual/<parameter>': array}}: copies of this
        rank's state; with 'hierarchical' also 'node', which tells the ranks' nodes apart, and 'nodes', their number, if it is known."""
        return {
            "version": state.VERSION, "spec": str(self.grace), "seed": self.grace.seed, "op": self._op,
            "rank": self.transport.rank, "size": self.transport.size, "step": self.step,
            "state": state.flattened(self.ops, self.state), **({"node": self._node} if self.grace.two_level else {}),
            **({"nodes": self._nodes} if self._nodes else {}), **({"releases": self.mechanism.releases} if self.mechanism else {}),
        }  # fmt: skip

    def divide_by(self, ranks: int) -> None:
        """Sets what a mean's sums are divided by from the next step on: how many ranks have gradients, if some take part with zeros. Every
        rank must do so alike, between steps."""
        self.divisor = ranks

    def _set_divisor(self, divisor: int | None) -> None:
        self.divisor = self.transport.size if divisor is None else divisor
        self._op = "sum" if divisor == 1 else "mean"  # also of one rank, whose state other numbers of ranks may get

    @property
    def _node(self) -> str:
        """Tells nodes apart without a host's name."""
        return hashlib.blake2b(self.transport.node.encode(), digest_size=8).hexdigest()

    def load_state_dict(self, saved: Mapping[str, Any], specs: Iterable[TensorSpec] = (), *, joining: bool = False) -> None:
        """Resumes bit for bit from what `state_dict` gave on the same rank. From another rank's state (a checkpoint of rank 0 alone) it
        takes what all ranks share; what is each rank's own starts anew, with a warning. Raises GraceError, and changes nothing, if the
        state does not fit, or if the memory makes no sense without every rank's part (ef21, diana). specs: as for `read_state`. joining:
        whether this rank has just joined the others, so that its memory must start anew, and there is nothing to warn of."""
        states = self.read_state(saved, specs)
        if (foreign := saved["rank"] != self.transport.rank) and not joining:
            warn_user(
                f"this state was saved by rank {saved['rank']} and is loaded on rank {self.transport.rank}: this rank's memory starts at "
                "zero. Save the state of every rank to resume exactly",
                every_rank=True,  # rank 0's own state fits
            )
        self.state, self.step, self._foreign = states, saved["step"], foreign
        if self.mechanism is not None:
            self.mechanism.releases = saved["releases"]
        self._before, self.committed = None, True  # nothing of the steps before can be rolled back
        self._choices.forget()
        self._saved_on, self._nodes = "" if foreign else saved.get("node", ""), saved.get("nodes", 0)

    def read_state(self, saved: Mapping[str, Any], specs: Iterable[TensorSpec] = ()) -> dict[str, dict[str, Array]]:
        """Returns the arrays of a saved state by parameter, copied and checked. Raises GraceError if it is not for this exchange. specs:
        the parameters that will be registered, as far as they are known; what the state has of them must fit, too."""
        states = state.read(self.ops, self.grace, self.transport, saved, self._op)
        known, foreign = self.specs or {spec.name: spec for spec in specs}, saved["rank"] != self.transport.rank
        info = dataclasses.replace(self.step_info(), step=saved["step"])
        state.check(self.ops, self.grace, known, info, states, fill=foreign, partial=not self.specs)
        return states

    def clear_state(self, key: str) -> None:
        """Sets the arrays of this key to zero, for all parameters."""
        for arrays in self.state.values():
            arrays[key] = self.ops.zeros(len(arrays[key]))
