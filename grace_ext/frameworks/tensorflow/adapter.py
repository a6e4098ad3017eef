"""Compresses under the unmodified `horovod.tensorflow.DistributedGradientTape`, for tf.Variables: `compression=g.bind(variables)`.

Horovod calls `compress(gradient)` and `decompress(reduced, ctx)` while it traces its reduction, for one tensor after the other, in the
order of the tape's sources, and more than once for the same tensor; TensorFlow prunes Horovod's own all-reduce in between from the graph,
because its result is not used. So each variable gets an exchange of its own, and a tensor is identified by its place among those of its
graph. Horovod passes no variables without a gradient and no sparse ones; they are recognised as skipped by the shapes that follow.

Gradients on a GPU are copied to the host, where they are compressed, and the results back (docs/tensorflow.md).

State is committed per step, not per variable: if one variable's gradients were not finite on some rank, the others' commits of that
step are rolled back before the next step begins.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from ...checkpoints.saveable import Saveable, saveable_by
from ...composition.grace import Grace
from ...driver.driver import Driver
from ...errors import GraceError, NamesError, UnboundError, UnsupportedError, shown
from ...exchange.perform import perform
from ...metrics.metrics import Measured
from ...parts.tensor import TensorSpec
from ...privacy.settings import refuse
from .exchanges import averages, is_alone, names_of
from .graph import GraphExchange, HorovodTransport, compare_start, digester
from .host_copies import mention_host_copies
from .loop import exchange_of


def bind(
    g: Grace, variables: Sequence[Any], *, op: Any, process_set: Any, simulate: bool, check_start: bool, **for_torch: Any
) -> BoundCompression:
    """Returns what Grace.bind returns for TensorFlow. Raises UnsupportedError or UnboundError if Horovod's tape cannot use it."""
    if any(not isinstance(v, tf.Variable) for v in variables):
        raise UnsupportedError(
            "bind takes only tf.Variables: Horovod's own tape and optimizer cannot use Keras 3 variables (its optimizer then reduces "
            "nothing, without an error). Use `import grace_ext.frameworks.tensorflow as hvd`"
        )
    together = [policy for policy in g.policies if policy.whole_model]
    if together:
        raise UnsupportedError(
            f"{together[0]} decides for all variables at once, but under Horovod's own tape each has an exchange of its own; use the tape "
            "or the DistributedOptimizer of grace_ext.frameworks.tensorflow"
        )
    refuse(g.privacy, "bind")
    if g.two_level:
        raise UnsupportedError(
            f"{g}: under Horovod's own tape every variable has an exchange of its own, which knows of no nodes; for 'hierarchical' use the "
            "tape or the DistributedOptimizer of grace_ext.frameworks.tensorflow"
        )
    if simulate:
        raise UnboundError(
            "simulate=True has no effect here: at world size 1 Horovod's tape never calls a compression object; use grace_ext's own tape"
        )
    if g.acts_alone and is_alone(process_set or hvd.global_process_set):
        raise UnboundError(
            f"at world size 1 Horovod's tape never calls a compression object, so {g} would have no effect, and a memory that is the "
            "momentum of the training would be missing; use grace_ext's own tape"
        )
    op = hvd.Average if op is None else op
    return BoundCompression(g, variables, averages(op), process_set or hvd.global_process_set, check_start)


class BoundCompression(Measured):
    """Compresses the gradients of one tape. Make it once, for the tape's sources in their order. It compares and hashes by identity."""

    def __init__(self, g: Grace, variables: Sequence[tf.Variable], average: bool, process_set: Any, check_start: bool):
        self.grace, self._average, self._process_set = g, average, process_set
        self._specs = [TensorSpec(n, tuple(v.shape), v.dtype.name) for n, v in zip(names_of(variables), variables, strict=True)]
        self._exchanges: dict[str, GraphExchange] = {}
        self._places: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
        self._settled = 0
        # Horovod keeps this object for ever, in a cache by `compression`, and TensorFlow its graphs. So it must not keep the variables, and
        # once they are gone, it drops what it has.
        self._variables, self._check_start = [weakref.ref(v, self._drop) for v in variables], check_start
        self._agreement: tuple[Driver, HorovodTransport] | None = None
        self._lock = threading.Lock()
        self._saved: dict[str, Any] = {}

    @tf.autograph.experimental.do_not_convert
    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Exchanges this gradient. Horovod calls it while it traces. Returns (zeros for Horovod to reduce, the aggregate as `ctx`)."""
        if is_alone(self._process_set):
            return tensor, None
        spec = self._spec_of(tensor)
        return tf.zeros([1], tensor.dtype), self._exchange(spec)([tensor])[0]

    @tf.autograph.experimental.do_not_convert
    def decompress(self, tensor: tf.Tensor, ctx: tf.Tensor | None) -> tf.Tensor:
        """Returns the aggregate, for Horovod, which calls it."""
        return tensor if ctx is None else ctx

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes that this rank handed to collectives in the last step."""
        return sum(exchange.driver.wire_bytes for exchange in self._exchanges.values())

    def _spec_of(self, tensor: tf.Tensor) -> TensorSpec:
        """Returns the variable that this gradient belongs to: the next one of its shape, in the order of this graph's tensors. Raises
        NamesError if there is none."""
        places = self._places.setdefault(tensor.graph, {})
        if tensor.name not in places:
            place = max(places.values(), default=-1) + 1
            while place < len(self._specs) and not self._fits(tensor, self._specs[place]):
                place += 1
            if place == len(self._specs):
                raise NamesError(
                    f"{tensor.name} {tensor.dtype.name}{tensor.shape} fits none of the bound variables that have no gradient yet: bind all "
                    "of the tape's sources, in their order, and make one bound object per tape"
                )
            places[tensor.name] = place
        return self._specs[places[tensor.name]]

    @staticmethod
    def _fits(tensor: tf.Tensor, spec: TensorSpec) -> bool:
        return tensor.dtype.name == spec.dtype and tensor.shape.is_compatible_with(spec.shape)

    def _exchange(self, spec: TensorSpec) -> GraphExchange:
        if self._agreement is None:
            with tf.init_scope():
                self._agreement = self._agree()
        if spec.name not in self._exchanges:
            exchange = exchange_of(self.grace, [spec], self._process_set, average=self._average, before_step=self._settle)
            exchange.driver.elements = sum(known.size for known in self._specs)
            exchange.driver.join_agreement(f"{self._agreement[0].prefix}/{self._specs.index(spec)}")
            self._attach(exchange.driver)
            if spec.name in self._saved:
                exchange.driver.load_state_dict(self._saved[spec.name])
            self._exchanges[spec.name] = exchange
        return self._exchanges[spec.name]

    def _drivers(self) -> list[Driver]:
        return [exchange.driver for exchange in self._exchanges.values()]

    def _agree(self) -> tuple[Driver, HorovodTransport]:
        """Makes the ranks agree, once for all variables."""
        transport = HorovodTransport(self._process_set)
        driver = Driver(self.grace, transport.ops, transport)
        driver.register(self._specs)
        known = [(spec, variable()) for spec, variable in zip(self._specs, self._variables, strict=True) if variable() is not None]
        mention_host_copies([spec for spec, _ in known], [variable for _, variable in known], transport.rank)
        if self._check_start:
            driver.starting, driver.tolerates_start = digester({spec.name: variable for spec, variable in known}), True
        perform(driver.agree(), transport, {})
        return driver, transport

    def _drop(self, _: Any) -> None:
        """Forgets everything, once no variable is left."""
        if any(variable() is not None for variable in self._variables):
            return
        for exchange in self._exchanges.values():
            vars(exchange).clear()
        self._exchanges, self._saved, self._agreement = {}, {}, None

    def _settle(self, step: int) -> None:
        """Rolls the last step back, for all variables, if any rank had a non-finite gradient in it. Called with the number of the step that
        begins, by each variable's exchange; the first call counts."""
        with self._lock:  # the other variables wait, so that none of them is trained before all were compared
            if step <= self._settled:
                return
            self._settled = step
            if self._agreement is not None and self._agreement[0].started_apart:
                compare_start(*self._agreement)
            drivers = [exchange.driver for exchange in self._exchanges.values() if exchange.driver.step == step]
            if not all(driver.committed for driver in drivers):
                for driver in drivers:
                    driver.roll_back()

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's memory, by variable. It differs by rank: save every rank's."""
        self._settle(max((exchange.driver.step for exchange in self._exchanges.values()), default=0))
        own = {name: exchange.driver.state_dict() for name, exchange in self._exchanges.items()}
        return {**self._saved, **own}  # what was loaded before the first step is this rank's, too

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resumes bit for bit. Before the first step the state is kept until the variables' exchanges are made. Raises GraceError if it
        does not fit."""
        self._check(saved)
        self._saved = dict(saved)
        for name, exchange in self._exchanges.items():
            if name in saved:
                exchange.driver.load_state_dict(saved[name])
        self._settled = max((int(state["step"]) for state in saved.values()), default=0)

    def _check(self, saved: dict[str, Any]) -> None:
        if not isinstance(saved, Mapping):
            raise GraceError(f"a state must be the dictionary that state_dict() returned, got {shown(saved, 80)}")
        unknown = set(saved) - {spec.name for spec in self._specs}
        if unknown:
            names = ", ".join(sorted(shown(name, 40) for name in unknown))
            raise GraceError(f"this state has variables that are not bound: {shown(names)[1:-1]}; bind those that it was saved for")
        if lacking := set(self._exchanges) - set(saved):
            raise GraceError(f"this state lacks variables that have a memory: {', '.join(sorted(lacking)[:5])}; it is not complete")
        transport = HorovodTransport(self._process_set)
        for name, state in saved.items():
            driver = Driver(self.grace, transport.ops, transport, divisor=None if self._average else 1)
            driver.register([spec for spec in self._specs if spec.name == name])
            driver.read_state(state)

    def _saveable(self) -> Saveable:
        return saveable_by(HorovodTransport(self._process_set), self.state_dict, self._check, self.load_state_dict)
