"""Defines `LocalSGD`: a Keras 3 optimizer that makes local steps, and from time to time exchanges how far the model has moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import horovod.tensorflow as api
import numpy as np
import tensorflow as tf

from ...checkpoints.saveable import Saveable, nothing_saveable
from ...errors import NamesError, UnsupportedError
from ...local.settings import Settings, settings_of
from ...local.worker import Worker
from ...parts.tensor import TensorSpec
from .exchanges import is_alone, names_of
from .graph import GraphExchange, HorovodTransport
from .host_copies import MODEL, mention_host_copies
from .in_front import InFront, check_keras_optimizer, in_front_of
from .loop import LoopExchange
from .ops import numpy_function
from .variables import variable_of

NOTHING, SYNCHRONIZE, REBASE = range(3)


def LocalSGD(  # noqa: N802 (the algorithm's name)
    optimizer: Any,
    compression: Any = None,
    *,
    every: int | None = None,
    schedule: Any = None,
    max_gap: int | None = None,
    asynchronous: bool = False,
    max_ahead: int = 1000,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    timeout: float = 300.0,
    process_set: Any = api.global_process_set,
    simulate: bool = False,
) -> _LocalSGD:
    """Returns a Keras 3 optimizer whose `apply` applies this rank's own gradients, and after some steps exchanges the models' drift: for
    `compile` and `fit`, and for custom loops.

    The algorithm and the options are those of grace_ext.frameworks.torch.LocalSGD. All ranks must start from the same model: build it
    before fit (an Input layer) and pass hvd.callbacks.BroadcastGlobalVariablesCallback(0). Each rank keeps its own values of all
    that is no trainable variable: BatchNorm's statistics, and the optimizer's momentum. Variables on a GPU are copied to the host and
    back at each synchronization, because drifts are compressed on the CPU.

    The result is of the same Keras class. Beyond Keras it has `sync()`, which every rank calls after fit (all have the same model then),
    `wire_bytes`, and `grace_state_dict()` / `load_grace_state_dict()`, which resume bit for bit with every rank's own model.
    """
    settings = settings_of(
        compression, every=every, schedule=schedule, max_gap=max_gap, asynchronous=asynchronous, max_ahead=max_ahead, outer_lr=outer_lr,
        outer_momentum=outer_momentum, timeout=timeout,
    )  # fmt: skip
    check_keras_optimizer(settings.grace, optimizer)
    if settings.diverges and hasattr(optimizer, "inner_optimizer"):
        raise UnsupportedError("cser would keep errors at one loss scale and undo them at another; train in bfloat16, without loss scaling")
    if getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False):
        raise UnsupportedError(
            "use_ema=True puts each rank's own averages into its model, at the end of fit or in between, so the ranks' models would "
            "diverge; average the model after LocalSGD has synchronized it, by a callback"
        )
    return in_front_of(optimizer, _LocalSGD, _grace=_Local(settings, process_set, simulate))


class _Local:
    """Makes the exchanges of one optimizer, as TensorFlow operations around a Worker."""

    def __init__(self, settings: Settings, process_set: Any, simulate: bool):
        self.settings, self._process_set = settings, process_set
        self.idle = not process_set.included() or (is_alone(process_set) and not simulate)
        transport = HorovodTransport(process_set)
        self.rank, self.worker = transport.rank, Worker(settings, transport.ops, transport)
        self._takes_part = process_set.included()
        self._by_gradients: list[GraphExchange] = []  # one for usual steps, with CSER one for its resets
        self._by_models: GraphExchange | None = None

    def begin(self, variables: Sequence[Any]) -> None:
        """Begins with these variables, before the first step, in eager code. Later calls raise NamesError if the variables differ."""
        specs = [
            TensorSpec(name, tuple(v.shape), tf.as_dtype(v.dtype).name) for name, v in zip(names_of(variables), variables, strict=True)
        ]
        known = self.worker.model.specs
        if known:
            if {spec.name: spec for spec in specs} != known:
                raise NamesError(f"the variables differ from those of the first step: {[s.name for s in specs][:5]}; make a new optimizer")
            return
        self.worker.begin(specs, _values(variables))
        mention_host_copies(specs, variables, self.rank, MODEL)
        by_gradients, by_models = self.worker.for_gradients, self.worker.for_models
        rehearsed = [0, self.settings.schedule.gap - 1] if self.settings.diverges else [0]
        self._by_gradients = [
            GraphExchange(by_gradients.grace, specs, self._process_set, average=True, driver=by_gradients, rehearsed=step)
            for step in rehearsed
        ]
        if not self.settings.asynchronous:
            as_loop = by_models.grace.route.changes and not by_models.grace.two_level
            exchange = LoopExchange if as_loop else GraphExchange
            self._by_models = exchange(by_models.grace, (), self._process_set, average=True, driver=by_models)

    def _saveable(self) -> Saveable:
        return nothing_saveable(self._takes_part) if self.idle else self.worker.saveable()

    # --- operations -------------------------------------------------------------------------------------------------
    def gradients(self, gradients: list[Any], variables: Sequence[Any], lr: Any) -> list[Any]:
        """Returns the gradients to apply: these, or in steps that exchange gradients their aggregates."""
        begun = tf.numpy_function(lambda: np.array([self.worker.begin_step(), self.settings.resets(self.worker.model.step)]), [], tf.bool)
        begun.set_shape([2])
        if not self.settings.by_gradients and not self.settings.schedule.start:
            return gradients
        if any(isinstance(g, tf.IndexedSlices) for g in gradients):
            raise UnsupportedError("sparse gradients (IndexedSlices) cannot be averaged in LocalSGD; apply tf.convert_to_tensor to them")
        own = [tf.zeros(v.shape, v.dtype) if g is None else tf.convert_to_tensor(g) for g, v in zip(gradients, variables, strict=True)]
        usual, *resets = self._by_gradients
        if resets:
            return list(tf.cond(begun[1], lambda: resets[0](own, lr), lambda: usual(own, lr)))
        return list(tf.cond(begun[0], lambda: usual(own, lr), lambda: [tf.identity(g) for g in own]))

    def end_step(self, variables: Sequence[Any]) -> None:
        """Ends a step, after the gradients were applied: synchronizes if it is due."""
        codes = {"": NOTHING, "synchronize": SYNCHRONIZE, "rebase": REBASE}
        what = tf.numpy_function(lambda: np.int32(codes[self.worker.model.advance()]), [], tf.int32)
        what.set_shape([])
        no = lambda: tf.constant(False)  # noqa: E731
        tf.cond(tf.equal(what, SYNCHRONIZE), lambda: self._synchronize(variables), no)
        if self.settings.schedule.start:
            tf.cond(tf.equal(what, REBASE), lambda: self._rebase(variables), no)

    def _synchronize(self, variables: Sequence[Any]) -> tf.Tensor:
        values = [_tensor(v) for v in variables]
        types = [tf.as_dtype(v.dtype) for v in variables]
        if self.settings.asynchronous:
            new = numpy_function(lambda *arrays: self._list(self.worker.post(self._by_name(arrays))), values, types)
        else:
            assert self._by_models is not None
            drifts = self.worker.model.drift_specs
            sent = numpy_function(self._outgoing, values, [tf.as_dtype(spec.dtype) for spec in drifts])
            for tensor, spec in zip(sent, drifts, strict=True):
                tensor.set_shape(spec.shape)
            new = numpy_function(self._incoming, self._by_models(sent), types)
        for variable, tensor in zip(variables, new, strict=True):
            tensor.set_shape(variable.shape)
            variable.assign(tensor)
        return tf.constant(True)

    def _rebase(self, variables: Sequence[Any]) -> tf.Tensor:
        def keep(*arrays: np.ndarray) -> np.bool_:
            self.worker.model.rebase(self._by_name(arrays))
            return np.bool_(True)

        return tf.numpy_function(keep, [_tensor(v) for v in variables], tf.bool)

    def _outgoing(self, *arrays: np.ndarray) -> list[Any]:
        self.worker.meet(self.worker.for_models)
        return self._list(self.worker.model.outgoing(self._by_name(arrays)))

    def _incoming(self, *means: np.ndarray) -> list[Any]:
        new = self.worker.model.incoming(self._by_name(means), self.worker.for_models.committed)
        assert new is not None  # None is only for memories that diverge, whose steps exchange gradients
        return self._list(new)

    def _by_name(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.worker.model.specs, arrays, strict=True))

    def _list(self, by_name: Mapping[str, Any]) -> list[Any]:
        return [by_name[name] for name in self.worker.model.specs]


class _LocalSGD(InFront):
    """Applies this rank's gradients as the wrapped class does, and synchronizes if it is due."""

    _grace: _Local

    def _apply_exchanged(self, grads: list[Any], variables: list[Any]) -> None:
        local = self._grace
        with tf.init_scope():  # once per trace, before the first step
            local.begin(variables)
        self._apply_wrapped(local.gradients(grads, variables, self.learning_rate), variables)
        local.end_step(variables)

    def sync(self) -> None:
        """Synchronizes now, in eager code: all ranks then have the same model. Every rank calls it, unless asynchronous after the same
        number of steps."""
        if self._grace.idle or not self._grace.worker.model.begun:
            return
        variables = self._trainable_variables
        new = self._grace.worker.sync(_values(variables))
        for variable, name in zip(variables, names_of(variables), strict=True):
            if new:
                variable.assign(new[name])

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes that this rank sent in the last step."""
        return self._grace.worker.wire_bytes

    def grace_state_dict(self) -> dict[str, Any]:
        """Returns this rank's master copy, memory and step, as numpy arrays by name. They differ by rank: save every rank's."""
        return self._grace.worker.state_dict()

    def load_grace_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes bit for bit on the same rank, with the model that was saved with it."""
        self._grace.worker.load_state_dict(saved)

    def _saveable(self) -> Saveable:
        return self._grace._saveable()


def _tensor(variable: Any) -> tf.Tensor:
    return tf.convert_to_tensor(variable_of(variable))


def _values(variables: Sequence[Any]) -> dict[str, np.ndarray]:
    """Returns the variables' values by name, in eager code."""
    return {name: _tensor(v).numpy() for name, v in zip(names_of(variables), variables, strict=True)}
