"""Makes one model's exchange of TensorFlow operations, for eager code and for graphs.

The driver is the same generator as on every engine. Here it runs in pieces, each a `tf.numpy_function` between two network operations:
    put(bucket 0) -> arrays -> Horovod ops ...   put(bucket 1) -> ...   finish: result -> next arrays -> Horovod ops ... -> gradients
The collectives and their kinds must be known when the graph is traced: a rehearsal with zero gradients on a pretended network finds them
(sizes may change from step to step, kinds and order do not; so the sizes of an all-to-all's pieces are a tensor, too). A token passes
through all pieces, so they run in this order whatever graph is around them. No piece ever waits for the network, so any number of models
may be under way. TensorFlow runs a piece on the host, and copies what it takes from a GPU, and what a GPU takes of its results.

The agreement of the first step is a blocking collective, made outside the graph when the first graph is traced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from ...checkpoints.elastic import STALE
from ...composition.grace import Grace
from ...driver.agreement import digest_of
from ...driver.driver import Driver
from ...errors import GraceError, UnsupportedError
from ...exchange.effects import Collective, Start, Wait
from ...exchange.perform import naming_failures, perform
from ...exchange.transport import Carried, Transport, by_sum, cut, gathered, to_sum
from ...parts.tensor import TensorSpec
from ..horovod import process_set_of
from .ops import GraphOps, graph_ops, numpy_function
from .variables import variable_of
from .watchdog import FAILURE, WATCHDOG, Waiting, watched


class HorovodTransport(Transport):
    """Runs Horovod's named collectives as TensorFlow ops. `start` and `wait` are for eager code; `apply` builds graphs."""

    ops: GraphOps
    gathers_uneven = True
    scatters_uneven = True
    splits = True
    failure = FAILURE

    def __init__(self, process_set: Any):
        self.ops, self.process_set = graph_ops(), process_set
        self.rank, self.size = (0, 1) if process_set.size() == 1 else (process_set.rank(), process_set.size())

    def apply(self, collective: Collective, inputs: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Applies the collective to the tensors of its `arrays_of`. `result` turns the values of those that this returns into what the
        driver expects."""
        tensor, *splits = inputs
        if self.size == 1:
            return [tensor, *splits]
        name = name.replace("/", ".")  # with ignore_name_scope Horovod drops all before the last slash
        options = {"process_set": self.process_set, "ignore_name_scope": True}
        if collective.kind == "allreduce":
            op = hvd.Average if collective.divisor == self.size else hvd.Sum
            return [hvd.allreduce(tensor, op=op, name=name, **options)]
        if collective.kind == "allgather":
            if self.pair and any(collective.sizes or ()):
                return [hvd.allreduce(tensor, op=hvd.Sum, name=name, **options)]
            return [hvd.allgather(tensor, name=name, **options)]
        if collective.kind == "alltoall":
            return list(hvd.alltoall(tensor, splits=splits[0], name=name, **options))
        raise GraceError(f"Horovod has no TensorFlow op for the collective {collective.kind!r}")

    def result(self, collective: Collective, values: Sequence[np.ndarray]) -> Any:
        """Returns what the driver waits for, given the values of the tensors that `apply` returned."""
        if collective.kind == "allreduce":
            return values[0] if collective.divisor in (1, self.size) else values[0] / collective.divisor
        if collective.kind == "alltoall":
            return cut(values[0], values[1].tolist())
        mine = to_sum(self, collective)
        if mine is not None:
            return by_sum(self, collective, (values[0] - mine.view(np.int32)).view(np.uint8))
        return gathered(self, collective, values[0])

    def carry(self, collective: Collective) -> Carried:
        # Broadcasts of n messages need n operations whose shapes the graph does not know; one all-gather brings the same bytes.
        if collective.kind == "broadcast":
            collective = collective._replace(kind="allgather")
        return super().carry(collective)

    def arrays_of(self, collective: Collective) -> list[np.ndarray]:
        """Returns the arrays that a graph carries for it: its array, and for an all-to-all how much of that goes to each rank."""
        if collective.kind == "alltoall":
            return [collective.array, np.array(collective.sizes, np.int32)]
        mine = to_sum(self, collective)
        return [collective.array if mine is None else mine.view(np.int32)]

    def group(self, ranks: Sequence[int]) -> HorovodTransport | None:
        mine = self.rank in ranks
        if len(ranks) == 1:
            return Alone(self.ops, False) if mine else None
        made = process_set_of(hvd, ranks, self.size)
        return type(self)(made) if mine else None

    def among(self, group: str) -> HorovodTransport | None:
        found = super().among(group)
        assert found is None or isinstance(found, HorovodTransport)  # `group` makes no others
        return found

    def start(self, collective: Collective, name: str) -> Any:
        with watched(name, self.rank):  # an eager operation waits for its result
            return collective, self.apply(collective, [tf.constant(array) for array in self.arrays_of(collective)], name)

    def wait(self, handle: Any) -> Any:
        collective, tensors = handle
        return self.result(collective, [tensor.numpy() for tensor in tensors])


class Alone(HorovodTransport):
    """Stands for a network of one rank; or, in a rehearsal, for a pretended one, whose other ranks do the same things in the same order."""

    pair = False

    def __init__(self, ops: GraphOps, pair: bool):
        self.ops, self.rank, self.size, self.pair = ops, 0, 1, pair

    def start(self, collective: Collective, name: str) -> Any:
        return collective

    def wait(self, handle: Collective) -> Any:
        return handle.array / handle.divisor if handle.kind == "allreduce" else [handle.array]


class GraphExchange:
    """Exchanges the gradients of one set of variables. Call it with them (tensors, in the order of `specs`) and the learning rate.

    before_step: called with the driver's step before each step.
    starting: returns digests of the variables (see `digests_of`), which the ranks compare at the first step. If they differ there, they
      are compared again at the second, because Horovod's users may broadcast after the first. None: not compared.
    driver: one that has registered these specs already, in place of a new one.
    rehearsed: the step whose collectives all steps of this object have. compressing: as for the driver."""

    transport_type: ClassVar[type[HorovodTransport]] = HorovodTransport
    #: Whether it can make collectives among some of the ranks.
    two_levels: ClassVar[bool] = False

    def __init__(
        self,
        grace: Grace,
        specs: Sequence[TensorSpec],
        process_set: Any,
        *,
        average: bool,
        before_step: Callable[[int], None] = lambda step: None,
        starting: Callable[[], dict[str, str]] | None = None,
        driver: Driver | None = None,
        rehearsed: int = 0,
        compressing: bool = True,
    ):
        if grace.two_level and not self.two_levels:
            raise UnsupportedError(f"{grace}: TensorFlow's LocalSGD has no 'hierarchical'; use its `between` communicator alone")
        self._before_step = before_step
        self.ended = False  # whether the ranks have changed since
        self.transport = self.transport_type(process_set)
        divisor = self.transport.size if average else 1
        if driver is None:
            own = None if average else 1
            driver = Driver(grace, self.transport.ops, self.transport, divisor=own, compressing=compressing)
            driver.register(specs)
            driver.starting, driver.tolerates_start = starting, True
        self.driver = driver
        self._pieces: list[Any] = self._rehearse(divisor, rehearsed)
        self._started: list[np.ndarray] = []
        self._under_way: dict[str, Collective] = {}
        self._finishing: Any = None
        self._waiting: Waiting | None = None

    def _rehearse(self, divisor: int, step: int) -> list[Any]:
        """Returns the effects of one step, by piece: [(names put, collectives started)], then [(the wait, collectives started)]."""
        pretended = Alone(self.transport.ops, self.transport.pair)
        driver = Driver(
            self.driver.grace,
            self.driver.ops,
            pretended,
            divisor=divisor,
            read_lr=lambda: 1.0,
            diverging=True,
            compressing=self.driver.compressing,
        )
        driver.register(self.driver.specs.values())
        driver.skip_agreement(step)
        pieces: list[Any] = []
        handles: dict[str, Any] = {}
        for bucket in driver.buckets:
            started = []
            for spec in bucket.specs:
                for effect in driver.put(spec.name, np.zeros(spec.shape, _numpy_dtype(spec.dtype))):
                    handles[effect.name] = effect.collective
                    started.append(effect)
            pieces.append(([spec.name for spec in bucket.specs], started))
        finish, answer = driver.finish(), None
        while True:
            try:
                effect = finish.send(answer)
            except StopIteration:
                return pieces
            answer = None
            if isinstance(effect, Start):
                handles[effect.name] = effect.collective
                pieces[-1][1].append(effect)
            else:
                pieces.append((effect, []))
                answer = driver.transport.wait(handles.pop(effect.name))

    # --- building the operations ------------------------------------------------------------------------------------
    def agree(self) -> None:
        """Makes the ranks agree, outside the graph, when the first one is traced."""
        if not self.driver.agreed:
            with tf.init_scope():
                perform(self.driver.agree(), self.transport, {})

    def __call__(self, gradients: Sequence[tf.Tensor], lr: Any = None, others_finite: Any = None) -> list[tf.Tensor]:
        """Returns the aggregates, in the gradients' order, shapes and dtypes. others_finite: a tensor, see Driver; None stands for True."""
        self.driver.check_rate(None if lr is None else 1.0)  # while the graph is traced
        self.agree()
        specs = list(self.driver.specs.values())
        by_name = dict(zip(self.driver.specs, gradients, strict=True))
        token = tf.cast(float("nan") if lr is None else tf.convert_to_tensor(lr), tf.float32)  # the token carries the learning rate, too
        in_flight: dict[str, list[tf.Tensor]] = {}
        outputs: list[tf.Tensor] = []
        for number, (what, effects) in enumerate(self._pieces):
            last = number == len(self._pieces) - 1
            inputs = [by_name[name] for name in what] if isinstance(what, list) else in_flight.pop(what.name)
            if last and others_finite is not None:
                inputs = [others_finite, *inputs]
            counts = [len(self.transport.arrays_of(effect.collective)) for effect in effects]
            types = [tf.as_dtype(array.dtype) for effect in effects for array in self.transport.arrays_of(effect.collective)]
            types += [tf.as_dtype(spec.dtype) for spec in specs] if last else []
            then = None if last or tf.executing_eagerly() else self._pieces[number + 1][0]
            piece = self._piece(what, then, number == 0, last, last and others_finite is not None)
            results = numpy_function(piece, [token, *inputs], [tf.float32, *types])
            token, arrays = results[0], results[1:]
            token.set_shape([])
            outputs = arrays[sum(counts) :]
            for effect, count in zip(effects, counts, strict=True):
                mine, arrays = arrays[:count], arrays[count:]
                for array in mine:
                    array.set_shape([None])
                with self._watched_if_eager(effect):
                    in_flight[effect.name] = self.transport.apply(effect.collective, mine, self._real_name(effect.name))
        for spec, output in zip(specs, outputs, strict=True):
            output.set_shape(spec.shape)
        return list(outputs)

    def _real_name(self, rehearsed: str) -> str:
        return self.driver.prefix + rehearsed

    @contextmanager
    def _watched_if_eager(self, effect: Start) -> Iterator[None]:
        """Watches a collective that waits for its result where it is made, and names it if it fails. In graphs the pieces watch."""
        name = self._real_name(effect.name)
        if self.transport.size == 1 or not tf.executing_eagerly():
            yield
            return
        with naming_failures(self.transport, name, effect.parameters), watched(name, self.transport.rank):
            yield

    def _piece(
        self, what: list[str] | Wait, then: list[str] | Wait | None, first: bool, last: bool, judged: bool
    ) -> Callable[..., list[np.ndarray]]:
        """Returns what runs between two network operations, as a function of numpy arrays. what: the names of the gradients that it puts,
        or what it has waited for. then: the same of the next piece, for the watchdog. judged: the first of the arrays says whether other
        gradients are finite."""

        def run(token: np.ndarray, *given: np.ndarray) -> list[np.ndarray]:
            values = list(given)
            self._wait_no_longer()
            if first:
                self._begin_anew(token)
                self.transport.ops.take_back()
            if judged:
                finite, *values = values
                self.driver.others_finite = bool(finite)
            if isinstance(what, list):
                for name, value in zip(what, values, strict=True):
                    for effect in self.driver.put(name, value):
                        self._begin(effect)
                outputs = self._resume(None) if last else None  # it is the last only if nothing needs the network
            else:
                name = self._real_name(what.name)
                outputs = self._resume(self.transport.result(self._under_way.pop(name), values))
            arrays, self._started = [*self._started, *(outputs or {}).values()], []
            self.transport.ops.lend(arrays)
            if isinstance(then, Wait):
                self._wait_for(self._real_name(then.name), then.parameters, self.transport)
            return [token, *arrays]

        return run

    def _begin_anew(self, rate: np.ndarray) -> None:
        """Prepares a step at this learning rate (NaN: there is none). Raises GraceError if the ranks have changed."""
        if self.ended or self.transport.size != self.transport.process_set.size():
            raise GraceError(STALE.format(self.transport.size, self.transport.process_set.size()))
        self._abandon()
        if self.driver.started_apart and self.driver.step:
            compare_start(self.driver, self.transport)
        self._before_step(self.driver.step)
        self.driver.set_learning_rate(None if np.isnan(rate) else float(rate))

    def _wait_for(self, name: str, parameters: Sequence[TensorSpec], among: HorovodTransport) -> None:
        """Lets the watchdog know that this rank now waits for a collective, which the graph is about to make."""
        if among.size > 1:
            self._waiting = WATCHDOG.begin(name, [spec.name for spec in parameters], among.rank, in_graph=True)

    def _wait_no_longer(self) -> None:
        WATCHDOG.done(self._waiting)
        self._waiting = None

    def _abandon(self) -> None:
        """Forgets a step that has begun and not ended, because of an error elsewhere in the graph."""
        self._wait_no_longer()
        self._finishing = None
        self._started, self._under_way = [], {}
        self.driver.abandon()

    def _begin(self, effect: Start) -> None:
        self._under_way[effect.name] = effect.collective
        self._started += self.transport.arrays_of(effect.collective)

    def _resume(self, result: Any) -> dict[str, np.ndarray] | None:
        """Resumes the driver's `finish` with the result that it waits for, and runs it to its next wait. Returns the outputs at its end,
        else None."""
        try:
            if self._finishing is None:
                self._finishing = self.driver.finish()
                next(self._finishing)  # up to its first wait: everything is started already
            effect = self._finishing.send(result)
            while isinstance(effect, Start):
                self._begin(effect)
                effect = next(self._finishing)
        except StopIteration as stop:
            self._finishing = None
            return stop.value
        return None


def compare_start(driver: Driver, transport: HorovodTransport) -> None:
    """Compares the ranks' variables again, which differed before the first step. Raises DisagreementError."""
    assert driver.starting is not None
    perform(driver.compare(driver.starting()), transport, {})


def digester(variables: Mapping[str, Any]) -> Callable[[], dict[str, str]]:
    """Returns a function that returns the digests of these variables, and does not keep them alive."""
    known = {name: weakref.ref(variable) for name, variable in variables.items()}
    return lambda: digests_of({name: variable() for name, variable in known.items()})


def digests_of(variables: Mapping[str, Any]) -> dict[str, str]:
    """Returns a digest of each variable's bits, by name (agreement.digest_of); of none of them, while the tf.function that creates them is
    being traced."""
    inner = {name: variable_of(v) for name, v in variables.items()}
    if not all(bool(v.is_initialized()) for v in inner.values()):
        return {f"variables that have no values yet on rank {hvd.rank()}": ""}  # differs by rank, so they are compared later
    return {name: digest_of(np.asarray(v.numpy())) for name, v in inner.items()}


def _numpy_dtype(name: str) -> Any:
    return tf.as_dtype(name).as_numpy_dtype
