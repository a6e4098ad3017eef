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


def _owner(compressor: Any) -> Any:
    return compressor.select if compressor.name == "pipeline" else compressor
