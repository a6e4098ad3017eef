"""TODO."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras
import tensorflow as tf

from ...composition.grace import Grace
from ...errors import UnsupportedError
from ..optimizers import check_optimizer
from .trackable import TrackedState

XLA = (
    "jit_compile=True: XLA cannot run Horovod's operations nor ours, so the exchange would be left out or fail to compile; "
    "use model.compile(..., jit_compile=False). (Keras's default 'auto' is turned off by hvd.callbacks.BroadcastGlobalVariablesCallback.)"
)


SCALING = (
    "this optimizer is inside of a LossScaleOptimizer, which leaves out the step of a rank whose own gradients are not finite: the other "
    "ranks would wait for it for ever. Put it inside: hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...). "
    "(model.compile makes one by itself under the policy 'mixed_float16', unless the optimizer is one.)"
)


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
    wrapped._track_trackable(TrackedState(wrapped._grace), "grace_ext")
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
