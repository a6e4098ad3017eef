"""LocalCluster runs N ranks in one process, in lockstep, for tests, simulation and study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .arrays import libraries
from .checkpoints.saveable import Saveable
from .checkpoints.statefile import mapped
from .composition import making
from .driver.driver import Driver
from .driver.layout import check_names, check_tensor
from .errors import GraceError, NamesError, ParameterError, shown
from .exchange.lockstep import LockstepTransport, run_lockstep
from .metrics.metrics import Metrics, Report
from .parts.tensor import TensorSpec
from .privacy.settings import Privacy


class LocalCluster:
    """Simulates `size` ranks that exchange gradients as real ones do: with the same parts, the same driver and the same bytes.

    grace: a Grace, or what `grace_ext.grace` takes.
    framework: 'numpy', 'torch' or 'tensorflow'. It takes tensors of that framework or numpy arrays, and returns that framework's.
    ranks_per_node: the number of consecutive ranks that share a node, for communicator 'hierarchical' (the last node may have fewer).
    privacy: a grace_ext.privacy.Privacy, which makes each rank's gradient private before it is compressed; or the spec has it in front.
      With unit 'example' gradients have one dimension more, in front, which counts the examples of that rank.
    """

    def __init__(self, grace: making.Spec, size: int, framework: str = "numpy", ranks_per_node: int = 1, *, privacy: Privacy | None = None):
        for name, value in (("size", size), ("ranks_per_node", ranks_per_node)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} must be a whole number, at least 1, got {shown(value)}")
        self.grace, self.size = making.grace(grace).with_privacy(privacy), size
        self.framework, self._per_node = framework, ranks_per_node
        self.ops = libraries.ops_for_framework(framework)
        self.drivers = [
            Driver(self.grace, self.ops, LockstepTransport(rank, size, self.ops, ranks_per_node), read_lr=lambda: self._lr, diverging=True)
            for rank in range(size)
        ]
        self._lr: float | None = None
        self._metrics: list[Metrics] = []

    @property
    def wire_bytes(self) -> list[int]:
        """Returns the bytes that each rank handed to collectives in the last step, without the agreement at the first step."""
        return [driver.wire_bytes for driver in self.drivers]

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, as Driver.epsilon does."""
        return max(driver.epsilon(delta) for driver in self.drivers)

    def measure(self, every: int = 100, **options: Any) -> list[Metrics]:
        """Turns metrics on, on every rank (see metrics.py). With '{rank}' in the name of the file, every rank writes one."""
        self._metrics = [Metrics(every, **options) for _ in self.drivers]
        for driver, metrics in zip(self.drivers, self._metrics, strict=True):
            metrics.attach(driver, network=False)
        return self._metrics

    def metrics(self) -> list[Report]:
        """Returns each rank's latest report; [] if `measure` was not called."""
        return [metrics.report() for metrics in self._metrics]

    def step(self, gradients: Sequence[Mapping[str, Any]], lr: float | None = None) -> Any:
        """Makes one exchange of one mapping {name: gradient} per rank. Returns the mapping of aggregates, the same on all ranks, in the
        shapes and dtypes of the input; or a list of mappings by rank, for a memory whose result differs from rank to rank (cser).
        Raises GraceError, before anything has changed, if the input does not fit."""
        self._check(gradients)
        self.drivers[0].check_rate(lr)
        self._lr = lr
        ranks = [d.exchange(m) for d, m in zip(self.drivers, gradients, strict=True)]
        by_rank = run_lockstep(ranks, self.ops, self._per_node)
        return by_rank if self.grace.diverges else by_rank[0]

    def _check(self, gradients: Sequence[Mapping[str, Any]]) -> None:
        """Registers the parameters at the first step. Raises GraceError, and forgets them again, if a rank's do not fit."""
        if len(gradients) != self.size:
            raise ParameterError(f"step needs one mapping for each of the {self.size} ranks, got {len(gradients)}")
        names = set(self.drivers[0].specs or gradients[0])
        for rank, mapping in enumerate(gradients):
            check_names(mapping)
            missing, extra = sorted(names - set(mapping)), sorted(set(mapping) - names)
            if missing or extra:
                raise NamesError(f"rank {rank}: missing parameters {shown(missing)}, unknown parameters {shown(extra)}")
        first = not self.drivers[0].specs
        specs = [TensorSpec(name, *self._describe(tensor)) for name, tensor in gradients[0].items()] if first else []
        try:
            for driver, mapping in zip(self.drivers, gradients, strict=True):
                if first:
                    driver.register(specs)
                for name, tensor in mapping.items():
                    check_tensor(driver.specs, name, *self._describe(tensor))
        except GraceError:
            for driver in self.drivers if first else ():
                driver.register(())
            raise

    def _describe(self, gradient: Any) -> tuple[tuple[int, ...], str]:
        """Returns the parameter's shape and dtype."""
        shape, dtype = self.ops.describe(gradient)
        return shape[1:] if self.grace.per_example else shape, dtype

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every rank, from which `load_state_dict` resumes bit for bit."""
        return {"version": 1, "ranks": [driver.state_dict() for driver in self.drivers]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes from a state. Raises GraceError, naming the rank, and changes nothing, if it does not fit: if it was saved with another
        spec or another number of ranks, for example."""
        states = saved.get("ranks") if isinstance(saved, Mapping) else None
        if not isinstance(states, Sequence):
            raise GraceError(f"a cluster's state must be what its state_dict() returned, with 'ranks', got {shown(saved, 80)}")
        self._check_states(states)
        for driver, state in zip(self.drivers, states, strict=True):
            driver.load_state_dict(state)

    def _check_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        if len(states) != self.size:
            raise GraceError(f"this state is of {len(states)} ranks, but the cluster has {self.size}; they must be equal")
        for rank, (driver, state) in enumerate(zip(self.drivers, states, strict=True)):
            try:
                driver.read_state(state)
            except GraceError as error:
                raise GraceError(f"rank {rank}: {error}") from None
            if state["rank"] != rank:
                raise GraceError(f"states must be in rank order; that of rank {state['rank']} is in place {rank}")
        if len(steps := {state["step"] for state in states}) > 1:
            raise GraceError(f"the states are of the steps {sorted(steps)}; they must be of one")

    def _saveable(self) -> Saveable:
        def read() -> list[dict[str, Any]]:
            return [mapped(state, self.ops.host) for state in self.state_dict()["ranks"]]

        def uploaded(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            return [mapped(state, self.ops.upload) for state in states]

        return Saveable(
            range(self.size), self.size, None, [driver.transport.node for driver in self.drivers], read,
            lambda states: self._check_states(uploaded(states)),
            lambda states: self.load_state_dict({"version": 1, "ranks": uploaded(states)}),
        )  # fmt: skip
