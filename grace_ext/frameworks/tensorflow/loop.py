"""Exchanges one model's gradients if a policy changes from step to step WHICH collectives there are, or if they differ from rank to rank
('hierarchical').

graph.py traces a step's collectives once. Here the graph is a loop that can make any of them: the driver returns, as tensors, the kind of
the next collective and what it carries; a switch makes that one collective; its result goes back to the driver, until there is nothing
left to do. So one traced graph serves every choice of every policy, and no choice is made when tracing.

    begin: gradients -> (kind, arrays);   while kind >= 0: (kind, arrays) -> collective -> the driver -> (kind, arrays);   end: -> results

The order of collectives is the driver's, the same on all ranks, and each waits for the one before it: buckets do not overlap, which costs
most if there are many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from ...composition.grace import Grace
from ...errors import GraceError
from ...exchange.effects import Collective, Start
from .graph import GraphExchange, HorovodTransport
from .ops import numpy_function

#: (kind, element type) of a collective. With each group of ranks (Collective.group) each makes one branch of the switch. An all-to-all
#: also carries its splits.
BRANCHES = (("allreduce", "float32"), ("allreduce", "float64"), ("allgather", "uint8"), ("alltoall", "uint8"))
ENDED = -1
#: The element types of the loop's arrays: one for each entry of BRANCHES, and the splits.
TYPES = ("float32", "float64", "uint8", "uint8", "int32")


class _GatheringTransport(HorovodTransport):
    """Never gathers by a sum, which would be of int32 and need one more branch."""

    pair = False


class LoopExchange(GraphExchange):
    """Exchanges as GraphExchange does, but its collectives become known only when they are made."""

    transport_type = _GatheringTransport
    two_levels = True

    def _rehearse(self, divisor: int, step: int) -> list[Any]:
        return []  # a step's collectives are found while it runs

    def __call__(self, gradients: Sequence[tf.Tensor], lr: Any = None, others_finite: Any = None) -> list[tf.Tensor]:
        """Returns the aggregates, in the gradients' order, shapes and dtypes. others_finite: a tensor, see Driver; None stands for True."""
        self.driver.check_rate(None if lr is None else 1.0)
        self.agree()
        rate = tf.cast(float("nan") if lr is None else tf.convert_to_tensor(lr), tf.float32)
        types = [tf.int32, *(tf.as_dtype(name) for name in TYPES)]
        state = numpy_function(self._begin_step, [rate, others_finite is None or others_finite, *gradients], types)
        state[0].set_shape([])
        for array in state[1:]:
            array.set_shape([None])

        def one(kind: tf.Tensor, *arrays: tf.Tensor) -> list[tf.Tensor]:
            branches = [(group, place) for group in self._groups for place in range(len(BRANCHES))]
            results = tf.switch_case(kind, [lambda group=group, at=at: self._collective(group, at, arrays) for group, at in branches])
            after = numpy_function(self._go_on, results, types)
            after[0].set_shape([])
            for array in after[1:]:
                array.set_shape([None])
            return after

        shapes = [tf.TensorShape([]), *(tf.TensorShape([None]) for _ in TYPES)]
        try:
            state = tf.while_loop(lambda kind, *_: kind >= 0, one, state, shape_invariants=shapes, parallel_iterations=1)
        except tf.errors.OpError as error:  # in eager code; the errors of a graph come where that is called
            waiting = self._waiting
            if waiting is None:
                raise
            self._wait_no_longer()
            raise waiting.error(str(error)) from error
        specs = list(self.driver.specs.values())
        outputs = numpy_function(self._end_step, [state[0]], [tf.as_dtype(spec.dtype) for spec in specs])
        for spec, output in zip(specs, outputs, strict=True):
            output.set_shape(spec.shape)
        return list(outputs)

    @property
    def _groups(self) -> tuple[str, ...]:
        return ("all", "inside", "between") if self.driver.grace.two_level else ("all",)

    def _collective(self, group: str, place: int, arrays: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the loop's arrays, the array of this branch replaced by the collective's result."""
        kind, dtype = BRANCHES[place]
        among, result = self.transport.among(group), list(arrays)
        if among is None or among.size == 1:
            return result
        name = f"{self.driver.prefix}/loop/{group}/{kind}.{dtype}".replace("/", ".")
        options = {"name": name, "process_set": among.process_set, "ignore_name_scope": True}
        if kind == "allreduce":
            result[place] = hvd.allreduce(arrays[place], op=hvd.Sum, **options)
        elif kind == "allgather":
            result[place] = hvd.allgather(arrays[place], **options)
        else:
            result[place], result[-1] = hvd.alltoall(arrays[place], splits=arrays[-1], **options)
        return result

    # --- what runs between the collectives ----------------------------------------------------------------------------
    def _begin_step(self, rate: np.ndarray, others_finite: np.ndarray, *values: np.ndarray) -> list[Any]:
        self._begin_anew(rate)
        self.driver.others_finite = bool(others_finite)
        self._steps = self._whole_step(values)
        self._queue: deque[Start] = deque()
        self._results: dict[str, Any] = {}
        self._waits_for = ""
        self._outputs: list[np.ndarray] = []
        return self._next()

    def _whole_step(self, values: Sequence[np.ndarray]) -> Any:
        by_name = dict(zip(self.driver.specs, values, strict=True))
        outputs = yield from self.driver.exchange(by_name)
        self._outputs = list(outputs.values())

    def _go_on(self, *arrays: np.ndarray) -> list[Any]:
        """Takes the result of the collective that was made, and continues as `_next`."""
        self._wait_no_longer()
        made = self._queue.popleft()
        collective = made.collective
        values = [arrays[_place(collective)], arrays[-1]]
        if collective.kind == "allreduce":
            self._results[made.name] = values[0] / collective.divisor
        else:
            among = self.transport.among(collective.group)
            assert among is not None  # else it was never queued
            self._results[made.name] = among.result(collective, values)
        return self._next()

    def _next(self) -> list[Any]:
        """Runs the driver until it waits for a collective that is not made yet. Returns the branch (int32) and the arrays of the first
        collective in the queue, or ENDED if the step is over."""
        while True:
            answer = None
            if self._waits_for:
                if self._waits_for not in self._results:
                    return self._carried(self._queue[0])
                answer, self._waits_for = self._results.pop(self._waits_for), ""
            try:
                effect = self._steps.send(answer)
            except StopIteration:
                return self._carried(None)
            if not isinstance(effect, Start):
                self._waits_for = effect.name
            elif self.transport.among(effect.collective.group) is None:
                self._results[effect.name] = None
            else:
                self._queue.append(effect._replace(collective=_as_gather(effect.collective)))

    def _carried(self, made: Start | None) -> list[Any]:
        arrays = [np.empty(0, dtype) for dtype in TYPES]
        if made is None:
            return [np.int32(ENDED), *arrays]
        collective, among = made.collective, self.transport.among(made.collective.group)
        assert among is not None  # else it was never queued
        self._wait_for(made.name, made.parameters, among)
        place, group = _place(collective), self._groups.index(collective.group)
        arrays[place], *splits = self.transport.arrays_of(collective)
        return [np.int32(len(BRANCHES) * group + place), *arrays[:-1], *(splits or arrays[-1:])]

    def _end_step(self, _: np.ndarray) -> list[np.ndarray]:
        outputs, self._outputs = self._outputs, []
        return outputs


def _as_gather(collective: Collective) -> Collective:
    """Makes a broadcast an all-gather, as HorovodTransport.carry does, which collectives inside a node do not pass through."""
    return collective._replace(kind="allgather") if collective.kind == "broadcast" else collective


def _place(collective: Collective) -> int:
    """Returns the position in BRANCHES of this collective's kind and element type. Raises GraceError if there is none."""
    wanted = collective.kind, collective.array.dtype.name
    if wanted not in BRANCHES:
        raise GraceError(f"the loop has no TensorFlow op for the collective {collective.kind!r} of {collective.array.dtype}")
    return BRANCHES.index(wanted)


def exchange_of(grace: Grace, *args: Any, **options: Any) -> GraphExchange:
    """Returns the exchange for this Grace: traced collective by collective if all steps and ranks have the same ones, else as a loop; also
    if gradients are made private, which begins when all of them are there, as a loop's steps do."""
    as_loop = grace.route.changes or grace.two_level or grace.privacy is not None
    return (LoopExchange if as_loop else GraphExchange)(grace, *args, **options)
