"""Exchanges the gradients of one Keras optimizer or tape: dense ones compressed, sparse ones exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as api
import numpy as np
import tensorflow as tf

from ...checkpoints.saveable import Saveable, nothing_saveable, saveable_by
from ...checkpoints.statefile import mapped
from ...composition.grace import Grace
from ...driver.driver import Driver
from ...errors import GraceError, NamesError, UnsupportedError
from ...exchange.perform import perform
from ...metrics.metrics import Measured
from ...parts.tensor import TensorSpec
from ..launchers import check_alone
from .graph import GraphExchange, HorovodTransport, digester, digests_of
from .host_copies import EXAMPLES, GRADIENTS, mention_host_copies
from .in_front import refuse_xla
from .loop import exchange_of
from .private import check_gradients, check_no_batch_norm
from .trackable import TrackedState
from .watchdog import watched_operation


def averages(op: Any) -> bool:
    """Whether `op` is the mean. Raises UnsupportedError if it is neither mean nor sum."""
    if op in (api.Average, api.Sum):
        return op == api.Average
    raise UnsupportedError(
        "op must be hvd.Average or hvd.Sum: compressed gradients can only be averaged or added up (Adasum combines parameter updates by "
        "their angles); use op=hvd.Average"
    )


def is_alone(process_set: Any) -> bool:
    """Whether this process is the only rank of its process set. Raises UnsupportedError or warns, as launchers.check_alone does, if a
    launcher has started more ranks."""
    if process_set.size() != 1:
        return False
    if process_set is api.global_process_set:
        check_alone("Horovod", "Start with horovodrun, and call hvd.init() first")
    return True


def names_of(variables: Sequence[Any]) -> list[str]:
    """Returns a name for each variable, the same on all ranks: its path or name, with a number if several share one."""
    names: list[str] = []
    for variable in variables:
        name = getattr(variable, "path", None) or variable.name
        count = sum(known == name or known.startswith(name + "#") for known in names)
        names.append(f"{name}#{count + 1}" if count else name)
    return names


def scaled(gradient: Any, factor: tf.Tensor) -> Any:
    """Returns the gradient, a tensor or IndexedSlices, times a number."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * tf.cast(factor, gradient.values.dtype), gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def divided(gradient: Any, number: int) -> Any:
    """Returns the gradient, a tensor or IndexedSlices, divided by a number."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / number, gradient.indices, gradient.dense_shape)
    return gradient / number


def added_up(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Returns the same gradient with each row once: rows of the same index are added up."""
    rows, places = tf.unique(gradient.indices)
    return tf.IndexedSlices(tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows)), rows, gradient.dense_shape)


def exchange_sparse(gradient: tf.IndexedSlices, name: str, op: Any, process_set: Any) -> tf.IndexedSlices:
    """Exchanges a sparse gradient exactly, uncompressed, by Horovod's gather of rows. Rows are added up before and after it."""
    options = {"op": op, "name": name, "process_set": process_set, "ignore_name_scope": True}
    return added_up(watched_operation(name, process_set, added_up(gradient), lambda rows: api.allreduce(rows, **options)))


class GradientExchange(Measured):
    """Exchanges the gradients of one optimizer or tape.

    dense: the exchange of dense gradients, made at the first call, when the variables and their gradients' kinds are known."""

    def __init__(self, g: Grace, op: Any, process_set: Any, sparse_as_dense: bool, simulate: bool, check_start: bool):
        self.grace, self.op, self.process_set = g, op, process_set
        self.average, self.sparse_as_dense, self.simulate = averages(op), sparse_as_dense, simulate
        self._check_start = check_start
        self.dense: GraphExchange | None = None
        self._saved: Any = None
        self._sizes: dict[str, int] = {}  # of the variables, if they were known before the ranks changed

    @property
    def idle(self) -> bool:
        """Whether this rank exchanges nothing: it is outside the process set, or its only rank, without `simulate`, and nothing acts
        there."""
        return not self.process_set.included() or (is_alone(self.process_set) and not self.simulate and not self.grace.acts_alone)

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], lr: Any = None, beside: Sequence[Any] = ()) -> list[Any]:
        """Returns the aggregates of the gradients; None stays None.

        beside: gradients that stay this rank's own. They are returned behind the aggregates: as NaNs, and then nothing of the step is
          committed, if one of them is not finite on any rank."""
        results, dense, sparse = list(gradients), [], []
        names = names_of(variables)
        if self.grace.privacy is not None:
            check_gradients(self.grace.privacy, gradients, variables, names, self.sparse_as_dense)
        for place, (gradient, name) in enumerate(zip(gradients, names, strict=True)):
            if isinstance(gradient, tf.IndexedSlices) and not self.sparse_as_dense:
                sparse.append((place, name, gradient))
            elif gradient is not None:
                dense.append((place, name, tf.convert_to_tensor(gradient)))
        if not dense and not sparse and not beside:
            return results
        refuse_xla()
        specs = [TensorSpec(name, tuple(variables[place].shape), tensor.dtype.name) for place, name, tensor in dense]
        exchange = self._exchange(specs, [name for _, name, _ in sparse], {name: variables[place] for place, name, _ in dense})
        exchange.agree()
        finite = [self._finite_on_all(beside, f"{exchange.driver.prefix}/beside")] if beside else []
        own = [scaled(gradient, tf.where(finite[0], 1.0, float("nan"))) for gradient in beside]
        for number, (place, _, gradient) in enumerate(sparse):  # by its place: names of variables may differ by rank
            name = f"{exchange.driver.prefix}/sparse/{number}"
            results[place] = exchange_sparse(gradient, name, self.op, self.process_set)
            finite.append(tf.reduce_all(tf.math.is_finite(results[place].values)))
        if dense:
            others = tf.reduce_all(tf.stack(finite)) if finite else None
            for (place, _, _), result in zip(dense, exchange([tensor for _, _, tensor in dense], lr, others), strict=True):
                results[place] = result
        return results + own

    def _finite_on_all(self, gradients: Sequence[Any], name: str) -> tf.Tensor:
        """Returns whether all of these gradients are finite on every rank. name: that of the collective."""
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        own = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in values]))
        if self.process_set.size() == 1:
            return own
        options = {"op": api.Min, "name": name.replace("/", "."), "process_set": self.process_set, "ignore_name_scope": True}
        flag = tf.cast(own, tf.float32)
        return watched_operation(name, self.process_set, flag, lambda value: api.allreduce(value, **options)) > 0.5

    def _exchange(self, specs: list[TensorSpec], sparse: list[str], variables: dict[str, Any]) -> GraphExchange:
        if self.dense is None:
            if self.grace.privacy is not None:
                check_no_batch_norm(list(variables.values()))
            starting = digester(variables) if self._check_start and self.process_set.size() > 1 else None
            compressing = self.simulate or self.process_set.size() > 1
            exchange = exchange_of(self.grace, specs, self.process_set, average=self.average, starting=starting, compressing=compressing)
            per_example = self.grace.privacy is not None and self.grace.privacy.unit == "example"
            mention_host_copies(specs, list(variables.values()), exchange.transport.rank, EXAMPLES if per_example else GRADIENTS)
            exchange.driver.sparse = sparse
            if self._saved:
                exchange.driver.load_state_dict(self._saved)
            self._attach(exchange.driver)
            self.dense = exchange
        known = self.dense.driver.specs
        if {spec.name: spec for spec in specs} != known or sparse != self.dense.driver.sparse:
            differing = sorted({*(s.name for s in specs), *sparse} ^ {*known, *self.dense.driver.sparse})
            differing = differing or [s.name for s in specs if known.get(s.name) != s]
            raise NamesError(
                f"the variables with gradients differ from those of the first step, whose state is kept by name: "
                f"{', '.join(differing[:5])}; make a new optimizer for a changed model"
            )
        return self.dense

    def compare(self, variables: Sequence[Any]) -> None:
        """Compares these variables among the ranks, as Driver.compare does. Every rank calls it between steps, after the first."""
        if self.idle or self.process_set.size() == 1:
            return
        if self.dense is None:
            raise GraceError("ranks can compare their parameters only after the first step: nothing has been exchanged yet")
        digests = digests_of(dict(zip(names_of(variables), variables, strict=True)))
        perform(self.dense.driver.compare(digests), self.dense.transport, {})

    def _drivers(self) -> list[Driver]:
        return [self.dense.driver] if self.dense else []

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes that this rank handed to collectives in the last step, without those of sparse gradients."""
        return self.dense.driver.wire_bytes if self.dense else 0

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, as Driver.epsilon does; before the first step since a checkpoint was
        loaded, of those before it."""
        if self.dense is None:
            return self._fresh(self._saved).epsilon(delta)
        return self.dense.driver.epsilon(delta)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's memory, as Driver.state_dict does."""
        return self.dense.driver.state_dict() if self.dense else (self._saved or {})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes from this state. Before the first step it is kept until the variables are known. Raises GraceError, and changes nothing,
        if it does not fit. What `state_dict` returned before the first step is empty."""
        if self.dense:
            self.dense.driver.load_state_dict(saved)
        elif saved != {}:
            self._check(saved)
        self._saved = mapped(saved, np.copy)

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """Prepares for other ranks, after they have changed: the next call exchanges among the present ones. Collective. `carried_over`
        converts this rank's state of before (None if it had none) for them. Functions that were traced before then raise GraceError."""
        own = self.state_dict()
        if self.dense:
            self._sizes = {spec.name: spec.size for spec in self.dense.driver.specs.values()}
        self._saved = carried_over({**own, "sizes": self._sizes} if own.get("step") else None)
        if self.dense:
            self.dense.ended = True
        self.dense = None

    def _check(self, saved: dict[str, Any]) -> None:
        if self.dense:
            self.dense.driver.read_state(saved)
        else:
            self._fresh().read_state(saved)

    def _fresh(self, saved: Any = None) -> Driver:
        """Returns a driver without variables, in this state if there is one."""
        transport = HorovodTransport(self.process_set)
        driver = Driver(self.grace, transport.ops, transport, divisor=None if self.average else 1)
        if saved:
            driver.load_state_dict(saved)
        return driver

    def trackable(self) -> TrackedState:
        """Returns this memory in the form that tf.train.Checkpoint(memory=...) takes."""
        return TrackedState(self)

    def _saveable(self) -> Saveable:
        if self.idle:
            return nothing_saveable(self.process_set.included())
        return saveable_by(HorovodTransport(self.process_set), self.state_dict, self._check, self.load_state_dict)
