"""A policy at work in one driver: what each tensor goes through at a step, how its state goes on if that changes, what policies learn.

All ranks choose alike: a choice follows from the tensor's name and shape, the number of the step, and state that only aggregates have
changed, which are the same bits everywhere, or the gathered reports of all ranks (`settle`). Choices are made when a step begins and hold
until it ends.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..composition.composition import Parts, Query, Route
from ..composition.grace import Grace
from ..errors import PayloadError
from ..exchange.effects import Collective
from ..exchange.message import message, open_message
from ..exchange.perform import at_once
from ..exchange.tensor import initial_state
from ..exchange.transport import Transport
from ..parts.ops import Array, Flag, Ops
from ..parts.state import as_state, is_own, own_state
from ..parts.tensor import StepInfo, TensorSpec
from ..policies.base import Policy

States = dict[str, dict[str, Array]]
#: By key: the lengths and dtypes that an array of a state may have.
Forms = dict[str, set[tuple[int, Any]]]


class Choices:
    """What the tensors of one driver go through."""

    def __init__(self, grace: Grace, specs: Iterable[TensorSpec] = ()):
        self.grace, self.specs = grace, list(specs)
        #: By name: the parts of the step that is under way, or comes next.
        self.parts: dict[str, Parts] = {}
        self._known: dict[tuple[str, int], Parts] = {}
        #: By name: the parts that the committed state was made for.
        self._made_for: dict[str, Parts] = {}
        reached = {spec: [] if grace.policy is None else list(grace.policy.reached(spec, "policy")) for spec in self.specs}
        self._learners = {spec: [(path, p) for path, p in found if isinstance(p, Policy) and p.learns] for spec, found in reached.items()}
        #: By place: the policies that decide for all their tensors at once, and those tensors.
        self.groups: dict[str, tuple[Policy, list[TensorSpec]]] = {}
        for spec, learners in self._learners.items():
            for path, policy in learners:
                if policy.whole_model and spec.size:
                    self.groups.setdefault(path, (policy, []))[1].append(spec)

    def notices(self) -> list[str]:
        """Returns the policies' sentences for the user's log, now that the parameters are known."""
        by_place: dict[str, tuple[Policy, list[TensorSpec]]] = {}
        for spec in self.specs if self.grace.policy else ():
            for path, policy in self.grace.route.reached(spec, "policy"):
                if isinstance(policy, Policy):
                    by_place.setdefault(path, (policy, []))[1].append(spec)
        return [sentence for policy, specs in by_place.values() for sentence in policy.notices(specs)]

    def choose(self, step: int, states: Mapping[str, Mapping[str, Array]]) -> bool:
        """Chooses for this step; returns whether any choice is new."""
        if self.parts and not self.grace.route.changes:
            return False
        before = self.parts
        self.parts = {spec.name: self._parts_of(spec, step, states.get(spec.name, {})) for spec in self.specs}
        return self.parts != before

    def _parts_of(self, spec: TensorSpec, step: int, state: Mapping[str, Array]) -> Parts:
        """Grace.parts_for, remembered: compositions live as long as the policy that has them."""
        leaf = self.grace.route.choose(Query(spec, step, state))
        key = spec.name, id(leaf)
        if key not in self._known:
            self._known[key] = self.grace.parts_of(leaf, spec)
        return self._known[key]

    def fitting(self, ops: Ops, spec: TensorSpec, state: dict[str, Array], info: StepInfo) -> dict[str, Array]:
        """Returns the tensor's state with what its parts of this step need. What other parts left stays, for when they come back; an array
        of another size (powersgd's Q of another rank) is fitted by the compressor's `resized`."""
        parts = self.parts[spec.name]
        if self.grace.policy is None or spec.empty or self._made_for.get(spec.name) == parts:
            return state
        fresh = initial_state(ops, spec, parts, info)
        for path, policy in self._learners[spec]:
            fresh.update(as_state(path, policy.init(ops, spec)))
        kept = {key: array for key, array in state.items() if key not in fresh or is_own(key) or len(array) == len(fresh[key])}
        resized = {key: parts[0].resized(ops, key, state[key], fresh[key]) for key in state if key not in kept}
        return {**fresh, **kept, **resized}

    def committed(self) -> None:
        """Takes note that the states of all tensors are now those that this step's parts have left."""
        self._made_for = dict(self.parts)

    def forget(self) -> None:
        """Takes note that the states have come from elsewhere."""
        self._made_for = {}

    # --- policies that learn ------------------------------------------------------------------------------------------
    def measure(self, ops: Ops, spec: TensorSpec, grad: Array, state: dict[str, Array], info: StepInfo) -> dict[str, Array]:
        """Returns the tensor's state after its policies have measured this rank's gradient."""
        compensated = None
        for path, policy in self._learners[spec] if spec.size else ():
            seen = grad
            if policy.inspects_compensated(info.step):
                if compensated is None:
                    memory = self.parts[spec.name][1]
                    compensated = memory.before(ops, grad, spec, info, {**state, **memory.absorb(ops, grad, spec, info, state)})
                seen = compensated
            state = {**state, **as_state(path, policy.inspect(ops, seen, spec, info, own_state(path, state)))}
        return state

    def observe(
        self, ops: Ops, spec: TensorSpec, aggregate: Array, state: dict[str, Array], info: StepInfo, finite: Flag
    ) -> dict[str, Array]:
        """Returns the tensor's state after its policies have observed the result, if it is finite: only for them the host waits to know."""
        for path, policy in self._learners[spec] if spec.size and self._learners[spec] and finite else ():
            state = {**state, **as_state(path, policy.observe(ops, aggregate, spec, info, own_state(path, state)))}
        return state

    def _in_use(self, route: Route, query: Query) -> Iterator[str]:
        """Yields the places of the policies by which the tensor may be sent until one of them learns something new."""
        if isinstance(route, Policy):
            yield query.path
            for knob, child in route.open_branches(query).items():
                yield from self._in_use(child, query.under(knob))

    def _due(self, step: int, states: States) -> dict[str, tuple[Policy, list[TensorSpec]]]:
        """Returns, by place, the policies that decide at the end of this step for all their tensors."""
        return {
            path: (policy, specs)
            for path, (policy, specs) in self.groups.items()
            if policy.due(Query(specs[0], step, states.get(specs[0].name, {}), path))
        }

    def settle(
        self, transport: Transport, prefix: str, info: StepInfo, before: States, after: States, compute: float
    ) -> Generator[Any, Any, tuple[int, list[str]]]:
        """Gathers the reports that are due, and writes what the policies decide into the states, before the step is committed.

        before, after: the tensors' states at the start and at the end of the step. compute: seconds between two exchanges. Returns (bytes
        that this rank sent, sentences for the user's log)."""
        sent = 0
        said: list[str] = []
        for path, (policy, specs) in self._due(info.step, before).items():
            if policy.only_in_use:
                queries = [Query(spec, info.step + 1, after[spec.name]) for spec in specs]
                specs = [query.spec for query in queries if path in self._in_use(self.grace.route, query)]
                for spec in {query.spec for query in queries}.difference(specs):
                    after[spec.name].update(as_state(path, policy.init(transport.ops, spec)))
                if not specs:
                    continue
            states = {spec: own_state(path, after[spec.name]) for spec in specs}
            found = yield from policy.survey(transport, specs, compute, f"{prefix}/survey/{path}")
            report = transport.ops.upload(policy.report(transport.ops, states, found).view(np.uint8))
            reports, nbytes = yield from _gathered(transport, report, info.step, f"{prefix}/settle/{path}")
            changes, sentences = policy.settle(transport.ops, reports, states, found)
            sent, said = sent + nbytes, [*said, *sentences]
            for spec, changed in zip(specs, changes, strict=True):
                after[spec.name].update(as_state(path, changed))
        return sent, said

    # --- states that were saved ---------------------------------------------------------------------------------------
    def shared(self) -> set[str]:
        """Returns the keys of state that are the same on all ranks, or that a rank may take over from another."""
        parts = [part for leaf in self.grace.leaves for part in (leaf.memory, leaf.compressor, leaf.communicator)]
        return {key for outer in parts for part in outer.nested() for key in (*part.shared_state, *part.borrowed_state)}

    def forms(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> tuple[list[Forms], Forms]:
        """Returns what the arrays of such a tensor's state may be: for each composition that it may go through, and of its policies."""
        leaves = []
        for parts in {self.grace.parts_of(leaf, spec) for leaf in self.grace.leaves_for(spec)}:
            leaves.append({key: {(len(x), x.dtype)} for key, x in initial_state(ops, spec, parts, info).items()})
        own = {}
        for path, policy in self._learners[spec]:
            for key, x in as_state(path, policy.init(ops, spec)).items():
                own[key] = {(len(x), x.dtype), (spec.size, x.dtype)}
        return leaves, own


def _gathered(transport: Transport, report: Array, step: int, name: str) -> Generator[Any, Any, tuple[list[np.ndarray], int]]:
    """Gathers a report of equal length from every rank. Returns (float32 by rank, bytes that this rank sent)."""
    ops = transport.ops
    mine = message(ops, [report], digest=0, step=step, finite=True)
    wanted = Collective("allgather", mine, "settle", sizes=(len(mine),) * transport.size)
    received = yield from at_once(transport, wanted, name)
    bodies = [open_message(ops, data, digest=0, step=step, rank=rank)[0] for rank, data in enumerate(received)]
    for rank, body in enumerate(bodies):
        if len(body) != len(report):
            raise PayloadError(f"is a policy's report of {len(body)} bytes, this rank's has {len(report)}", rank)
    return [np.frombuffer(ops.host(body).tobytes(), np.float32) for body in bodies], len(mine)
