"""Reads a state that was saved: checks that it belongs to this exchange, takes what this rank may use, and fills in what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import GraceError, few
from ..exchange.tensor import initial_state
from ..exchange.transport import Transport
from ..parts.ops import Array, Ops
from ..parts.state import is_own
from ..parts.tensor import StepInfo, TensorSpec
from .choices import Choices

States = dict[str, dict[str, Array]]
VERSION = 1


def flattened(ops: Ops, states: States) -> dict[str, Array]:
    """Returns copies of all arrays, by 'key/parameter'."""
    return {f"{key}/{name}": ops.copy(array) for name, state in states.items() for key, array in state.items()}


def read(ops: Ops, choices: Choices, transport: Transport, saved: Mapping[str, Any]) -> States:
    """Returns copies of a saved state's arrays, by parameter and key. Of another rank's state, only what all ranks share is taken. Raises
    GraceError if the state is not for this exchange."""
    grace = choices.grace
    if saved.get("version") != VERSION:
        raise GraceError(f"this state has version {saved.get('version')!r}, expected {VERSION}")
    if saved["spec"] != str(grace):
        raise GraceError(f"this state was saved with {saved['spec']!r}, the exchange is {str(grace)!r}")
    if saved["size"] != transport.size:
        raise GraceError(
            f"this state was saved by one of {saved['size']} ranks, there are {transport.size}; save with grace_ext.save, "
            "and grace_ext.load(..., resize='mean') fits it to another number of ranks, or leave it out to start with an empty memory"
        )
    foreign = saved["rank"] != transport.rank
    together = [memory.name for memory in grace.memories if not memory.resumes_alone]
    if foreign and saved["state"] and together:
        raise GraceError(
            f"this state was saved by rank {saved['rank']} and this is rank {transport.rank}: memory "
            f"{together[0]!r} keeps on every rank what belongs together; save and load the state of every rank, or leave it "
            "out to start anew"
        )
    shared = choices.shared()
    states: States = {}
    for key, array in saved["state"].items():
        part, name = key.split("/", 1)
        states.setdefault(name, {}).update({part: ops.copy(array)} if not foreign or part in shared or is_own(part) else {})
    return states


def check(ops: Ops, choices: Choices, specs: Mapping[str, TensorSpec], info: StepInfo, states: States, *, fill: bool) -> None:
    """Raises GraceError if the states do not fit these parameters. `fill`: adds keys that are missing, as at the first step.
    Without parameters there is nothing that it must fit: a caller forgets them so, after an error that must not be hidden by another."""
    if not specs:
        return
    for name, arrays in states.items():
        if name not in specs:
            raise GraceError(f"the state has memory for {name!r}, and there is no such parameter; there are: {few(specs)}")
        spec = specs[name]
        if choices.grace.policy:
            allowed = choices.lengths(ops, spec, info) if spec.size else {}
            odd = {key: len(array) for key, array in arrays.items() if len(array) not in allowed.get(key, ())}
            if odd:
                raise GraceError(f"the state of {name!r} has {odd} elements, possible are {allowed}")
            continue
        expected = initial_state(ops, spec, choices.grace.parts_for(spec), info) if spec.size else {}
        if fill:
            arrays.update({key: array for key, array in expected.items() if key not in arrays})
        shapes, found = ({key: len(array) for key, array in x.items()} for x in (expected, arrays))
        if shapes != found:
            raise GraceError(f"the state of {name!r} has {found} elements, expected {shapes}")
