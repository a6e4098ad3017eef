"""Chooses the specs that a plan compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..composition.grace import Grace
from ..composition.making import grace
from ..errors import ParameterError, UnsupportedError
from ..parts.spec import parse

DENSE = "none"


#: The specs that are compared if the user names none: dense, and settings that keep their accuracy on the tasks of docs/accuracy.md.
CANDIDATES = (
    DENSE, "fp16", "qsgd(bits=8)", "qsgd(bits=4)", "efsignsgd + residual", "topk(ratio=0.01) + residual",
    "powersgd(rank=4) + residual",
)  # fmt: skip


def completed(text: str) -> Grace:
    """Returns what a spec stands for in `plan` and `bench`: a compressor that is given without a memory gets its natural one."""
    parts: dict[str, Any] = dict(parse(text))
    if "privacy" in parts:
        raise UnsupportedError(f"{text}: noise changes neither bytes nor collectives, so plan and time what stands behind '|'")
    if "policy" in parts or "memory" in parts:
        return grace(text)
    return grace(**parts, memory=parts["compressor"].natural_memory)


def completions(texts: Sequence[str]) -> list[str]:
    """Returns a sentence for each spec that `completed` gives a memory. Raises an error for the first one that is not valid."""
    graces = {text: completed(text) for text in texts}
    without = [text for text in graces if not parse(text).keys() & {"policy", "memory"} and graces[text].memory.name != "none"]
    return [f"{text} was given no memory, so it has its natural one: {graces[text]}" for text in without]


def candidates(texts: Sequence[str], n: int, per_node: int = 1) -> dict[str, Grace]:
    """Returns the specs to compare, by their full text, dense first. If none is named: CANDIDATES; for more than 4 workers, one with
    reduce_scatter; and for several nodes of several workers, all CANDIDATES in two levels. Raises ParameterError."""
    levels = [f"{text} @ hierarchical" for text in CANDIDATES] if 1 < per_node < n else []
    chosen = list(texts) or [*CANDIDATES, *(["efsignsgd + residual @ reduce_scatter"] if n > 4 else []), *levels]
    graces = [grace(DENSE), *map(completed, chosen)]
    changing = next((g for g in graces if g.route.changes), None)
    if changing:
        among = ", ".join(f"'{leaf}'" for leaf in changing.leaves)
        raise ParameterError(f"{changing} changes from step to step, and a plan predicts one step; compare what it chooses from: {among}")
    for g in graces:
        _check_period(g)
    return {str(g): g for g in graces}


def _check_period(g: Grace) -> None:
    """Raises ParameterError for a part with a knob '..._period': it periodically exchanges something else, which the recorded steps may
    not contain."""
    for part in (part for leaf in g.leaves for part in (leaf.compressor, leaf.memory)):
        knob = next((field.name for field in fields(part) if field.name.endswith("_period") and getattr(part, field.name) > 1), None)
        if knob:
            raise ParameterError(
                f"{g}: {part.name} exchanges something else every {getattr(part, knob)} steps ({knob}), and a plan predicts one step; "
                "compare parts without a period, such as 'powersgd + residual' or 'topk + residual', and add the cost of the periodic "
                "exchange yourself"
            )
