"""Checks that what TensorFlow's wrappers exchange can be made private, and computes per-example gradients. The driver adds the noise."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from ...errors import ParameterError, UnsupportedError
from ...privacy import settings
from ...privacy.settings import Privacy
from .variables import variable_of

LOSS_SCALE = (
    "a LossScaleOptimizer cannot be used with privacy: a gradient that is not finite counts as 0, because a skipped step would tell about "
    "one example, so the scale would never fall. Train in bfloat16 (keras.mixed_precision 'mixed_bfloat16'), which needs no scale"
)
LOCAL = (
    "variables of one rank alone cannot be used with privacy: they would learn from this rank's gradients without noise. Let all variables "
    "be exchanged, or freeze these (trainable=False)"
)
BATCH_NORM = settings.BATCH_NORM + ("Use keras.layers.GroupNormalization or LayerNormalization, or set trainable=False for these layers")
SPARSE = (
    "the gradient of {!r} is sparse (IndexedSlices), and which rows it has tells about the examples, whatever noise is on them: pass "
    "sparse_as_dense=True"
)
EXAMPLES = (
    "unit='example' needs the gradients of each example, with one dimension more in front, and the gradient of {!r}, whose shape is {}, "
    "has shape {}: pass what hvd.per_example_gradients(loss, variables, inputs, targets) returns to optimizer.apply(gradients, variables), "
    "in a training step of your own (a Keras model's own train_step adds the examples up)"
)
PASSES = (
    "gradients of several calls cannot be added up with unit='example' ({}): pass the examples of all of them at once to "
    "hvd.per_example_gradients, whose result is one batch, with one draw of noise"
)


def check_private_training(privacy: Privacy | None, optimizer: Any, passes: int) -> None:
    """Raises UnsupportedError if private gradients cannot be what this Keras optimizer gets, or would be used wrongly."""
    if privacy is None:
        return
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UnsupportedError(LOSS_SCALE)
    if privacy.unit == "example":
        if passes > 1:
            raise UnsupportedError(PASSES.format(f"backward_passes_per_step={passes}"))
        if optimizer.gradient_accumulation_steps:
            raise UnsupportedError(PASSES.format(f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}"))


def check_gradients(privacy: Privacy, gradients: Sequence[Any], variables: Sequence[Any], names: Sequence[str], as_dense: bool) -> None:
    """Raises UnsupportedError if one of these gradients (None stands for none) cannot be made private."""
    for gradient, variable, name in zip(gradients, variables, names, strict=True):
        if isinstance(gradient, tf.IndexedSlices) and not (as_dense and privacy.unit == "rank"):
            raise UnsupportedError(SPARSE.format(name))
        if privacy.unit == "example" and gradient is not None and len(gradient.shape) != len(variable.shape) + 1:
            raise UnsupportedError(EXAMPLES.format(name, tuple(variable.shape), tuple(gradient.shape)))


def check_no_batch_norm(variables: Sequence[Any]) -> None:
    """Raises UnsupportedError if a living Keras layer or model that holds one of these variables has batch normalization that is trained.
    Searches all objects of the process, so call it once."""
    mine = {id(variable_of(v)) for v in variables}
    found: dict[int, str] = {}
    for layer in [each for each in gc.get_objects() if issubclass(type(each), keras.layers.Layer)]:
        if any(id(variable_of(v)) in mine for v in layer.variables):
            for part in layer._flatten_layers():
                if isinstance(part, keras.layers.BatchNormalization) and part.trainable:
                    found[id(part)] = part.name
    if found:
        raise UnsupportedError(BATCH_NORM.format(len(found), next(iter(found.values()))))


def per_example_gradients(loss: Callable[..., Any], variables: Sequence[Any], *batch: Any) -> list[Any]:
    """Returns each example's own gradients, which `DistributedOptimizer(privacy=Privacy(unit='example', ...))` takes: for every variable a
    tensor of its shape with one dimension more in front, which counts the examples. It works by tf.vectorized_map, in eager code and in
    tf.function.

    loss: takes one batch of one example (a tensor for each of `batch`, whose first dimension is 1), and returns a scalar.
    variables: tf.Variables or Keras variables. One that the loss does not use counts as 0.
    batch: tensors whose first dimension counts the examples; there may be none. Give them with tf.function an input_signature of shape
      [None, ...], since a batch that is drawn by privacy.sample has another size at each step.
    Raises ParameterError if the tensors of the batch are of different numbers of examples, or there are none.
    """
    tensors = [tf.convert_to_tensor(x) for x in batch]
    counts = {x.shape[0] for x in tensors if x.shape.rank} - {None}
    if not tensors or any(x.shape.rank == 0 for x in tensors) or len(counts) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ParameterError(f"per_example_gradients needs tensors whose first dimension counts the same examples, got shapes ({shapes})")
    inner = [variable_of(v) for v in variables]

    def of_one(example: list[tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inner)
            value = loss(*[x[None] for x in example])
        gradients = tape.gradient(value, inner, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    def of_none() -> list[tf.Tensor]:  # tf.vectorized_map needs an example
        return [tf.zeros([0, *v.shape], v.dtype) for v in inner]

    return list(tf.cond(tf.shape(tensors[0])[0] > 0, lambda: list(tf.vectorized_map(of_one, tensors)), of_none))
