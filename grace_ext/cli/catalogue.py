"""Describes parts, from what they declare of themselves, for `grace-ext list` and `show` and for the pages of docs/parts."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .. import communicators, compressors, memories, policies
from ..compressors.base import Compressor
from ..errors import IncompatiblePartsError
from ..parts.part import Part, valid_range
from ..parts.tensor import TensorSpec
from ..policies.base import Policy

KINDS: dict[str, Any] = {"compressor": compressors, "memory": memories, "communicator": communicators, "policy": policies}
#: The gradient whose bytes on the wire are listed.
SAMPLE = TensorSpec("gradient", (1000, 1000))
TRAITS = ("summable", "unbiased", "wants_memory", "selects", "whole_model", "uses_lr", "is_momentum", "diverges")


def describe(part: Part) -> dict[str, Any]:
    """Describes a part, with its knobs as they are, in JSON types."""
    kind, text = part.kind, inspect.cleandoc(type(part).__doc__ or "")
    usual = type(part).create()
    knobs = [
        {"name": f.name, "default": plain(f.default), "value": plain(value), "range": valid_range(f), "help": f.metadata["help"]}
        for f in dataclasses.fields(part)
        for value in [f.default if getattr(part, f.name) == getattr(usual, f.name) else getattr(part, f.name)]
    ]
    found: dict[str, Any] = {"kind": kind, "name": part.name, "summary": text.splitlines()[0], "text": text, "knobs": knobs}
    found["spec"] = part.name if part == usual else str(part)
    found["properties"] = {trait: bool(getattr(part, trait)) for trait in TRAITS if hasattr(part, trait)}
    if isinstance(part, Compressor):
        found["properties"]["votes"] = part.result == "vote"
        found["rounds"] = list(part.rounds)
        found["bits_per_element"] = 8 * part.mean_nbytes(SAMPLE) / SAMPLE.size
        found["natural"] = {"memory": part.natural_memory, "communicator": "allreduce" if part.summable else "allgather"}
    if isinstance(part, Policy):
        found["properties"] = {"learns": part.learns, "changes with the step": part.changes}
        return found
    if kind not in KINDS:  # every part can follow a mechanism of privacy
        return found
    for other in KINDS:
        if other not in (kind, "policy"):
            names = [n for n in KINDS[other].names() if fits(part, KINDS[other].get(n).create())]
            found[other + "s" if other != "memory" else "memories"] = names
    return found


def fits(one: Part, other: Part) -> bool:
    """Whether two parts of different kinds can be combined."""
    parts: dict[str, Any] = {one.kind: one, other.kind: other}
    compressor = parts.pop("compressor", None)
    try:
        if compressor is None:
            parts["communicator"].check_memory(parts["memory"])
        for partner in parts.values() if compressor else ():
            partner.check(compressor)
    except IncompatiblePartsError:
        return False
    return True


def plain(value: Any) -> Any:
    """Returns a knob's value as a JSON type: parts and specs as text."""
    return str(value) if hasattr(value, "to_config") else value
