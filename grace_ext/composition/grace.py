"""Grace, which users hold: what the tensors of a model go through."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NoReturn

from ..communicators.base import Communicator
from ..compressors.base import Compressor
from ..errors import IncompatiblePartsError, ParameterError, SpecSyntaxError, UnboundError, UnsupportedError, shown
from ..memories.base import Memory
from ..parts.registry import communicators
from ..parts.tensor import TensorSpec
from ..privacy.settings import Privacy
from .composition import Composition, Parts, Query, Route

#: By the package of what `Grace.bind` is given: the module that binds a Grace to it.
BINDERS = {
    "torch": "grace_ext.frameworks.torch.adapter",
    "tensorflow": "grace_ext.frameworks.tensorflow.adapter",
    "keras": "grace_ext.frameworks.tensorflow.adapter",
}


class Grace:
    """What the tensors of a model go through: one composition for all of them, or a policy that chooses. Immutable, compared by value.
    `grace(...)` makes one.

    route: the composition or the policy. policy: the policy, or None. leaves: every composition that some tensor may go through at some
    step. compressor, memory, communicator: the parts, if it is one composition. privacy: what makes gradients private before, or None.
    A Grace is not itself a Horovod compression object: `bind` gives one for a model. Passed unbound to plain Horovod, it raises.
    """

    def __init__(self, route: Route, seed: int = 0, privacy: Privacy | None = None):
        self.route, self.seed, self.privacy = route, seed, privacy
        self.policy: Route | None = None if isinstance(route, Composition) else route
        self.leaves = route.leaves
        #: The memories of the leaves, each once.
        self.memories = tuple(dict.fromkeys(leaf.memory for leaf in self.leaves))
        self._check_momentum()
        self._check_divergence()
        self._check_levels()
        for policy in self.policies:
            if policy.varies:
                _check_one_momentum(policy)
                _check_shards(policy)
        if privacy is not None and privacy.trust == "sum" and not (isinstance(route, Composition) and _is_a_sum(route)):
            raise IncompatiblePartsError(
                f"{self}: with trust='sum' a rank's own noise is too small to protect what it sends, so only sums may leave it, and the "
                "ranks must not see each other's messages, as they do in gathers, policies' reports and sparse payloads: use "
                "'none @ allreduce', or trust='peers' with any spec"
            )

    def _check_divergence(self) -> None:
        """Policies that learn decide by results that all ranks share."""
        learner = next((policy for policy in self.policies if policy.learns), None)
        memory = next((memory for memory in self.memories if memory.diverges), None)
        if learner and memory:
            raise IncompatiblePartsError(
                f"{self.route}: policy {learner.name!r} learns from results that are the same on all ranks, but with memory "
                f"{memory.name!r} they differ, so the ranks would choose differently; use memory 'residual', or a policy that goes by the "
                "step or the size"
            )

    def _check_levels(self) -> None:
        """If one spec is hierarchical, all go in two levels, so each must be able to."""
        for policy in self.policies if self.two_level else ():
            policy.check_two_level()
        for leaf in self.leaves if self.two_level else ():
            if not leaf.communicator.two_level:
                try:
                    _in_two_levels(leaf.communicator).check(leaf.compressor)
                except IncompatiblePartsError as error:
                    raise IncompatiblePartsError(f"{self.route} exchanges everything in two levels, '{leaf}', too: {error}") from None

    def _check_momentum(self) -> None:
        """If a memory is the momentum of the training, tensors that go through another memory would train without any."""
        self._momentum = next((leaf for leaf in self.leaves if leaf.memory.is_momentum), None)
        others = [leaf for leaf in self.leaves if not leaf.memory.is_momentum and not leaf.plain]
        if self._momentum and others:
            raise IncompatiblePartsError(
                f"{self.route}: memory {self._momentum.memory} is the momentum of the training, and what goes through '{others[0]}' would "
                "have none; use one kind of memory in all, or send those dense ('none', which keeps the other's memory)"
            )

    def parts_for(self, spec: TensorSpec, step: int = 0, state: Mapping[str, Any] | None = None) -> Parts:
        """Returns the parts that a tensor of this shape goes through: dense if its payload would not be smaller. With a policy that
        `changes`, the parts of this step, given the tensor's state at its start (as in Driver.state; by default that of the first step)."""
        return self.parts_of(self.route.choose(Query(spec, step, state or {})), spec)

    def parts_of(self, leaf: Composition, spec: TensorSpec) -> Parts:
        """Returns the parts that the tensor goes through if this leaf was chosen. A policy's plain 'none' keeps the memory that the tensor
        has at other steps, so that what it held back is sent; and a memory that is the momentum, which no tensor may go without."""
        if self.policy and leaf.plain:
            beside = [other for other in self.leaves_for(spec) if not other.plain]
            other = beside[0] if beside else self._momentum
            leaf = other.dense_step if other else leaf
        return leaf.parts_for(spec)

    def leaves_for(self, spec: TensorSpec) -> list[Composition]:
        """Returns the compositions that such a tensor may go through at some step."""
        return list(dict.fromkeys(leaf for _, leaf in self.route.reached(spec, "") if isinstance(leaf, Composition)))

    def nbytes(self, spec: TensorSpec, size: int = 2) -> int:
        """Upper bound of the bytes that one of `size` ranks hands to collectives for such a tensor at any step, bucket headers excluded."""
        return max(self._nbytes_of(self.parts_of(leaf, spec), spec, size) for leaf in self.leaves_for(spec))

    def _nbytes_of(self, parts: Parts, spec: TensorSpec, size: int) -> int:
        compressor, memory, communicator = parts
        if self.two_level and not communicator.two_level:  # what is flat by itself goes in two levels, too
            communicator = _in_two_levels(communicator)
        return memory.sends * communicator.input_bytes(compressor, memory.carried(spec), size) if not spec.empty else 0

    @property
    def policies(self) -> list[Any]:
        """The policy and all policies within it; none for a composition."""
        found: list[Any] = [self.policy] if self.policy else []
        for policy in found:  # grows while it is walked
            found += [child for child in policy.children() if not isinstance(child, Composition)]
        return found

    @property
    def diverges(self) -> bool:
        """Whether the result may differ from rank to rank."""
        return any(memory.diverges for memory in self.memories)

    def with_privacy(self, privacy: Privacy | None) -> Grace:
        """Returns the same with these settings of privacy. Raises ParameterError if they are something else, and SpecSyntaxError if it has
        others already."""
        if privacy is not None and not isinstance(privacy, Privacy):
            raise ParameterError(f"privacy must be Privacy(clip=..., noise_multiplier=...) or None, got {shown(privacy)}")
        if privacy is None or privacy == self.privacy:
            return self
        if self.privacy is not None:
            raise SpecSyntaxError(f"privacy={privacy} is given, and the spec has {self.privacy} in front: give one of them")
        return Grace(self.route, self.seed, privacy)

    @property
    def per_example(self) -> bool:
        """Whether an exchange takes the gradients of a rank's examples one by one, because each of them is made private."""
        return self.privacy is not None and self.privacy.unit == "example"

    @property
    def acts_alone(self) -> bool:
        """Whether a rank's result differs from its gradient even if nothing needs to be sent: it is made private, a memory is the momentum
        of the training, or the result is a vote or the signs of a mean."""
        return self.privacy is not None or any(leaf.memory.is_momentum or leaf.compressor.result != "mean" for leaf in self.leaves)

    @property
    def two_level(self) -> bool:
        """Whether everything is exchanged in two levels, inside the nodes and between them, because some tensor is."""
        return any(leaf.communicator.two_level for leaf in self.leaves)

    @property
    def compressor(self) -> Compressor:
        return self._composition("compressor").compressor

    @property
    def memory(self) -> Memory:
        return self._composition("memory").memory

    @property
    def communicator(self) -> Communicator:
        return self._composition("communicator").communicator

    def _composition(self, kind: str) -> Composition:
        if isinstance(self.route, Composition):
            return self.route
        raise UnsupportedError(f"{self} has no {kind} of its own: it chooses among compositions, see `leaves` and `parts_for(spec, step)`")

    def to_config(self) -> dict[str, Any]:
        """Returns a JSON-safe dictionary; `grace(g.to_config()) == g`."""
        parts = self.route.to_config() if self.policy is None else {"policy": self.policy.to_config()}
        private = {} if self.privacy is None else {"privacy": self.privacy.to_config()}
        return {**private, **parts, "seed": self.seed}

    def bind(
        self, named_parameters: Any, *, optimizer: Any = None, op: Any = None, process_set: Any = None, simulate: bool = False,
        scaler: Any = None, check_start: bool = True,
    ) -> Any:  # fmt: skip
        """Returns a `compression=` object for unmodified Horovod: for `horovod.torch.DistributedOptimizer`, given
        model.named_parameters(), or for `horovod.tensorflow.DistributedGradientTape` over these tf.Variables.

        op, process_set: the same ones that are given to Horovod, which does not pass them on.
        optimizer (torch): gives the learning rate to memories that use it.
        simulate (torch): compresses at world size 1, too (needs `optimizer`, because Horovod does not call the object there).
        scaler (torch): the GradScaler that scales the loss.
        check_start: compares the bits of all ranks' parameters at the first step; raises DisagreementError if they differ.
        One bound object serves one optimizer or tape. Raises UnboundError for anything else than parameters or variables."""
        items = list(named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters)
        if not items:
            raise UnboundError("bind got no parameters; a generator can be used once, so call model.named_parameters() again")
        packages = {type(x).__module__.split(".")[0] for item in items for x in (item if isinstance(item, tuple) else (item,))}
        binder = next((BINDERS[package] for package in sorted(packages, reverse=True) if package in BINDERS), None)
        if binder is None:
            raise UnboundError(
                "bind takes model.named_parameters() of a torch model or a list of tf.Variables, got a list of "
                f"{type(items[0]).__module__}.{type(items[0]).__name__}"
            )
        options = {"op": op, "process_set": process_set, "simulate": simulate, "check_start": check_start}
        return importlib.import_module(binder).bind(self, items, optimizer=optimizer, scaler=scaler, **options)

    def compress(self, *_: Any, **__: Any) -> NoReturn:
        raise UnboundError(UNBOUND.format(self))

    decompress = compress

    def __hash__(self) -> int:
        # Horovod for TensorFlow hashes its compression object at construction: the earliest place to stop an unbound one.
        raise UnboundError(UNBOUND.format(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grace) and self.to_config() == other.to_config()

    def __str__(self) -> str:
        return str(self.route) if self.privacy is None else f"{self.privacy} | {self.route}"

    def __repr__(self) -> str:
        return f"grace({str(self)!r})" if not self.seed else f"grace({str(self)!r}, seed={self.seed})"


def _in_two_levels(communicator: Communicator) -> Any:
    """Returns the communicator that carries between nodes what this one carries between ranks."""
    return communicators.get("hierarchical").create(knobs={"between": communicator})


def _is_a_sum(leaf: Composition) -> bool:
    """Whether all that leaves a rank is its gradient, as one term of a sum."""
    return leaf.plain and leaf.communicator.name == "allreduce"


def _check_one_momentum(policy: Any) -> None:
    """A momentum sees the gradients of its own steps only, so a tensor needs the same one at every step."""
    memories = {leaf.memory.name: leaf.memory for leaf in policy.leaves if not leaf.plain}
    keeps = [name for name, memory in memories.items() if memory.is_momentum or memory.optimizer_momentum is not None]
    if keeps and len(memories) > 1:
        raise IncompatiblePartsError(
            f"{policy}: a tensor could go through memories {' and '.join(map(repr, memories))} at different steps, and the momentum in "
            f"{keeps[0]!r} would miss the gradients of the others' steps; use one of these memories at all steps (policies that go by size "
            "or name may stand outside this one)"
        )


def _check_shards(policy: Any) -> None:
    """Communicators that take turns share one residual of each shard, which each keeps in units of its memory and learning rate."""
    keeps = [leaf for leaf in policy.leaves if leaf.communicator.keeps_state(leaf.compressor)]
    units = {(leaf.memory.in_updates, leaf.communicator.uses_lr): leaf for leaf in keeps}
    if len(units) > 1:
        one, other, *_ = units.values()
        raise IncompatiblePartsError(
            f"{policy}: '{one}' and '{other}' would take turns with one residual of each rank's shard, which they keep in different units; "
            "use memories of one unit, and follow_rate in all or none, or feedback=False"
        )


UNBOUND = (
    "{!r} is not bound to a model. Import the wrapper in place of Horovod's: `import grace_ext.frameworks.torch as hvd` (for TensorFlow "
    "`import grace_ext.frameworks.tensorflow as hvd`), or with plain horovod.torch pass compression=g.bind(model.named_parameters())"
)
