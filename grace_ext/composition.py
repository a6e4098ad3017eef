"""Grace: three parts that work together, and the ways to name them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from . import communicators, compressors, memories
from .communicators.base import Communicator
from .compressors.base import Compressor
from .errors import BiasedCompressorWarning, IncompatiblePartsError, ParameterError, SpecSyntaxError, UnboundError, UnstableFeedbackWarning
from .memories.base import Memory
from .spec import TensorSpec, parse, part_from

_warned: set[str] = set()


class Grace:
    """A compressor, a memory and a communicator: checked to fit, immutable, compared by value. Make it with `grace(...)`.

    It is not itself a Horovod compression object: `bind` gives one for a model. Passed to plain Horovod unbound, it raises.
    """

    def __init__(self, compressor: Compressor, memory: Memory, communicator: Communicator, seed: int = 0):
        compressor.check()
        communicator.check(compressor)
        memory.check(compressor)
        communicator.check_memory(memory)
        self.compressor, self.memory, self.communicator, self.seed = compressor, memory, communicator, seed
        self._dense = compressors.get("none").create(), communicator
        try:
            communicator.check(self._dense[0])
        except IncompatiblePartsError:  # it carries compressed payloads only
            self._dense = self._dense[0], communicators.get("allreduce").create()

    def parts_for(self, spec: TensorSpec) -> tuple[Compressor, Memory, Communicator]:
        """The parts that a tensor of this shape really goes through: dense where its payload would not be smaller."""
        dense = spec.size and self.compressor.sends_dense(spec)
        compressor, communicator = self._dense if dense else (self.compressor, self.communicator)
        return compressor, self.memory, communicator

    def nbytes(self, spec: TensorSpec, size: int = 2) -> int:
        """Upper bound of the bytes that one of `size` ranks hands to collectives for such a tensor, bucket headers excluded."""
        compressor, memory, communicator = self.parts_for(spec)
        return memory.sends * communicator.input_bytes(compressor, spec, size) if spec.size else 0

    def to_config(self) -> dict[str, Any]:
        """A JSON-safe dictionary; `grace(g.to_config()) == g`."""
        return {
            "compressor": self.compressor.to_config(),
            "memory": self.memory.to_config(),
            "communicator": self.communicator.to_config(),
            "seed": self.seed,
        }

    def bind(self, named_parameters: Any, *, optimizer: Any = None, op: Any = None, process_set: Any = None, simulate: bool = False) -> Any:
        """A `compression=` object for unmodified Horovod: `horovod.torch.DistributedOptimizer` of this model, given
        model.named_parameters(), or `horovod.tensorflow.DistributedGradientTape` over these tf.Variables.

        `op` and `process_set` must be the ones given to Horovod, which does not pass them on; `optimizer` (torch) gives the learning rate
        to memories that use it; `simulate` (torch) compresses at world size 1 too (there Horovod itself never calls the object, so it
        needs `optimizer`). One bound object serves one optimizer or tape."""
        items = list(named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters)
        if not items:
            raise UnboundError("bind got no parameters; a generator can be used once, so call model.named_parameters() again")
        packages = {type(x).__module__.split(".")[0] for item in items for x in (item if isinstance(item, tuple) else (item,))}
        if "torch" in packages:
            from .frameworks.torch.adapter import bind

            return bind(self, items, optimizer=optimizer, op=op, process_set=process_set, simulate=simulate)
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
        memory = "" if self.memory.name == "none" else f" + {self.memory}"
        return f"{self.compressor}{memory} @ {self.communicator}"

    def __repr__(self) -> str:
        return f"grace({str(self)!r})" if not self.seed else f"grace({str(self)!r}, seed={self.seed})"


UNBOUND = (
    "{!r} is not bound to a model. Import the wrapper in place of Horovod's: `import grace_ext.frameworks.torch as hvd` (for TensorFlow "
    "`import grace_ext.frameworks.tensorflow as hvd`), or with plain horovod.torch pass compression=g.bind(model.named_parameters())"
)


def grace(
    spec: str | Mapping[str, Any] | Grace | None = None,
    *,
    compressor: Any = None,
    memory: Any = None,
    communicator: Any = None,
    seed: int | None = None,
) -> Grace:
    """Three parts by name.

    `spec` is a string ('topk(ratio=0.01) + residual @ allgather') or a configuration (`to_config()`); or the parts are given by keyword,
    as names, configurations or instances. The memory defaults to none (with one warning where the compressor is biased), the
    communicator to the compressor's natural one: allreduce where payloads can be summed, else allgather. `seed` is the base of all
    randomness and must be the same on all ranks.
    Raises UnknownPartError, ParameterError, SpecSyntaxError or IncompatiblePartsError.
    """
    if isinstance(spec, Grace):
        spec = spec.to_config()
    given: dict[str, Any] = {"compressor": compressor, "memory": memory, "communicator": communicator}
    if spec is not None:
        if any(value is not None for value in given.values()):
            raise SpecSyntaxError("give a spec, or the parts by keyword, not both")
        given, seed = _from_spec(spec, seed)
    if given.get("compressor") is None:
        raise SpecSyntaxError("name a compressor, one of: " + ", ".join(compressors.names()))
    chosen = part_from(compressors, given["compressor"])
    remembers = part_from(memories, given.get("memory") or "none")
    natural = "allreduce" if chosen.summable else "allgather"
    result = Grace(chosen, remembers, part_from(communicators, given.get("communicator") or natural), _seed(seed))
    if given.get("memory") is None and chosen.wants_memory and str(chosen) not in _warned:
        _warned.add(str(chosen))
        warnings.warn(
            f"{chosen} is biased and has no memory: what it drops is lost, and training may stall. Add error feedback: "
            f"'{chosen} + residual' (or say '+ none' if this is meant)",
            BiasedCompressorWarning,
            stacklevel=2,
        )
    omega = chosen.omega(4096) if chosen.unbiased and remembers.feeds_back else None
    if omega is not None and omega >= 1 and str(result) not in _warned:
        _warned.add(str(result))
        warnings.warn(
            f"{chosen} is random, with a variance of up to {omega:.3g} times its input: what {remembers.name!r} remembers of it can grow "
            "without bound. Use memory 'none' or 'diana' with it, or a contraction such as 'topk > qsgd'",
            UnstableFeedbackWarning,
            stacklevel=2,
        )
    return result


def _from_spec(spec: str | Mapping[str, Any], seed: int | None) -> tuple[dict[str, Any], int | None]:
    if isinstance(spec, str):
        return dict(parse(spec)), seed
    if not isinstance(spec, Mapping):
        raise SpecSyntaxError(f"a spec is a string or a dictionary, got {spec!r}")
    unknown = sorted(set(spec) - {"compressor", "memory", "communicator", "seed"})
    if unknown:
        raise SpecSyntaxError(f"unknown key {', '.join(map(repr, unknown))}; a configuration has compressor, memory, communicator, seed")
    return {key: spec.get(key) for key in ("compressor", "memory", "communicator")}, spec.get("seed") if seed is None else seed


def _seed(seed: Any) -> int:
    seed = 0 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed must be a whole number, got {seed!r}")
    return seed


# GRACE's keys -> (kind, our knob), for the parts that have such a knob.
PARAMS = {
    "compress_ratio": ("compressor", "ratio"),
    "compress_rank": ("compressor", "rank"),
    "quantum_num": ("compressor", "levels"),
    "threshold": ("compressor", "threshold"),
    "quantiles": ("compressor", "quantiles"),
    "error_bound": ("compressor", "bound_exponent"),
    "momentum_factor": ("compressor", "momentum"),
    "momentum": ("memory", "momentum"),
    "gradient_clipping": ("memory", "clipping"),
    "lr": (None, None),  # ours read the optimizer's current rate at every step
    "world_size": (None, None),  # known from the engine
}


def _renamed(params: Mapping[str, Any]) -> dict[str, Any]:
    """What GRACE's values are called here, where that is not the same."""
    changed: dict[str, Any] = {}
    if params.get("communicator") == "all_to_all":
        changed["communicator"] = "reduce_scatter"
    clipping = params.get("gradient_clipping")
    if clipping is False:
        changed["gradient_clipping"] = None
    elif clipping is True:
        raise ParameterError("gradient_clipping: give the norm that gradients of the whole model are rescaled to (times sqrt(n)), not True")
    if "error_bound" in params:
        changed["error_bound"] = _exponent(params["error_bound"])
    if params.get("momentum_factor") and params.get("compressor") != "signum":
        warnings.warn("from_params: momentum_factor has no effect; give the momentum to the optimizer", stacklevel=3)
    return changed


def _exponent(bound: Any) -> int:
    """E of GRACE's 'error_bound' 2e-E, which stands for 2**-E."""
    try:
        return round(-math.log10(float(bound) / 2))
    except (TypeError, ValueError):
        raise ParameterError(f"error_bound must be a number like 2e-10 (for 2**-10), got {bound!r}") from None


def from_params(params: Mapping[str, Any]) -> Grace:
    """A Grace from GRACE's own parameter dictionary, e.g. {'compressor': 'topk', 'memory': 'residual', 'communicator': 'allgather',
    'compress_ratio': 0.01}. A missing key takes OUR default, said once; `lr` and `world_size` are
    read from the optimizer and the engine."""
    params = {**params, **_renamed(params)}
    known = {"compressor", "memory", "communicator", *PARAMS}
    unknown = sorted(set(params) - known)
    if unknown:
        raise ParameterError(f"unknown key {', '.join(map(repr, unknown))} in GRACE parameters; known: {', '.join(sorted(known))}")
    kinds = {"compressor": compressors, "memory": memories, "communicator": communicators}
    classes = {kind: module.get(params[kind]) for kind, module in kinds.items() if params.get(kind) is not None}
    if "compressor" not in classes:
        raise ParameterError("GRACE parameters need a 'compressor', one of: " + ", ".join(compressors.names()))
    knobs: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for key, value in params.items():
        kind, name = PARAMS.get(key, (None, None))
        # GRACE's dictionary is shared by all its parts: 'momentum' is also signum's, and keys of parts not in use are ignored.
        for candidate in [kind, "compressor"] if key == "momentum" else [kind]:
            if candidate in classes and name in {f.name for f in dataclasses.fields(classes[candidate])}:
                knobs[candidate][name] = value
                break
    defaults = {
        f"{kind} {cls.name}: {f.name}={f.default!r}"
        for kind, cls in classes.items()
        for f in dataclasses.fields(cls)
        if f.name not in knobs[kind] and f.name in {ours for _, ours in PARAMS.values()}
    }
    if defaults and str(sorted(defaults)) not in _warned:
        _warned.add(str(sorted(defaults)))
        warnings.warn("from_params: keys that are missing take grace_ext's defaults: " + ", ".join(sorted(defaults)), stacklevel=2)
    parts = {kind: cls.create((), knobs[kind]) for kind, cls in classes.items()}
    return grace(**parts)
