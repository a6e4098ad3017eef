"""LocalSGDCluster runs N ranks of local-update training in one process, for tests, simulation and study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays import libraries
from ..driver.driver import Driver
from ..errors import DisagreementError, NamesError, ParameterError, shown
from ..exchange.lockstep import LockstepTransport, run_lockstep
from ..exchange.transport import Transport
from ..parts.tensor import TensorSpec
from .connection import Entry
from .messages import Messages
from .model import LocalModel
from .settings import settings_of


class LocalSGDCluster:
    """Simulates `size` ranks, each with a model of its own. In every step:

        gradients = cluster.gradients(gradients, lr)     # by rank: what its optimizer has to apply
        models = ...                                     # each rank's own optimizer step
        models = cluster.step(models)                    # by rank: the new model after a synchronization, else the model that was given

    compression: a Grace or a spec string. framework: as in LocalCluster. The other options: as in `LocalSGD` of the frameworks. In an
    asynchronous cluster `every` and `schedule` may be lists with one entry per rank, and `tick(models, ranks)` makes a step of these ranks
    only, so that ranks can differ in speed. All ranks that are due in a tick send before any of them receives.
    """

    def __init__(
        self,
        compression: Any,
        size: int,
        framework: str = "numpy",
        *,
        every: Any = None,
        schedule: Any = None,
        asynchronous: bool = False,
        **options: Any,
    ):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ParameterError(f"size must be a whole number, at least 1, got {shown(size)}")
        if not asynchronous and isinstance(every, (list, tuple)):
            raise ParameterError("every= by rank needs asynchronous=True; synchronous ranks have one schedule")
        self.size, self.ops = size, libraries.ops_for_framework(framework)
        self._lr: float | None = None
        own: list[dict[str, Any]] = [{"every": every, "schedule": schedule}] * size
        if asynchronous:
            by_rank = [_by_rank(each, size) for each in (every, schedule)]
            own = [{"every": one, "schedule": other} for one, other in zip(*by_rank, strict=True)]
        self.models = [LocalModel(settings_of(compression, asynchronous=asynchronous, **each, **options), self.ops) for each in own]
        self.settings = self.models[0].settings
        self._messages = [Messages(model, rank, size) for rank, model in enumerate(self.models)] if asynchronous else []
        slots: list[Transport] = [LockstepTransport(rank, size, self.ops, 1) for rank in range(size)]
        self.for_gradients = [
            Driver(self.settings.for_gradients, self.ops, slot, read_lr=lambda: self._lr, diverging=True) for slot in slots
        ]
        self.for_models = [m.driver for m in self._messages] or [Driver(self.settings.for_models, self.ops, slot) for slot in slots]
        self._log: list[Entry] = []
        self._had = [0] * size
        #: Bytes that each rank handed to collectives in the last step (asynchronous: bytes of its message).
        self.wire_bytes = [0] * size

    def start(self, models: Sequence[Mapping[str, Any]]) -> None:
        """Takes the models before the first step, by rank. Raises DisagreementError if they differ."""
        for rank, (model, values) in enumerate(zip(self.models, models, strict=True)):
            specs = [TensorSpec(name, *self.ops.describe(tensor)) for name, tensor in values.items()]
            model.begin(specs, values)
            self.for_gradients[rank].register(specs)
            self.for_models[rank].register(model.drift_specs)
        if len({model.digest() for model in self.models}) > 1:
            raise DisagreementError("the ranks start from different models", [{"model": model.digest()} for model in self.models])

    def gradients(self, gradients: Sequence[Mapping[str, Any]], lr: float | None = None) -> list[Mapping[str, Any]]:
        """Returns what each rank's optimizer has to apply in the coming step: the mean, if gradients are averaged (post_local's first
        steps), the result of CSER, or else each rank's own gradients."""
        self.wire_bytes = [0] * self.size
        if not self.models[0].exchanges_gradients():
            return list(gradients)
        self._lr = lr
        return self._exchange(self.for_gradients, gradients)

    def step(self, models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Ends a step, after every rank's local step; returns the models to go on with. `gradients` must have been called before it."""
        return self.tick(models, range(self.size))

    def tick(self, models: Sequence[Mapping[str, Any]], ranks: Sequence[int]) -> list[Mapping[str, Any]]:
        """Does as `step`, after a local step of these ranks only (asynchronous)."""
        if len(models) != self.size:
            raise ParameterError(f"a step needs one model for each of the {self.size} ranks, got {len(models)}")
        for model, values in zip(self.models, models, strict=True):
            if set(values) != set(model.specs):
                raise NamesError(
                    f"a model has parameters {shown(list(values))}; it must have those that it started with: {shown(list(model.specs))}"
                )
        due = []
        for rank in ranks:
            what = self.models[rank].advance()
            if what == "rebase":
                self.models[rank].rebase(models[rank])
            elif what:
                due.append(rank)
        return self._synchronize(models, due)

    def sync(self, models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Synchronizes all ranks now; returns the models, which are then the same."""
        if not self._messages and self.models[0].together:
            return list(models)
        after = self._synchronize(models, list(range(self.size)))
        for driver in self.for_gradients if self.settings.diverges and self.for_models[0].committed else ():
            driver.clear_state(self.settings.for_gradients.memory.unsent_key)
        return after

    def _synchronize(self, models: Sequence[Mapping[str, Any]], due: Sequence[int]) -> list[Mapping[str, Any]]:
        if self._messages:
            return self._asynchronously(models, due)
        if not due:
            return list(models)
        sent = [model.outgoing(values) for model, values in zip(self.models, models, strict=True)]
        means = self._exchange(self.for_models, sent)
        new = [m.incoming(mean, d.committed) for m, mean, d in zip(self.models, means, self.for_models, strict=True)]
        return [own if one is None else one for own, one in zip(models, new, strict=True)]

    def _asynchronously(self, models: Sequence[Mapping[str, Any]], due: Sequence[int]) -> list[Mapping[str, Any]]:
        after = list(models)
        self.wire_bytes = [0] * self.size
        for rank in due:
            number = self.for_models[rank].step
            self._log.append(Entry(rank, number, self._messages[rank].encode(models[rank])))
            self.wire_bytes[rank] = len(self._log[-1].data)
        for rank in due:
            after[rank] = self._messages[rank].apply(self._log[self._had[rank] :])
            self._had[rank] = len(self._log)
        return after

    def _exchange(self, drivers: list[Driver], tensors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        given = run_lockstep([driver.exchange(mapping) for driver, mapping in zip(drivers, tensors, strict=True)], self.ops, 1)
        self.wire_bytes = [sent + driver.wire_bytes for sent, driver in zip(self.wire_bytes, drivers, strict=True)]
        return given


def _by_rank(value: Any, size: int) -> list[Any]:
    """Returns a list with one entry per rank. Raises ParameterError for a list of another length."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * size
    if len(values) != size:
        raise ParameterError(f"a list by rank needs {size} entries, got {len(values)}")
    return values
