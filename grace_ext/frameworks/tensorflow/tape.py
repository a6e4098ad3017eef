"""Defines `DistributedGradientTape`: a gradient tape that returns the aggregates of all ranks' gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import horovod.tensorflow as api
import keras
import tensorflow as tf

from ...composition.grace import Grace
from ...errors import UnsupportedError
from ...metrics.metrics import Metrics, Report
from ...privacy.settings import Privacy, check_protects_ranks
from ..horovod import chosen_compression
from .exchanges import GradientExchange, divided
from .private import LOCAL
from .variables import variable_of

# A tape lives for one step, but the memory must last. It belongs to the Grace that the user made once, and to the variables: an entry is
# dropped when one of them is no longer used anywhere.
_exchanges: dict[tuple[Any, ...], tuple[weakref.ref[Grace] | None, GradientExchange, list[Any]]] = {}

ANEW = (
    "a tape for these variables got another Grace than before, of the same spec ({}): a Grace made anew at each step loses its memory. "
    "Call grace_ext.grace(...) once, outside the step, and pass the same object"
)


def _chosen(compression: Any, privacy: Privacy | None) -> Grace:
    return chosen_compression(compression, api.Compression).with_privacy(privacy)


def _exchanges_for(
    compression: Any, privacy: Privacy | None, variables: Sequence[Any], settings: tuple[Any, ...], make: Any
) -> GradientExchange:
    """Returns the exchange of these variables with this Grace, which is made once. Raises UnsupportedError if the Grace was made anew."""
    g = _chosen(compression, privacy)
    key = (*(id(v) for v in variables), *settings, repr(g))
    known = _exchanges.get(key)
    if known is not None:
        owner, exchange, _ = known
        if (owner and owner()) is not (compression if isinstance(compression, Grace) else None):
            raise UnsupportedError(ANEW.format(g))
        return exchange
    owner = weakref.ref(compression) if isinstance(compression, Grace) else None
    exchange = make(g)
    _exchanges[key] = (owner, exchange, [weakref.ref(v, lambda _: _exchanges.pop(key, None)) for v in variables])
    return exchange


class _Tape:
    """Wraps a tf.GradientTape. What is not defined here is the tape's own."""

    def __init__(
        self, tape: tf.GradientTape, compression: Any, op: Any, process_set: Any, sparse_as_dense: bool, scale: bool, simulate: bool,
        metrics: Metrics | None, check_start: bool, privacy: Privacy | None,
    ):  # fmt: skip
        self._tape, self._compression = tape, compression
        self._op, self._process_set, self._sparse_as_dense = op, process_set, sparse_as_dense
        self._scale, self._simulate, self._metrics = scale, simulate, metrics
        self._check_start, self._privacy = check_start, privacy
        self._local: set[int] = set()
        self._calls: dict[tuple[int, ...], int] = {}  # how often `gradient` was called, by the sources

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def __enter__(self) -> _Tape:
        self._tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tape.__exit__(*error)

    def jacobian(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UnsupportedError: only gradients are exchanged."""
        raise UnsupportedError(
            "a distributed tape exchanges gradients only, and this would be each rank's own: ask the plain tf.GradientTape for it (and "
            "hvd.allreduce the result)"
        )

    batch_jacobian = jacobian

    def metrics(self) -> Report:
        """Returns this rank's latest report of the metrics that the tape was given; {} without any."""
        return self._metrics.report() if self._metrics else {}

    def register_local_source(self, source: Any) -> None:
        """Leaves the gradients of this variable to this rank (divided by the world size, with scale_local_gradients)."""
        if _chosen(self._compression, self._privacy).privacy is not None:
            raise UnsupportedError(LOCAL)
        self._local.add(id(source))

    @tf.autograph.experimental.do_not_convert
    def memory(self, sources: Any, call: int = 0) -> GradientExchange:
        """Returns the exchange that all tapes with this compression and these settings share for these variables: for grace_ext.save and
        load, and by its `trackable()` for tf.train.Checkpoint. It can be called before the first step.

        call: which of a persistent tape's calls of `gradient` for these sources it is (the first is 0): each has a memory of its own, as
          the gradients are of different losses."""
        check_protects_ranks(_chosen(self._compression, self._privacy).privacy, "DistributedGradientTape")
        settings = (call, str(self._op), id(self._process_set), self._sparse_as_dense, self._simulate, self._check_start)
        return _exchanges_for(
            self._compression,
            self._privacy,
            [v for v in tf.nest.flatten(sources) if id(v) not in self._local],
            settings,
            lambda g: GradientExchange(g, self._op, self._process_set, *settings[3:]),
        )

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        *,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Returns the tape's gradients, exchanged, in the structure of `sources` (tf.Variables or Keras 3 variables). Raises
        UnsupportedError for sources that are watched tensors: they differ by rank, and no memory can belong to them."""
        flat = tf.nest.flatten(sources)
        watched = [v for v in flat if not isinstance(v, (tf.Variable, keras.Variable))]
        if watched:
            raise UnsupportedError(
                f"{len(watched)} of the sources are no variables but {type(watched[0]).__name__}s: gradients of watched tensors are each "
                "rank's own. Ask the plain tf.GradientTape for them"
            )
        gradients = self._tape.gradient(target, [variable_of(v) for v in flat], output_gradients, unconnected_gradients)
        shared = [i for i, v in enumerate(flat) if id(v) not in self._local]
        key = tuple(id(v) for v in flat)
        exchange = self.memory(sources, self._calls.get(key, 0))
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._metrics is not None:
            exchange.measure_by(self._metrics)
        if not exchange.idle:
            if self._scale:
                size = self._process_set.size()
                gradients = [g if g is None or i in shared else divided(g, size) for i, g in enumerate(gradients)]
            for i, result in zip(shared, exchange([gradients[i] for i in shared], [flat[i] for i in shared]), strict=True):
                gradients[i] = result
        return tf.nest.pack_sequence_as(sources, gradients)


def DistributedGradientTape(  # noqa: N802 (Horovod's name)
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = None,
    sparse_as_dense: bool = False,
    op: Any = api.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = api.global_process_set,
    scale_local_gradients: bool = True,
    *,
    simulate: bool = False,
    metrics: Metrics | None = None,
    check_start: bool = True,
    privacy: Privacy | None = None,
) -> Any:
    """Returns a tape whose `gradient` gives the aggregate of all ranks; for tf.Variables and Keras 3 variables, in eager code and in
    tf.function. It compresses on the CPU: gradients on a GPU are copied to the host and back (docs/tensorflow.md).

    compression: a Grace, made once outside the step (its memory is kept for it and the variables; one made anew at each step is rejected),
    a spec string, None or hvd.Compression. metrics: a grace_ext.metrics.Metrics, made once, too. privacy: hvd.Privacy(...) of unit
    'rank'; `tape.memory(variables).epsilon(delta)` says what was spent. The other arguments: as for DistributedOptimizer.
    """
    if gradient_predivide_factor != 1.0 and op != api.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    return _Tape(gradtape, compression, op, process_set, sparse_as_dense, scale_local_gradients, simulate, metrics, check_start, privacy)


def PartialDistributedGradientTape(gradtape: tf.GradientTape, *args: Any, local_layers: Any = None, **options: Any) -> Any:  # noqa: N802
    """Returns a DistributedGradientTape that leaves the gradients of the trainable weights of `local_layers` to their rank."""
    tape = DistributedGradientTape(gradtape, *args, **options)
    layers = [] if local_layers is None else local_layers if isinstance(local_layers, (list, tuple, set)) else [local_layers]
    for layer in layers:
        for variable in layer.trainable_weights:
            tape.register_local_source(variable)
    return tape
