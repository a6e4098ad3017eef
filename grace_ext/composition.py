"""Grace: three parts that work together, or a policy that chooses among such, and the ways to name them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from .communicators.base import Communicator
from .compressors.base import Compressor
from .errors import (
    BiasedCompressorWarning,
    IncompatiblePartsError,
    ParameterError,
    SpecSyntaxError,
    UnboundError,
    UnstableFeedbackWarning,
    UnsupportedError,
)
from .memories.base import Memory
from .parts.part import Part
from .parts.registry import communicators, compressors, memories, policies
from .parts.spec import parse, part_from
from .parts.tensor import TensorSpec
from .policies.base import Asked, Policy

_warned: set[str] = set()
Parts = tuple[Compressor, Memory, Communicator]


@dataclass(frozen=True)
class Composition:
    """A compressor, a memory and a communicator: what one tensor goes through at one step. Immutable, compared by value. `compose` makes
    one of parts that fit."""

    compressor: Compressor
    memory: Memory
    communicator: Communicator

    def check(self) -> None:
        """Raises IncompatiblePartsError where the parts cannot work together."""
        self.compressor.check()
        self.communicator.check(self.compressor)
        self.memory.check(self.compressor)
        self.communicator.check_memory(self.memory)

    @cached_property
    def dense(self) -> Composition:
        """The same with nothing compressed: the memory goes on, and what it held back is sent."""
        none = compressors.get("none").create()
        try:
            self.communicator.check(none)
        except IncompatiblePartsError:  # it carries compressed payloads only
            return Composition(none, self.memory, communicators.get("allreduce").create())
        return Composition(none, self.memory, self.communicator)

    @cached_property
    def dense_step(self) -> Composition:
        """`dense` for a step at which every tensor is sent so: by all-reduce, where a gather would bring every rank n - 1 whole gradients.
        (A few small tensors are better off in the gather that their neighbours are in.)"""
        gathered, reduce = self.dense, communicators.get("allreduce").create()
        if gathered.communicator.two_level or gathered.communicator.bytes_sent(8, 1, 1) <= reduce.bytes_sent(8, 1, 1):
            return gathered
        return Composition(gathered.compressor, self.memory, reduce)

    def parts_for(self, spec: TensorSpec) -> Parts:
        """The parts that a tensor of this shape really goes through: dense where its payload would not be smaller."""
        chosen = self.dense if spec.size and self.compressor.sends_dense(spec) else self
        return chosen.compressor, self.memory, chosen.communicator

    def nbytes(self, spec: TensorSpec, size: int = 2) -> int:
        """Upper bound of the bytes that one of `size` ranks hands to collectives for such a tensor, bucket headers excluded."""
        compressor, memory, communicator = self.parts_for(spec)
        return memory.sends * communicator.input_bytes(compressor, spec, size) if spec.size else 0

    def mean_nbytes(self, spec: TensorSpec) -> float:
        """Expected bytes of the payloads of such a tensor."""
        compressor, memory, _ = self.parts_for(spec)
        return memory.sends * compressor.mean_nbytes(spec) if spec.size else 0.0

    def to_config(self) -> dict[str, Any]:
        """A JSON-safe dictionary."""
        return {kind: getattr(self, kind).to_config() for kind in ("compressor", "memory", "communicator")}

    def __str__(self) -> str:
        memory = "" if self.memory.name == "none" else f" + {self.memory}"
        return f"{self.compressor}{memory} @ {self.communicator}"

    # --- what a policy has, too: it may stand where one does -----------------------------------------------------------
    changes: ClassVar[bool] = False

    @property
    def leaves(self) -> tuple[Composition, ...]:
        return (self,)

    def choose(self, asked: Asked) -> Composition:
        return self

    def reached(self, spec: TensorSpec, path: str) -> Iterator[tuple[str, Any]]:
        yield path, self


class Grace:
    """What the tensors of a model go through: one composition for all, or a policy that chooses. Immutable, compared by value. Make it with
    `grace(...)`.

    `policy` is None for a composition, and then `compressor`, `memory` and `communicator` are its parts. `leaves`: every composition that
    some tensor may go through at some step.
    It is not itself a Horovod compression object: `bind` gives one for a model. Passed to plain Horovod unbound, it raises.
    """

    def __init__(self, plan: Composition | Policy, seed: int = 0):
        self.plan, self.seed = plan, seed
        self.policy = None if isinstance(plan, Composition) else plan
        self.leaves = plan.leaves
        #: Memories of the leaves, each once.
        self.memories = tuple(dict.fromkeys(leaf.memory for leaf in self.leaves))
        self._check_momentum()

    def _check_momentum(self) -> None:
        """Where a memory is the momentum of the training, tensors that go through another would train without any."""
        self._momentum = next((leaf for leaf in self.leaves if leaf.memory.is_momentum), None)
        others = [leaf for leaf in self.leaves if not leaf.memory.is_momentum and not _plain(leaf)]
        if self._momentum and others:
            raise IncompatiblePartsError(
                f"{self.plan}: memory {self._momentum.memory} is the momentum of the training, and what goes through '{others[0]}' would "
                "have none; use one kind of memory in all, or send those dense ('none', which keeps the other's memory)"
            )

    def parts_for(self, spec: TensorSpec, step: int = 0, state: Mapping[str, Any] | None = None) -> Parts:
        """The parts that a tensor of this shape goes through: dense where its payload would not be smaller. With a policy whose choice
        `changes`, those of this step, given the tensor's state at its start (as Driver.state has it; by default as before the first)."""
        return self.parts_of(self.plan.choose(Asked(spec, step, state or {})), spec)

    def parts_of(self, leaf: Composition, spec: TensorSpec) -> Parts:
        """The parts that the tensor goes through where this was chosen. A policy's plain 'none' keeps the memory that the tensor has at
        other steps, so that what it held back is sent; and a memory that is the momentum, which no tensor may go without."""
        if self.policy and _plain(leaf):
            beside = [other for other in self.leaves_for(spec) if not _plain(other)]
            other = beside[0] if beside else self._momentum
            leaf = other.dense_step if other else leaf
        return leaf.parts_for(spec)

    def leaves_for(self, spec: TensorSpec) -> list[Composition]:
        """The compositions that such a tensor may go through at some step."""
        return list(dict.fromkeys(leaf for _, leaf in self.plan.reached(spec, "") if isinstance(leaf, Composition)))

    def nbytes(self, spec: TensorSpec, size: int = 2) -> int:
        """Upper bound of the bytes that one of `size` ranks hands to collectives for such a tensor, bucket headers excluded. With a policy:
        of what it goes through at any step."""
        if self.policy is None:
            return self.plan.nbytes(spec, size)
        return max(leaf.nbytes(spec, size) for leaf in self.leaves_for(spec))

    @property
    def policies(self) -> list[Policy]:
        """The policy and all that are in it; none for a composition."""
        found: list[Any] = [self.policy] if self.policy else []
        for policy in found:  # grows while it is walked
            found += [child for child in policy.children() if isinstance(child, Policy)]
        return found

    @property
    def diverges(self) -> bool:
        """The result may differ from rank to rank."""
        return any(memory.diverges for memory in self.memories)

    @property
    def two_level(self) -> bool:
        """All that some tensor goes through is exchanged in two levels: inside the nodes, and between them."""
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
        if self.policy is None:
            return self.plan
        raise UnsupportedError(f"{self} has no {kind} of its own: it chooses among compositions, see `leaves` and `parts_for(spec, step)`")

    def to_config(self) -> dict[str, Any]:
        """A JSON-safe dictionary; `grace(g.to_config()) == g`."""
        return {**(self.plan.to_config() if self.policy is None else {"policy": self.policy.to_config()}), "seed": self.seed}

    def bind(
        self, named_parameters: Any, *, optimizer: Any = None, op: Any = None, process_set: Any = None, simulate: bool = False,
        scaler: Any = None,
    ) -> Any:  # fmt: skip
        """A `compression=` object for unmodified Horovod: `horovod.torch.DistributedOptimizer` of this model, given
        model.named_parameters(), or `horovod.tensorflow.DistributedGradientTape` over these tf.Variables.

        `op` and `process_set` must be the ones given to Horovod, which does not pass them on; `optimizer` (torch) gives the learning rate
        to memories that use it; `simulate` (torch) compresses at world size 1 too (there Horovod itself never calls the object, so it
        needs `optimizer`); `scaler` (torch) is the GradScaler that scales the loss. One bound object serves one optimizer or tape."""
        items = list(named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters)
        if not items:
            raise UnboundError("bind got no parameters; a generator can be used once, so call model.named_parameters() again")
        packages = {type(x).__module__.split(".")[0] for item in items for x in (item if isinstance(item, tuple) else (item,))}
        if "torch" in packages:
            from .frameworks.torch.adapter import bind

            return bind(self, items, optimizer=optimizer, op=op, process_set=process_set, simulate=simulate, scaler=scaler)
        if packages & {"tensorflow", "keras"}:
            from .frameworks.tensorflow.adapter import bind as bind_tensorflow

            return bind_tensorflow(self, items, op=op, process_set=process_set, simulate=simulate)
        raise UnboundError(
            "bind takes model.named_parameters() of a torch model or a list of tf.Variables, got a list of "
            f"{type(items[0]).__module__}.{type(items[0]).__name__}"
        )

    def compress(self, *_: Any, **__: Any) -> Any:
        raise UnboundError(UNBOUND.format(self))

    decompress = compress

    def __hash__(self) -> int:
        # Horovod for TensorFlow hashes its compression object at construction: the earliest place to stop an unbound one.
        raise UnboundError(UNBOUND.format(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grace) and self.to_config() == other.to_config()

    def __str__(self) -> str:
        return str(self.plan)

    def __repr__(self) -> str:
        return f"grace({str(self)!r})" if not self.seed else f"grace({str(self)!r}, seed={self.seed})"


UNBOUND = (
    "{!r} is not bound to a model. Import the wrapper in place of Horovod's: `import grace_ext.frameworks.torch as hvd` (for TensorFlow "
    "`import grace_ext.frameworks.tensorflow as hvd`), or with plain horovod.torch pass compression=g.bind(model.named_parameters())"
)


def _plain(leaf: Composition) -> bool:
    """Dense, and nothing remembered."""
    return leaf.compressor.name == "none" and leaf.memory.name == "none"


def grace(
    spec: str | Mapping[str, Any] | Grace | Composition | Policy | None = None,
    *,
    compressor: Any = None,
    memory: Any = None,
    communicator: Any = None,
    policy: Any = None,
    seed: int | None = None,
) -> Grace:
    """Three parts by name, or a policy.

    `spec` is a string ('topk(ratio=0.01) + residual @ allgather', 'by_size(large=topk + residual)') or a configuration (`to_config()`); or
    the parts, or the policy, are given by keyword, as names, configurations or instances. The memory defaults to none (with one warning
    where the compressor is biased), the communicator to the compressor's natural one: allreduce where payloads can be summed, else
    allgather. `seed` is the base of all randomness and must be the same on all ranks.
    Raises UnknownPartError, ParameterError, SpecSyntaxError or IncompatiblePartsError.
    """
    given: dict[str, Any] = {"compressor": compressor, "memory": memory, "communicator": communicator, "policy": policy}
    if spec is not None:
        if any(value is not None for value in given.values()):
            raise SpecSyntaxError("give a spec, or the parts by keyword, not both")
        if isinstance(spec, (Composition, Policy)):
            return Grace(spec, _seed(seed))
        given, seed = _from_spec(spec.to_config() if isinstance(spec, Grace) else spec, seed)
    if given.get("policy") is None:
        return Grace(compose(**{kind: given.get(kind) for kind in ("compressor", "memory", "communicator")}), _seed(seed))
    if any(value is not None for kind, value in given.items() if kind != "policy"):
        raise SpecSyntaxError("a policy is a spec by itself: say compressor, memory and communicator in its knobs")
    return Grace(part_from(policies, given["policy"]), _seed(seed))  # type: ignore[arg-type]


def compose(compressor: Any, memory: Any = None, communicator: Any = None) -> Composition:
    """The parts, checked to fit. Raises as `grace` does."""
    if compressor is None:
        raise SpecSyntaxError("name a compressor, one of: " + ", ".join(compressors.names()))
    chosen: Any = part_from(compressors, compressor)
    remembers: Any = part_from(memories, memory or "none")
    natural = "allreduce" if chosen.summable else "allgather"
    result = Composition(chosen, remembers, part_from(communicators, communicator or natural))  # type: ignore[arg-type]
    result.check()
    if memory is None and chosen.wants_memory and str(chosen) not in _warned:
        _warned.add(str(chosen))
        warnings.warn(
            f"{chosen} is biased and has no memory: what it drops is lost, and training may stall. Add error feedback: "
            f"'{chosen} + residual' (or say '+ none' if this is meant)",
            BiasedCompressorWarning,
            stacklevel=3,
        )
    omega = chosen.omega(4096) if chosen.unbiased and remembers.feeds_back else None
    if omega is not None and omega >= 1 and str(result) not in _warned:
        _warned.add(str(result))
        warnings.warn(
            f"{chosen} is random, with a variance of up to {omega:.3g} times its input: what {remembers.name!r} remembers of it can grow "
            "without bound. Use memory 'none' or 'diana' with it, or a contraction such as 'topk > qsgd'",
            UnstableFeedbackWarning,
            stacklevel=3,
        )
    return result


def plan_from(value: Any) -> Composition | Policy:
    """What a policy may choose: a composition or another policy, from a spec (as `grace` takes it) or an instance; None is 'none'."""
    if isinstance(value, Part) and value.kind == "compressor":
        return compose(value)
    if isinstance(value, Mapping) and "id" in value:
        return part_from(policies, value)  # type: ignore[return-value]
    made = grace("none" if value is None else value)
    if made.seed:
        raise SpecSyntaxError(f"{made!r}: inside a policy there is no seed; give it to the outermost grace(...)")
    return made.plan


def _from_spec(spec: str | Mapping[str, Any], seed: int | None) -> tuple[dict[str, Any], int | None]:
    if isinstance(spec, str):
        return dict(parse(spec)), seed
    if not isinstance(spec, Mapping):
        raise SpecSyntaxError(f"a spec is a string or a dictionary, got {spec!r}")
    unknown = sorted(set(spec) - {"compressor", "memory", "communicator", "policy", "seed"})
    if unknown:
        raise SpecSyntaxError(
            f"unknown key {', '.join(map(repr, unknown))}; a configuration has compressor, memory, communicator, seed, or policy, seed"
        )
    return {key: value for key, value in spec.items() if key != "seed"}, spec.get("seed") if seed is None else seed


def _seed(seed: Any) -> int:
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed must be a whole number, got {seed!r}")
    return seed
