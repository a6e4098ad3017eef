"""Defines `DistributedOptimizer` for Keras 3 optimizers."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as api
import tensorflow as tf

from ...checkpoints.saveable import Saveable
from ...errors import UnsupportedError
from ...metrics.metrics import Metrics, Report
from ...privacy.settings import Privacy
from ..horovod import chosen_compression
from .exchanges import GradientExchange, divided, scaled
from .in_front import InFront, check_keras_optimizer, in_front_of
from .private import LOCAL, check_private_training


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
    check_start: bool = True,
    privacy: Privacy | None = None,
) -> _Distributed:
    """Returns a Keras 3 optimizer whose `apply` first exchanges the gradients of all ranks: for `compile` and `fit`, and for custom loops.
    It compresses on the CPU: gradients on a GPU are copied to the host and back at each exchange (docs/tensorflow.md).

    compression: a Grace, a spec string, None or hvd.Compression.none/.fp16. (Plain Horovod 0.28 reduces nothing under Keras 3, so these
      too go through grace_ext.)
    backward_passes_per_step: gradients of that many calls are added up (averaged with average_aggregated_gradients) and exchanged once.
      So are those of an optimizer with gradient_accumulation_steps, once per update (with a LossScaleOptimizer: at each call).
    op: Average or Sum. gradient_predivide_factor, num_groups, groups: accepted; sums are formed in float32 and gradients travel in buckets.
    sparse_as_dense: IndexedSlices are compressed as dense gradients; otherwise exchanged exactly, uncompressed.
    name, device_dense, device_sparse, use_locking: have no effect. simulate: compress at world size 1 too; without
      it a single rank sends nothing, but a memory that is the training's momentum keeps it, and votes stay votes.
    check_start: compares the bits of all ranks' variables at the first step and, if they differ there, again at the second; raises
      DisagreementError if they still do (usually because BroadcastGlobalVariablesCallback is missing).
    privacy: hvd.Privacy(...), which makes this rank's gradients private before they are compressed; or the spec has it in front. With
      unit 'example', `apply` takes what hvd.per_example_gradients returns. `grace_epsilon(delta)` says what was spent.
    The result is of the same Keras class: models saved with it load without grace_ext. Beyond Keras it has `wire_bytes`,
    `measure()`, `metrics()`, and for this rank's memory `grace_state_dict()` and `load_grace_state_dict()`.
    tf.train.Checkpoint(optimizer=...) also holds the memory of the rank that writes it; model.save and save_weights do not: see
    grace_ext.save.
    """
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if gradient_predivide_factor != 1.0 and op != api.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    chosen = chosen_compression(compression, api.Compression).with_privacy(privacy)
    check_keras_optimizer(chosen, optimizer)
    check_private_training(chosen.privacy, optimizer, backward_passes_per_step)
    return in_front_of(
        optimizer, _Distributed,
        _grace=GradientExchange(chosen, op, process_set, sparse_as_dense, simulate, check_start),
        _grace_passes=(backward_passes_per_step, average_aggregated_gradients),
        _grace_local=(set(), scale_local_gradients),
        _grace_accumulators=None,
    )  # fmt: skip


class _Distributed(InFront):
    """Exchanges the gradients, and applies the aggregates as the wrapped class does."""

    _grace: GradientExchange
    _grace_passes: tuple[int, bool]
    _grace_local: tuple[set[int], bool]
    _grace_accumulators: tuple[Any, list[Any]] | None
    _grace_present: list[Any]
    gradient_accumulation_steps: int | None

    def _apply_exchanged(self, grads: list[Any], variables: list[Any]) -> None:
        passes, average = self._grace_passes
        if self.gradient_accumulation_steps:
            if passes > 1:
                raise UnsupportedError(
                    f"backward_passes_per_step={passes} and the optimizer's own gradient_accumulation_steps="
                    f"{self.gradient_accumulation_steps} both accumulate gradients: leave one of them out"
                )
            present = [v for g, v in zip(grads, variables, strict=True) if g is not None]
            object.__setattr__(self, "_grace_present", present)  # for _clip_gradients, while Keras runs
            self._apply_wrapped(grads, variables)
        elif passes == 1:
            self._apply_wrapped(self._exchanged(grads, variables), variables)
        else:
            self._accumulate_and_apply(grads, variables, passes, average)

    @tf.autograph.experimental.do_not_convert
    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        """Exchanges accumulated gradients before they are clipped: Keras calls this once per update, when it has accumulated them."""
        if self.gradient_accumulation_steps and not self._grace.idle:
            grads = self._exchanged(list(grads), self._grace_present)
        return super()._clip_gradients(grads)

    def _exchanged(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        local, scale = self._grace_local
        shared = [i for i, v in enumerate(variables) if id(v) not in local]
        results = list(grads)
        if scale and len(shared) < len(grads):
            size = self._grace.process_set.size()
            results = [g if g is None or i in shared else divided(g, size) for i, g in enumerate(grads)]
        # A LossScaleOptimizer's gradients are compressed as if the loss were not scaled: a change of scale then leaves the memory right.
        loss_scale = getattr(self, "dynamic_scale", None)
        own = [_times(grads[i], loss_scale, -1) for i in shared]
        # A rank that skips a step alone, because of a gradient of its own, would drift apart.
        mine = [] if loss_scale is None else [i for i, g in enumerate(grads) if i not in shared and g is not None]
        exchanged = self._grace(own, [variables[i] for i in shared], self.learning_rate, beside=[results[i] for i in mine])
        for i, result in zip(shared, exchanged[: len(shared)], strict=True):
            results[i] = _times(result, loss_scale, 1)
        for i, result in zip(mine, exchanged[len(shared) :], strict=True):
            results[i] = result
        return results

    def _accumulate_and_apply(self, grads: list[Any], variables: list[Any], passes: int, average: bool) -> None:
        present = [i for i, g in enumerate(grads) if g is not None]
        accumulators = self._grace_accumulators
        if accumulators is None:
            with tf.init_scope():
                sums = [tf.Variable(tf.zeros(variables[i].shape, tf.as_dtype(grads[i].dtype)), trainable=False) for i in present]
                accumulators = (tf.Variable(0, trainable=False, dtype=tf.int64), sums)
                object.__setattr__(self, "_grace_accumulators", accumulators)
        count, sums = accumulators
        for total, i in zip(sums, present, strict=True):
            total.assign_add(tf.convert_to_tensor(grads[i]))
        count.assign_add(1)

        def exchange_and_apply() -> tf.Tensor:
            summed: list[Any] = [None] * len(grads)
            for total, i in zip(sums, present, strict=True):
                summed[i] = total / passes if average else total.read_value()
            self._apply_wrapped(self._exchanged(summed, variables), variables)
            for total in sums:
                total.assign(tf.zeros_like(total))
            count.assign(0)
            return tf.constant(True)

        tf.cond(tf.equal(count, passes), exchange_and_apply, lambda: tf.constant(False))

    def register_local_var(self, variable: Any) -> None:
        """Leaves the gradients of this variable out of the exchange (with scale_local_gradients they are divided by the world size, as in
        Horovod). Raises UnsupportedError with privacy."""
        if self._grace.grace.privacy is not None:
            raise UnsupportedError(LOCAL)
        self._grace_local[0].add(id(variable))

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes that this rank handed to collectives in the last step."""
        return self._grace.wire_bytes

    def grace_epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, those before a checkpoint included: what an observer of all messages and
        of the model learns about one unit (docs/privacy.md). (Keras optimizers have an `epsilon` that is something else.) Raises
        UnsupportedError without privacy."""
        return self._grace.epsilon(delta)

    def measure(self, every: int = 100, **options: Any) -> Metrics:
        """Turns metrics on, as Measured.measure does. (CompressionMetricsCallback does it for `fit`.)"""
        return self._grace.measure(every, **options)

    def metrics(self) -> Report:
        """Returns this rank's latest report; {} if `measure` was not called."""
        return self._grace.metrics()

    def grace_state_dict(self) -> dict[str, Any]:
        """Returns this rank's memory and compressor state, as numpy arrays by name. They differ by rank: save every rank's."""
        return self._grace.state_dict()

    def load_grace_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes bit for bit on the same rank."""
        self._grace.load_state_dict(saved)

    def _saveable(self) -> Saveable:
        return self._grace._saveable()


def _times(gradient: Any, scale: Any, sign: int) -> Any:
    """Multiplies (1) or divides (-1) the gradient by the loss scale, if there are both. For a power of two this is exact."""
    if gradient is None or scale is None:
        return gradient
    return scaled(gradient, tf.convert_to_tensor(scale.value) if sign > 0 else 1.0 / tf.convert_to_tensor(scale.value))
