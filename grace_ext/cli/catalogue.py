"""Describes every part, from its class, for `grace-ext list` and `show` and for the pages of docs/parts."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .. import communicators, compressors, memories, policies
from ..errors import IncompatiblePartsError
from ..parts.part import Part, valid_range
from ..parts.tensor import TensorSpec

KINDS: dict[str, Any] = {"compressor": compressors, "memory": memories, "communicator": communicators, "policy": policies}
#: The gradient whose bytes on the wire are listed.
SAMPLE = TensorSpec("gradient", (1000, 1000))
TRAITS = ("summable", "unbiased", "wants_memory", "selects", "whole_model", "uses_lr", "is_momentum", "diverges")


def describe(kind: str, name: str) -> dict[str, Any]:
    """Describes a part from its class, in JSON types."""
    cls = KINDS[kind].get(name)
    part, text = cls.create(), inspect.cleandoc(cls.__doc__ or "")
    knobs = [
        {"name": f.name, "default": plain(f.default), "range": valid_range(f), "help": f.metadata["help"]} for f in dataclasses.fields(cls)
    ]
    found: dict[str, Any] = {"kind": kind, "name": name, "summary": text.splitlines()[0], "text": text, "knobs": knobs}
    found["properties"] = {trait: bool(getattr(part, trait)) for trait in TRAITS if hasattr(part, trait)}
    if kind == "compressor":
        found["properties"]["votes"] = part.result == "vote"
        found["rounds"] = list(part.rounds)
        found["bits_per_element"] = 8 * part.mean_nbytes(SAMPLE) / SAMPLE.size
        found["natural"] = {"memory": part.natural_memory, "communicator": "allreduce" if part.summable else "allgather"}
    if kind == "policy":
        found["properties"] = {"learns": part.learns, "changes with the step": part.changes}
        return found
    for other in KINDS:
        if other not in (kind, "policy"):
            found[other + "s" if other != "memory" else "memories"] = [n for n in KINDS[other].names() if fits(kind, name, other, n)]
    return found


def fits(kind: str, name: str, other_kind: str, other: str) -> bool:
    """Whether two parts of different kinds can be combined, with their default knobs."""
    parts = {kind: KINDS[kind].get(name).create(), other_kind: KINDS[other_kind].get(other).create()}
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
    """Returns a knob's default as a JSON type: a part as its spec string."""
    return str(value) if isinstance(value, Part) else value
