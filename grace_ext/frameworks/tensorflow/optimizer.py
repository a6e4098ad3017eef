"""`DistributedOptimizer` for Keras 3 optimizers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as api
import keras
import numpy as np
import tensorflow as tf

from ...agreement import digest_of
from ...checkpoint import Kept, kept_by, nothing_kept
from ...composition.composition import Grace
from ...composition.making import grace
from ...driver import Driver
from ...errors import GraceError, NamesError, ParameterError, UnsupportedError
from ...exchange.perform import perform
from ...metrics import Measured, Metrics, Report
from ...parts.tensor import TensorSpec
from ..optimizers import check_optimizer
from .graph import GraphExchange, HorovodTransport
from .loop import exchange_of
from .trackable import Memory

XLA = (
    "jit_compile=True: XLA cannot run Horovod's operations nor ours, so the exchange would be left out or fail to compile; "
    "use model.compile(..., jit_compile=False). (Keras's default 'auto' is turned off by hvd.callbacks.BroadcastGlobalVariablesCallback.)"
)


SCALING = (
    "this optimizer is inside of a LossScaleOptimizer, which leaves out the step of a rank whose own gradients are not finite: the other "
    "ranks would wait for it for ever. Put it inside: hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...). "
    "(model.compile makes one by itself under the policy 'mixed_float16', unless the optimizer is one.)"
)


def chosen_compression(compression: Any) -> Grace | None:
    """The Grace to use; None where the user gave one of Horovod's own compressions other than none."""
    if isinstance(compression, Grace):
        return compression
    if isinstance(compression, str):
        return grace(compression)
    if compression in (None, api.Compression.none):
        return grace("none")
    if compression is api.Compression.fp16:
        return grace("fp16")
    raise ParameterError(
        f"compression must be grace_ext.grace(...), a spec string, None or hvd.Compression.none/.fp16, got {compression!r}"
    )


def averages(op: Any) -> bool:
    """Whether `op` is the mean; raises UnsupportedError for what is neither mean nor sum."""
    if op in (api.Average, api.Sum):
        return op == api.Average
    raise UnsupportedError(
        "compressed gradients can be averaged or added up only (Adasum combines parameter updates by their angles); use op=hvd.Average"
    )


def names_of(variables: Sequence[Any]) -> list[str]:
    """A name for each variable, the same on all ranks: its path or name, with a number where several share one."""
    names: list[str] = []
    for variable in variables:
        name = getattr(variable, "path", None) or variable.name
        count = sum(known == name or known.startswith(name + "#") for known in names)
        names.append(f"{name}#{count + 1}" if count else name)
    return names


def exchange_sparse(gradient: tf.IndexedSlices, name: str, op: Any, process_set: Any) -> tf.IndexedSlices:
    """A sparse gradient, exchanged exactly and uncompressed, as Horovod does."""
    return api.allreduce(gradient, op=op, name=f"grace/sparse/{name}", process_set=process_set, ignore_name_scope=True)


class Exchanges(Measured):
    """The exchange of one optimizer or tape: made at the first call, when the variables and their gradients' kinds are known."""

    def __init__(self, g: Grace, op: Any, process_set: Any, sparse_as_dense: bool, simulate: bool):
        self.grace, self.op, self.process_set = g, op, process_set
        self.average, self.sparse_as_dense, self.simulate = averages(op), sparse_as_dense, simulate
        self.dense: GraphExchange | None = None
        self._saved: Any = None
        self._sizes: dict[str, int] = {}  # of the variables, where they were known before the ranks changed

    @property
    def idle(self) -> bool:
        """Nothing to exchange on this rank."""
        return not self.process_set.included() or (self.process_set.size() == 1 and not self.simulate)

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], lr: Any = None) -> list[Any]:
        """The aggregates of the gradients; None stays None."""
        results, dense = list(gradients), []
        for place, (gradient, name) in enumerate(zip(gradients, names_of(variables), strict=True)):
            if isinstance(gradient, tf.IndexedSlices) and not self.sparse_as_dense:
                results[place] = exchange_sparse(gradient, name, self.op, self.process_set)
            elif gradient is not None:
                dense.append((place, name, tf.convert_to_tensor(gradient)))
        if dense:
            specs = [TensorSpec(name, tuple(variables[place].shape), tensor.dtype.name) for place, name, tensor in dense]
            exchange = self._exchange(specs)
            for (place, _, _), result in zip(dense, exchange([tensor for _, _, tensor in dense], lr), strict=True):
                results[place] = result
        return results

    def _exchange(self, specs: list[TensorSpec]) -> GraphExchange:
        if self.dense is None:
            self.dense = exchange_of(self.grace, specs, self.process_set, average=self.average)
            self._attach(self.dense.driver)
            if self._saved:
                self.dense.driver.load_state_dict(self._saved)
        known = self.dense.driver.specs
        if {spec.name: spec for spec in specs} != known:
            differing = sorted({s.name for s in specs} ^ set(known)) or [s.name for s in specs if known[s.name] != s]
            raise NamesError(
                f"the variables with gradients are not those of the first step (state is kept by name): {', '.join(differing[:5])}; "
                "make a new optimizer for a changed model"
            )
        return self.dense

    def compare(self, variables: Sequence[Any]) -> None:
        """See Driver.compare; of these variables. Every rank calls it between steps, after the first."""
        if self.idle or self.process_set.size() == 1:
            return
        if self.dense is None:
            raise GraceError("ranks compare their parameters after the first step: nothing has been exchanged yet")
        arrays = [np.asarray(v.numpy()) for v in variables]
        digests = {name: digest_of(array) for name, array in zip(names_of(variables), arrays, strict=True)}
        perform(self.dense.driver.compare(digests), self.dense.transport, {})

    def _drivers(self) -> list[Driver]:
        return [self.dense.driver] if self.dense else []

    @property
    def wire_bytes(self) -> int:
        """Bytes this rank handed to collectives in the last step, sparse gradients excluded."""
        return self.dense.driver.wire_bytes if self.dense else 0

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory: see Driver.state_dict."""
        return self.dense.driver.state_dict() if self.dense else (self._saved or {})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes; before the first step it is kept until the variables are known."""
        if self.dense:
            self.dense.driver.load_state_dict(saved)
        elif saved:
            self._check(saved)
        self._saved = saved

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """After the ranks have changed: the next call exchanges among those that there are now. `carried_over` gives this rank's state for
        them from that of before (None on a rank that had none); collective. Functions that were traced before are of no use any more."""
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
            transport = HorovodTransport(self.process_set)
            Driver(self.grace, transport.ops, transport).read_state(saved)

    def trackable(self) -> Memory:
        """For tf.train.Checkpoint(memory=...)."""
        return Memory(self)

    def _kept(self) -> Kept:
        if self.idle:
            return nothing_kept(self.process_set.included())
        return kept_by(HorovodTransport(self.process_set), self.state_dict, self._check, self.load_state_dict)


def DistributedOptimizer(  # noqa: N802 (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = api.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = api.global_process_set,
    scale_local_gradients: bool = True,
    *,
    simulate: bool = False,
) -> Any:
    """A Keras 3 optimizer whose `apply` exchanges the gradients of all ranks first: for `compile` and `fit`, and for custom loops.

    compression: a Grace, a spec string, None or hvd.Compression.none/.fp16. (Plain Horovod 0.28 reduces nothing under Keras 3, so these
      too go through grace_ext.)
    backward_passes_per_step: gradients of that many calls are added up (averaged with average_aggregated_gradients) and exchanged once.
    op: Average or Sum. gradient_predivide_factor, num_groups, groups: accepted; sums are formed in float32 and gradients travel in buckets.
    sparse_as_dense: IndexedSlices are compressed as dense gradients; otherwise exchanged exactly, uncompressed.
    device_dense, device_sparse, use_locking: have no effect. simulate: compress at world size 1 too.
    The result is of the same Keras class: models saved with it load without grace_ext. Beyond Keras it has `wire_bytes` and
    `grace_state_dict()` / `load_grace_state_dict()`, this rank's memory. tf.train.Checkpoint(optimizer=...) holds that memory, too, of the
    rank that writes it; model.save and save_weights do not: see grace_ext.save.
    """
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if gradient_predivide_factor != 1.0 and op != api.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    chosen = chosen_compression(compression)
    check_keras_optimizer(chosen, optimizer)
    return in_front_of(
        optimizer, _Distributed,
        _grace=Exchanges(chosen, op, process_set, sparse_as_dense, simulate),
        _grace_passes=(backward_passes_per_step, average_aggregated_gradients),
        _grace_local=(set(), scale_local_gradients),
        _grace_accumulators=None,
    )  # fmt: skip


def check_keras_optimizer(chosen: Grace, optimizer: Any) -> None:
    """Raises where this is no Keras 3 optimizer on TensorFlow, or one that the memory cannot work with."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} is not a Keras 3 optimizer; for TF1-style optimizers use plain "
            "horovod.tensorflow with a DistributedGradientTape(compression=g.bind(variables))"
        )
    if keras.backend.backend() != "tensorflow":
        raise UnsupportedError(
            f"Keras runs on the {keras.backend.backend()!r} backend here; this wrapper exchanges TensorFlow gradients. "
            + ("Use grace_ext.frameworks.torch" if keras.backend.backend() == "torch" else "Set KERAS_BACKEND=tensorflow")
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    check_optimizer(chosen, type(inner).__name__, vars(inner))


def in_front_of(optimizer: Any, mixin: type, **attributes: Any) -> Any:
    """A copy of the optimizer whose class has this one in front of its own, and these attributes."""
    # The module and name of the wrapped class are kept: Keras writes them into saved models.
    cls = type(type(optimizer).__name__, (mixin, type(optimizer)), {"__module__": type(optimizer).__module__})
    wrapped = cls.from_config(optimizer.get_config())
    for name, value in attributes.items():  # outside of Keras's tracking: neither a layer nor a variable
        object.__setattr__(wrapped, name, value)
    wrapped._track_trackable(Memory(wrapped._grace), "grace_ext")
    if optimizer.built:
        wrapped.build(list(optimizer._trainable_variables))
        for new, old in zip(wrapped.variables, optimizer.variables, strict=True):
            new.assign(old)
    return wrapped


class InFront:
    """What is put in front of a Keras optimizer's class; a subclass says what a step of it is."""

    _grace: Any

    @tf.autograph.experimental.do_not_convert
    def build(self, variables: Any) -> None:
        super().build(variables)  # type: ignore[misc]
        if not self._grace.idle:
            refuse_xla(self)
            refuse_inside_scaling(self)

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        if not grads or self._grace.idle:
            return self._apply_wrapped(grads, trainable_variables)
        if trainable_variables is not None and not self.built:  # type: ignore[has-type]
            self.build(list(trainable_variables))
            self.built = True
        self._apply_exchanged(grads, self._trainable_variables if trainable_variables is None else list(trainable_variables))

    def _apply_exchanged(self, grads: list[Any], variables: list[Any]) -> None:
        """A step with this rank's gradients of these variables."""
        raise NotImplementedError

    def _apply_wrapped(self, grads: list[Any], variables: list[Any] | None) -> None:
        """A step as the wrapped class makes it."""
        super().apply(grads, variables)  # type: ignore[misc]


class _Distributed(InFront):
    """Exchanges the gradients, and applies the aggregates as the wrapped class does."""

    _grace: Exchanges

    def _apply_exchanged(self, grads: list[Any], variables: list[Any]) -> None:
        passes, average = self._grace_passes
        if passes == 1:
            self._apply_wrapped(self._exchanged(grads, variables), variables)
        else:
            self._accumulate_and_apply(grads, variables, passes, average)

    def _exchanged(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        local, scale = self._grace_local
        shared = [i for i, v in enumerate(variables) if id(v) not in local]
        results = list(grads)
        if scale and len(shared) < len(grads):
            results = [g if g is None or i in shared else g / self._grace.process_set.size() for i, g in enumerate(grads)]
        # Of a LossScaleOptimizer: compressed as if the loss were not scaled, so that a change of scale does not change the memory.
        scale = getattr(self, "dynamic_scale", None)
        own = [_times(grads[i], scale, -1) for i in shared]
        exchanged = self._grace(own, [variables[i] for i in shared], self.learning_rate)
        for i, result in zip(shared, exchanged, strict=True):
            results[i] = _times(result, scale, 1)
        return results

    def _accumulate_and_apply(self, grads: list[Any], variables: list[Any], passes: int, average: bool) -> None:
        present = [i for i, g in enumerate(grads) if g is not None]
        if self._grace_accumulators is None:
            with tf.init_scope():
                sums = [tf.Variable(tf.zeros(variables[i].shape, tf.as_dtype(grads[i].dtype)), trainable=False) for i in present]
                object.__setattr__(self, "_grace_accumulators", (tf.Variable(0, trainable=False, dtype=tf.int64), sums))
        count, sums = self._grace_accumulators
        for total, i in zip(sums, present, strict=True):
            total.assign_add(tf.convert_to_tensor(grads[i]))
        count.assign_add(1)

        def exchange_and_apply() -> None:
            summed: list[Any] = [None] * len(grads)
            for total, i in zip(sums, present, strict=True):
                summed[i] = total / passes if average else total.read_value()
            self._apply_wrapped(self._exchanged(summed, variables), variables)
            for total in sums:
                total.assign(tf.zeros_like(total))
            count.assign(0)

        tf.cond(tf.equal(count, passes), lambda: (exchange_and_apply(), tf.constant(True))[1], lambda: tf.constant(False))

    def register_local_var(self, variable: Any) -> None:
        """Gradients of this variable are not exchanged (with scale_local_gradients they are divided by the world size, as in Horovod)."""
        self._grace_local[0].add(id(variable))

    @property
    def wire_bytes(self) -> int:
        """Bytes this rank handed to collectives in the last step."""
        return self._grace.wire_bytes

    def measure(self, every: int = 100, **options: Any) -> Metrics:
        """Turns metrics on, as Measured.measure. (CompressionMetricsCallback does it for `fit`.)"""
        return self._grace.measure(every, **options)

    def metrics(self) -> Report:
        """This rank's latest report; {} where `measure` was not called."""
        return self._grace.metrics()

    def grace_state_dict(self) -> dict[str, Any]:
        """This rank's memory and compressor state, as numpy arrays by name. It differs by rank: save every rank's."""
        return self._grace.state_dict()

    def load_grace_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes bit for bit on the same rank."""
        self._grace.load_state_dict(saved)

    def _kept(self) -> Kept:
        return self._grace._kept()


def check_agreement(optimizer: Any, model: Any = None) -> None:
    """Raises DisagreementError on every rank alike, naming ranks and variables, where the ranks' specs, variables' names, shapes, versions
    or steps differ, or the bits of the variables: those that this DistributedOptimizer trains, or with `model` all of the model's
    (moving averages of BatchNormalization are each rank's own).

    Every rank of its process set calls it between steps, after the first (else GraceError), outside of tf.function. It waits for the
    slowest, reads every variable once and gathers some 30 bytes for each. At world size 1 it does nothing. For `fit`, see
    callbacks.AgreementCallback."""
    if not isinstance(optimizer, _Distributed):
        raise UnsupportedError(f"check_agreement takes grace_ext's DistributedOptimizer, not {type(optimizer).__name__}")
    optimizer._grace.compare(optimizer._trainable_variables if model is None else model.variables)  # type: ignore[attr-defined]


def _times(gradient: Any, scale: Any, sign: int) -> Any:
    """The gradient multiplied (1) or divided (-1) by the scale of the loss, where there are both. By a power of two it is exact."""
    if gradient is None or scale is None:
        return gradient
    factor = tf.convert_to_tensor(scale.value) if sign > 0 else 1.0 / tf.convert_to_tensor(scale.value)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * tf.cast(factor, gradient.values.dtype), gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def refuse_inside_scaling(optimizer: Any) -> None:
    """Raises where this optimizer is the inner one of a LossScaleOptimizer, which is found on the stack: it builds the inner one."""
    frame = inspect.currentframe()
    while frame is not None:
        outer = frame.f_locals.get("self")
        if isinstance(outer, keras.optimizers.LossScaleOptimizer) and getattr(outer, "inner_optimizer", None) is optimizer:
            raise UnsupportedError(SCALING)
        frame = frame.f_back


def refuse_xla(optimizer: Any) -> None:
    """Raises where the training step that is being traced would be compiled by XLA. The model is found on the stack: an optimizer is not
    told about it. Keras's own default, jit_compile='auto', is turned off earlier, by the callbacks (see `without_xla`)."""
    frame = inspect.currentframe()
    while frame is not None:
        model = frame.f_locals.get("self")
        if isinstance(model, keras.Model) and getattr(model, "optimizer", None) is optimizer:
            if model.jit_compile:
                raise UnsupportedError(XLA)
            return
        frame = frame.f_back


def without_xla(model: Any) -> None:
    """Before the training step is made: turns jit_compile='auto' off, with a notice, where it came to True."""
    exchanges = getattr(getattr(model, "optimizer", None), "_grace", None)
    wrapped = exchanges is not None and not exchanges.idle
    # compile() keeps no trace of what was said; True was asked for where "auto" would have said no, and is refused later.
    if wrapped and model.jit_compile and model._resolve_auto_jit_compile():
        model.jit_compile = False
        warnings.warn(
            "grace_ext turned Keras's jit_compile='auto' off: XLA cannot run the exchange. Pass jit_compile=False to silence this",
            stacklevel=4,
        )
