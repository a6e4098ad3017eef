"""Makes a failing case of mix_fuzz.py smaller, as long as it fails in the same way."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from grace_ext.composition.composition import Composition, Route
from grace_ext.composition.making import compose, grace
from grace_ext.errors import GraceError
from grace_ext.parts.part import Part

from .mix_case import LR, Broken, Case, Tensor, file_of, named
from .mix_check import check


class Failure(NamedTuple):
    """How a case failed. kind: the invariant that is broken, or the error and the function that raised it; the same fault has the same."""

    kind: str
    text: str
    case: Case


def failure(case: Case, tally: Counter[str] | None = None) -> Failure | None:
    """Runs a case; returns how it failed, or None."""
    try:
        check(case, Counter() if tally is None else tally)
    except Broken as error:
        return Failure(f"{error.invariant}: {error.about}".removesuffix(": "), str(error), case)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(f"{type(error).__name__} in {file_of(frame)}: {frame.name}", named(error), case)
    return None


def shrunk(found: Failure, seconds: float = 30) -> Failure:
    """Returns the smallest case that was found within this time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for case in smaller(found.case):
            other = failure(case)
            if other and other.kind == found.kind:
                found = other
                break
            if time.monotonic() > until:
                break
        else:
            break
    return found


def smaller(case: Case) -> Iterator[Case]:
    """Yields cases that are a little simpler, the greatest simplifications first."""
    if len(case.tensors) > 1:
        yield from (replace(case, tensors=(tensor,)) for tensor in case.tensors)
        yield from (replace(case, tensors=case.tensors[:i] + case.tensors[i + 1 :]) for i in range(len(case.tensors)))
    for spec in simpler(grace(case.spec).route):
        if len(str(spec)) < len(case.spec):
            yield replace(case, spec=str(spec))
    plain: dict[str, Any] = {"bad": None, "path": "", "load_at": None, "load_by": "state_dict", "per_node": 1, "seed": 0, "rates": (LR,)}
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    for name, low in (("size", 1), ("steps", case.steps if case.long and case.long != "dense" else 1)):
        for value in {low, getattr(case, name) // 2, getattr(case, name) - 1}:
            if low <= value < getattr(case, name):
                yield replace(case, **{name: value})
    if case.load_at:
        yield replace(case, load_at=case.load_at - 1)
    if case.data > 10:
        yield from (replace(case, data=data) for data in range(3))
    if case.bad and case.bad.step:
        yield replace(case, bad=replace(case.bad, step=0))
    if case.bad and (case.bad.share or case.bad.rank):
        yield replace(case, bad=replace(case.bad, share=0.0, rank=0))
    for i, tensor in enumerate(case.tensors):
        for other in _smaller_tensors(tensor, f"w{i}" if i else "w"):
            if other not in case.tensors:
                yield replace(case, tensors=(*case.tensors[:i], other, *case.tensors[i + 1 :]))


def _smaller_tensors(tensor: Tensor, name: str) -> Iterator[Tensor]:
    if tensor.name != name:
        yield replace(tensor, name=name)
    sizes = [(2,), (3,), (7,), (17,), (3, 2), (7, 3), (64,), (24, 18), (401,)]
    elements = [_size(shape) for shape in (*sizes, tensor.shape)]
    yield from (replace(tensor, shape=shape) for shape, size in zip(sizes, elements, strict=False) if size < elements[-1])
    if tensor.dtype != "float32":
        yield replace(tensor, dtype="float32")
    yield from (replace(tensor, kind=kind) for kind in ("constant", "normal")[: {"constant": 0, "normal": 1}.get(tensor.kind, 2)])


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def simpler(route: Route) -> Iterator[Route]:
    """Yields routes that are part of this one, or have one knob less."""
    if isinstance(route, Composition):
        yield from _simpler_compositions(route)
        return
    policy: Any = route
    yield from policy.children()
    yield from route.leaves[:4]
    yield from (part for part in simpler_parts(policy) if isinstance(part, Route))


def _simpler_compositions(route: Composition) -> Iterator[Composition]:
    parts: dict[str, Any] = {"compressor": route.compressor, "memory": route.memory, "communicator": route.communicator}
    changes: list[tuple[str, Any]] = [("communicator", None), ("memory", "none")]
    changes += [("compressor", "topk(ratio=0.25)"), ("compressor", "none")]
    changes += [(kind, part) for kind, whole in parts.items() for part in simpler_parts(whole)]
    for kind, part in changes:
        try:
            yield compose(**{**parts, kind: part})
        except GraceError:
            continue


def simpler_parts(part: Part) -> Iterator[Part]:
    """Yields the part with one knob at its default, or with a simpler part in one knob; and, of a compressor, the parts in its knobs."""
    for field in dataclasses.fields(part):
        value, choices = getattr(part, field.name), []
        if "make" not in field.metadata:
            choices = [field.default] if value != field.default else []
        elif isinstance(value, Route):
            choices = list(simpler(value))
        elif isinstance(value, Part):
            choices = list(simpler_parts(value))
            yield from [value] if value.kind == part.kind else []
        elif isinstance(value, tuple):  # of patterns with routes, or of specs
            choices = [value[:i] + value[i + 1 :] for i in range(len(value))]
            pairs = [(i, pair) for i, pair in enumerate(value) if isinstance(pair, tuple)]
            choices += [(*value[:i], (pattern, r), *value[i + 1 :]) for i, (pattern, route) in pairs for r in simpler(route)]
        for choice in choices:
            try:
                yield replace(part, **{field.name: choice})
            except GraceError:
                continue
