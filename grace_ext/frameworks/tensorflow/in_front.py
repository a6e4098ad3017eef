"""Puts the exchange in front of a Keras optimizer's `apply`, by a class that comes before the optimizer's own, and rejects settings under
which Keras would skip the exchange."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import tensorflow as tf

from ...composition.grace import Grace
from ...errors import UnsupportedError, warn_user
from ..optimizers import check_optimizer
from .trackable import TrackedState

if TYPE_CHECKING:  # in_front_of puts it before such a class, so type checkers may see one
    from keras.optimizers import Optimizer as KerasOptimizer
else:
    KerasOptimizer = object

XLA = (
    "jit_compile=True: XLA cannot run the operations of Horovod and grace_ext, so the exchange would be left out or fail to compile; "
    "use model.compile(..., jit_compile=False). (Keras's default 'auto' is turned off by hvd.callbacks.BroadcastGlobalVariablesCallback.)"
)

XLA_FUNCTION = (
    "tf.function(jit_compile=True): XLA cannot run the operations of Horovod and grace_ext; leave jit_compile out for the function that "
    "exchanges gradients (one that only computes them may have it)"
)


SCALING = (
    "this optimizer is inside a LossScaleOptimizer, which skips the step of a rank whose own gradients are not finite: the other ranks "
    "would wait for it for ever. Put the scaling inside: hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...). "
    "(Under the policy 'mixed_float16' model.compile puts one around an optimizer that is none.)"
)


NO_COPY = (
    "this {} exchanges gradients or models, and a copy of it would share its memory: copy the plain optimizer before you wrap it; to save "
    "it, use grace_ext.save or grace_state_dict()"
)


def check_keras_optimizer(chosen: Grace, optimizer: Any) -> None:
    """Raises UnsupportedError if this is no Keras 3 optimizer on TensorFlow, IncompatiblePartsError if the memory cannot work with it."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} is not a Keras 3 optimizer; for TF1-style optimizers use plain "
            "horovod.tensorflow with a DistributedGradientTape(compression=g.bind(variables))"
        )
    if keras.backend.backend() != "tensorflow":
        raise UnsupportedError(
            f"Keras runs on the {keras.backend.backend()!r} backend here, but this wrapper exchanges TensorFlow gradients. "
            + ("Use grace_ext.frameworks.torch" if keras.backend.backend() == "torch" else "Set KERAS_BACKEND=tensorflow")
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    check_optimizer(chosen, type(inner).__name__, vars(inner))
    if "_grace" in vars(optimizer) or "_grace" in vars(inner):
        raise UnsupportedError(
            f"this {type(optimizer).__name__} exchanges gradients or models already: it was wrapped before. Wrap an optimizer once, and "
            "make a new one for another model"
        )


def in_front_of(optimizer: Any, mixin: type, **attributes: Any) -> Any:
    """Returns an optimizer that shares everything with the given one: its variables, its learning rate, its exclusions, whatever was set
    on it. It also has these attributes, and its class inherits from this mixin before the optimizer's own class. (A copy made from
    get_config() would lack what no config holds.)"""
    # The module and name of the wrapped class are kept: Keras writes them into saved models.
    cls: Any = type(type(optimizer).__name__, (mixin, type(optimizer)), {"__module__": type(optimizer).__module__})
    wrapped = object.__new__(cls)
    object.__setattr__(wrapped, "__dict__", vars(optimizer))
    for name, value in attributes.items():  # past Keras's tracking: they are neither layers nor variables
        object.__setattr__(wrapped, name, value)
    wrapped._track_trackable(TrackedState(wrapped._grace), "grace_ext")
    return wrapped


class InFront(KerasOptimizer):
    """Is put in front of a Keras optimizer's class (see in_front_of). A subclass defines `_apply_exchanged`, a step."""

    _grace: Any
    built: bool

    @tf.autograph.experimental.do_not_convert
    def build(self, variables: Any) -> None:
        super().build(variables)
        if not self._grace.idle:
            refuse_xla(self)
            refuse_inside_scaling(self)

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        if not grads or self._grace.idle:
            return self._apply_wrapped(grads, trainable_variables)
        if trainable_variables is not None and not self.built:
            self.build(list(trainable_variables))
            self.built = True
        self._apply_exchanged(grads, self._trainable_variables if trainable_variables is None else list(trainable_variables))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # copy, deepcopy and pickle call it
        raise UnsupportedError(NO_COPY.format(type(self).__name__))

    def _apply_exchanged(self, grads: list[Any], variables: list[Any]) -> None:
        """Makes a step with this rank's gradients of these variables."""
        raise NotImplementedError

    def _apply_wrapped(self, grads: list[Any], variables: list[Any] | None) -> None:
        """Makes a step as the wrapped class does."""
        super().apply(grads, variables)


def refuse_inside_scaling(optimizer: Any) -> None:
    """Raises UnsupportedError if a LossScaleOptimizer has this optimizer inside. It builds this one, so it is found on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        outer = frame.f_locals.get("self")
        if isinstance(outer, keras.optimizers.LossScaleOptimizer) and getattr(outer, "inner_optimizer", None) is optimizer:
            raise UnsupportedError(SCALING)
        frame = frame.f_back


def refuse_xla(optimizer: Any = None) -> None:
    """Raises UnsupportedError if XLA would compile the training step that is being traced: a tf.function(jit_compile=True), or the step of
    a Keras model with this optimizer. Both are found on the stack, because an optimizer has no reference to them. Keras's own default,
    jit_compile='auto', is turned off earlier by the callbacks (see without_xla)."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, tf.types.experimental.PolymorphicFunction) and getattr(caller, "_jit_compile", None):
            raise UnsupportedError(XLA_FUNCTION)
        if optimizer is not None and isinstance(caller, keras.Model) and getattr(caller, "optimizer", None) is optimizer:
            if caller.jit_compile:
                raise UnsupportedError(XLA)
            return
        frame = frame.f_back


def without_xla(model: Any) -> None:
    """Turns jit_compile off, with a warning, if Keras's 'auto' chose True. Called before the training step is made."""
    exchanges = getattr(getattr(model, "optimizer", None), "_grace", None)
    wrapped = exchanges is not None and not exchanges.idle
    # compile() does not keep its argument. If "auto" would choose False, the user asked for True, which refuse_xla rejects later.
    if wrapped and model.jit_compile and model._resolve_auto_jit_compile():
        model.jit_compile = False
        warn_user("grace_ext turned Keras's jit_compile='auto' off: XLA cannot run the exchange. Pass jit_compile=False to silence this")
