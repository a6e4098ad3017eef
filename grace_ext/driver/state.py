"""Reads a state that was saved: checks that it belongs to this exchange, takes what this rank may use, and fills in what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..composition.composition import Query
from ..composition.grace import Grace
from ..errors import GraceError, few, shown
from ..exchange.tensor import initial_state
from ..exchange.transport import Transport
from ..parts.ops import Array, Ops
from ..parts.state import is_own
from ..parts.tensor import StepInfo, TensorSpec
from .choices import Choices

States = dict[str, dict[str, Array]]
VERSION = 1
#: The entries of Driver.state_dict() that are numbers.
COUNTS = ("rank", "size", "step")
#: The dtypes that parts' arrays have (parts/ops.py).
DTYPES = ("float32", "float64", "int64", "uint8")


def flattened(ops: Ops, states: States) -> dict[str, Array]:
    """Returns copies of all arrays, by 'key/parameter'."""
    return {f"{key}/{name}": ops.copy(array) for name, state in states.items() for key, array in state.items()}


def check_form(saved: Any) -> None:
    """Raises GraceError unless this has the form of Driver.state_dict(), with flat arrays of any library."""
    if not isinstance(saved, Mapping):
        raise GraceError(f"a state must be the dictionary that state_dict() returned, got {shown(saved, 80)}")
    lacking = [key for key in ("version", "spec", *COUNTS, "state") if key not in saved]
    if lacking:
        raise GraceError(f"this state lacks {few(map(repr, lacking))}, so it is not what state_dict() returned; it has {_names(saved)}")
    if saved["version"] != VERSION:
        raise GraceError(f"this state has version {shown(saved['version'], 40)}, expected {VERSION}")
    for key in COUNTS:
        check_count(saved, key)
    check_arrays(saved["state"])


def check_count(saved: Mapping[str, Any], key: str) -> None:
    """Raises GraceError unless this entry is a whole number that counts something."""
    number, least = saved[key], int(key == "size")
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise GraceError(f"this state has {key} {shown(number, 40)}, expected a whole number, at least {least}")


def check_arrays(arrays: Any) -> None:
    """Raises GraceError unless this maps 'key/parameter' to flat arrays, of any library."""
    if not isinstance(arrays, Mapping):
        raise GraceError(f"a state's arrays must be a dictionary by 'key/parameter', got {shown(arrays, 80)}")
    for path, array in arrays.items():
        if not isinstance(path, str) or "/" not in path:
            raise GraceError(
                f"a state's arrays must be a dictionary by 'key/parameter', as state_dict() returns it; it has {shown(path, 80)}"
            )
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise GraceError(f"{_place(path)} is a {type(array).__name__}, expected an array as state_dict() returned it: convert it")
        if len(array.shape) != 1 or _dtype(array) not in DTYPES:
            raise GraceError(f"{_place(path)} is {_kind(array)}, expected a flat array of {', '.join(DTYPES)}, as state_dict() returned it")


def read_arrays(ops: Ops, arrays: Any) -> dict[tuple[str, str], Array]:
    """Returns copies of a state's arrays, by key and parameter. Raises GraceError for an array of another library, and for NaN or Inf: a
    step with such values is never committed. (A policy's own values, sums of gradients for example, may overflow.)"""
    check_arrays(arrays)
    library, found = type(ops.zeros(0)), {}
    for path, array in arrays.items():
        key, name = path.split("/", 1)
        if not isinstance(array, library):
            has, expected = (f"{kind.__module__}.{kind.__qualname__}" for kind in (type(array), library))
            raise GraceError(f"{_place(path)} is a {has}, but this exchange keeps {expected}: convert it")
        if not is_own(key) and _dtype(array).startswith("float") and not ops.all_finite(array):
            raise GraceError(
                f"{_place(path)} has NaN or Inf, and no step with such values is ever kept: the state was damaged after it was saved. Load "
                "an older one, or leave it out to start with an empty memory"
            )
        found[key, name] = ops.copy(array)
    return found


def read(ops: Ops, grace: Grace, transport: Transport, saved: Mapping[str, Any], op: str) -> States:
    """Returns copies of a saved state's arrays, by parameter and key. Of another rank's state, only what all ranks share is taken. Raises
    GraceError if the state is not for this exchange."""
    check_form(saved)
    _check_exchange(grace, transport, saved, op)
    foreign, shared = saved["rank"] != transport.rank, Choices(grace).shared()
    states: States = {}
    for (key, name), array in read_arrays(ops, saved["state"]).items():
        states.setdefault(name, {}).update({key: array} if not foreign or key in shared or is_own(key) else {})
    return states


def _check_exchange(grace: Grace, transport: Transport, saved: Mapping[str, Any], op: str) -> None:
    """Raises GraceError if the state is not of this exchange, or of ranks whose state this rank cannot take."""
    if saved["spec"] != str(grace):
        raise GraceError(f"this state was saved with {shown(saved['spec'])}, the exchange is {str(grace)!r}")
    if grace.privacy is not None:
        if "releases" not in saved:
            raise GraceError("this state lacks 'releases', which says how often gradients were made private, so epsilon would be wrong")
        check_count(saved, "releases")
    if saved["size"] != transport.size:
        raise GraceError(
            f"this state was saved by one of {saved['size']} ranks, there are {transport.size}; save with grace_ext.save, "
            "and grace_ext.load(..., resize='mean') fits it to another number of ranks, or leave it out to start with an empty memory"
        )
    mine: dict[str, Any] = {"seed": grace.seed, **({"op": op} if transport.size > 1 else {})}  # of one rank, mean and sum are the same
    for key, expected in mine.items():
        if saved.get(key, expected) != expected:
            raise GraceError(
                f"this state was saved with {key} {shown(saved[key], 40)}, the exchange has {key} {expected!r}: they must be the same, or "
                "training goes on otherwise than it was; change the exchange, or leave the state out to start with an empty memory"
            )
    together = [memory.name for memory in grace.memories if not memory.resumes_alone]
    if saved["rank"] != transport.rank and saved["state"] and together:
        raise GraceError(
            f"this state was saved by rank {saved['rank']} and this is rank {transport.rank}: memory "
            f"{together[0]!r} keeps on every rank what belongs together; save and load the state of every rank, or leave it "
            "out to start anew"
        )


def check(
    ops: Ops, grace: Grace, specs: Mapping[str, TensorSpec], info: StepInfo, states: States, *, fill: bool, partial: bool = False
) -> None:
    """Raises GraceError if the states do not fit these parameters at this step. `fill`: adds keys that are missing, as at the first step.
    `partial`: some of the parameters may get no gradient, and then have no state; nothing is added yet.
    Without parameters there is nothing that it must fit: a caller forgets them so, after an error that must not be hidden by another.
    Without states there is nothing to check: no step was committed yet."""
    if not specs or not any(states.values()):
        return
    unknown = [name for name in states if name not in specs]
    if unknown:
        raise GraceError(f"the state has memory for {few(map(repr, unknown))}, and there is no such parameter; there are: {few(specs)}")
    choices = Choices(grace, specs.values())
    for name, spec in specs.items():
        arrays = states.get(name, {})
        leaves, own = ([], {}) if spec.empty else choices.forms(ops, spec, info)
        for key, array in arrays.items():
            if spec.empty and not len(array):
                continue  # of an empty tensor there is nothing to keep
            allowed = {form for forms in (*leaves, own) for form in forms.get(key, ())}
            if not allowed:
                raise GraceError(
                    f"the state of {name!r} has {key!r}, which this exchange does not keep for it; it keeps {_names(*leaves, own)}"
                )
            if (len(array), array.dtype) not in allowed:
                expected = " or ".join(sorted(f"{dtype}[{length}]" for length, dtype in allowed))
                raise GraceError(f"the state of {name!r} has {key!r} as {_kind(array)}, expected {expected}".replace("torch.", ""))
        lacking = [sorted({*leaf, *own} - set(arrays)) for leaf in leaves]
        if fill and not partial and leaves and not grace.policy:  # with a policy, `Choices.fitting` does it
            states[name] = {**initial_state(ops, spec, grace.parts_for(spec), info), **arrays}
        elif not fill and (arrays or not partial) and lacking and all(lacking):
            raise GraceError(f"the state of {name!r} lacks {few(map(repr, lacking[0]))}: it has not all that a step leaves")
        _check_choice(grace, spec, info.step, arrays)


def _check_choice(grace: Grace, spec: TensorSpec, step: int, arrays: Mapping[str, Array]) -> None:
    """Raises GraceError if a policy cannot choose by what the state says it has learnt, the number of a choice that there is not."""
    try:
        grace.route.choose(Query(spec, step, arrays))
    except (ValueError, LookupError, OverflowError) as error:
        found = {key: [float(x) for x in array[:3]] for key, array in arrays.items() if is_own(key)}
        raise GraceError(f"the state of {spec.name!r} has {shown(found)}, by which no spec can be chosen: {error}") from None


def _names(*mappings: Mapping[Any, Any]) -> str:
    """Returns the mappings' keys as text."""
    return few(shown(key, 40) for key in dict.fromkeys(key for mapping in mappings for key in mapping)) or "nothing"


def _place(path: str) -> str:
    """Names an array by its place in the entry 'state'."""
    key, name = path.split("/", 1)
    return f"the state's {shown(key, 40)} of {shown(name)}"


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _kind(array: Any) -> str:
    """Returns an array's dtype and shape in words."""
    return f"{_dtype(array)}{list(array.shape)}"
