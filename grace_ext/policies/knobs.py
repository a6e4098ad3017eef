"""Finds and changes the knob that says how much a composition's compressor sends, for policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import IncompatiblePartsError

if TYPE_CHECKING:
    from ..composition.composition import Composition


def knob_of(composition: Composition, names: Sequence[str], asker: str) -> tuple[str, Any]:
    """Returns (name, value) of the first of these knobs that is set in the compressor, or in the selecting one of a pipeline. Raises
    IncompatiblePartsError if none is; the error names `asker`."""
    owner = _owner(composition.compressor)
    for name in names:
        value = getattr(owner, name, None) if name in {field.name for field in dataclasses.fields(owner)} else None
        if value is not None:
            return name, value
    if "bits" in names and owner.name == "qsgd" and owner.levels is None:
        return "bits", owner.DEFAULT_BITS
    raise IncompatiblePartsError(
        f"{asker} changes {' or '.join(names)} of a compressor, and {composition.compressor} has none that is set; use one such as "
        "topk(ratio=0.01), powersgd(rank=4) or qsgd(bits=4)"
    )


def with_value(composition: Composition, name: str, value: Any) -> Composition:
    """Returns the composition with another value of that knob."""
    compressor = composition.compressor
    owner: Any = dataclasses.replace(_owner(compressor), **{name: value})
    if compressor.name == "pipeline":
        owner = dataclasses.replace(compressor, select=owner)  # type: ignore[call-arg]
    return dataclasses.replace(composition, compressor=owner)


def allowed(composition: Composition, name: str, value: float) -> float:
    """Returns the value of that knob that is nearest to this one, of those that the compressor allows."""
    rule = next(field.metadata for field in dataclasses.fields(_owner(composition.compressor)) if field.name == name)
    if rule["choices"]:
        return min(rule["choices"], key=lambda choice: abs(choice - value))
    low, high = (limit if limit is not None else value for limit in (rule["low"], rule["high"]))
    return min(max(value, low), high)


def _owner(compressor: Any) -> Any:
    return compressor.select if compressor.name == "pipeline" else compressor
