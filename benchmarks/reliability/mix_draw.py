"""Draws random cases for mix_fuzz.py: specs over all registered parts, models, kinds of gradients, and what happens to a run."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from grace_ext.composition.composition import Composition, Route
from grace_ext.composition.making import grace
from grace_ext.errors import IncompatiblePartsError, ParameterError, SpecSyntaxError
from grace_ext.parts.part import Part, valid_range
from grace_ext.parts.registry import Registry, communicators, compressors, memories, policies
from grace_ext.testing.inputs import DTYPES

from .mix_case import LR, Bad, Case, Tensor

#: How composing says that parts do not fit, or that a knob's value does not.
REFUSALS = (IncompatiblePartsError, ParameterError, SpecSyntaxError)
NAMES = ("w", "b", "layer.0.weight", "layer.0.bias", "a/b", "a:0", "größe", "層.重み", "x y", "q[0]", "", ".", "*", "a'b\"", "n\nm",
         "policy:s")  # fmt: skip
PATTERNS = ("*", "*.bias", "*weight", "[a-m]*", "?", "*:0", "größe", "layer.*", "")
SHAPES = ((), (1,), (2,), (3,), (7,), (17,), (64,), (401,), (1000,), (2049,), (0,), (0, 3), (1, 1), (1, 50), (50, 1), (7, 3), (24, 18),
          (33, 17), (3, 2, 3, 3), (2, 1, 40))  # fmt: skip
KINDS = ("normal", "grid", "sparse", "zeros", "constant", "tiny", "subnormal", "huge", "wide", "one rank")
#: The largest whole number that a knob is given: what costs time and memory in proportion stays cheap.
MOST = 300
#: How a run is repeated; its bits must be the same. The weights are by how long each takes.
PATHS = {"plain": 5, "in place": 4, "torch": 3, "torch in place": 3, "device": 1, "tensorflow": 2, "metrics": 2, "buckets": 2, "": 1}


# --- specs ------------------------------------------------------------------------------------------------------------
def a_number(field: dataclasses.Field[Any], rng: random.Random) -> Any:
    """Returns a value in a numeric knob's range: often near the range's start, seldom at its ends."""
    rule, kind = field.metadata, field.metadata.get("kind") or type(field.default)
    low = rule["above"] if rule["low"] is None else rule["low"]
    low, high = low or 0, rule["high"] or float("inf")
    if kind is float:
        if high <= 1:
            return min(high, rng.choice([rng.uniform(low, high), 10 ** rng.uniform(-3, 0), 0.25]))
        return min(high, max(rule["low"] or 0, 10 ** rng.uniform(-2, 1.5)))
    most = int(min(high, MOST))
    return rng.choice([rng.randint(low, min(most, low + 5)), rng.randint(low, min(most, low + 5)), rng.randint(low, most), most])


def a_knob(field: dataclasses.Field[Any], rng: random.Random, depth: int, tally: Counter[str]) -> Any:
    """Returns a value of the knob's declared range, which may still not fit the part's other knobs."""
    rule = field.metadata
    inside: dict[str, Callable[[], Any]] = {
        "a compressor": lambda: a_part(compressors, rng, 0, tally),
        "a communicator or None": lambda: a_part(communicators, rng, 0, tally),
        "a spec": lambda: a_route(rng, depth - 1, tally),
        "a spec without a policy": lambda: a_composition(rng, tally),
        "a list of specs": lambda: [str(a_composition(rng, tally)) for _ in range(rng.randint(1, 2))],
        "specs by pattern, such as {'*.bias': 'none'}": lambda: {
            pattern: a_route(rng, depth - 1, tally) for pattern in rng.sample(PATTERNS, rng.randint(1, 2))
        },
    }
    if "make" in rule:
        return inside[valid_range(field)]()
    if rule["choices"]:
        return rng.choice(rule["choices"])
    if field.default is None and rng.random() < 0.3:
        return None
    if (rule.get("kind") or type(field.default)) is bool:
        return rng.random() < 0.5
    return a_number(field, rng)


def a_part(registry: Registry, rng: random.Random, depth: int, tally: Counter[str], name: str = "") -> Part:
    """Returns a part with random knobs. Raises one of REFUSALS if they do not fit together."""
    cls = registry.get(name or rng.choice(registry.names()))
    made = {f.name: a_knob(f, rng, depth, tally) for f in dataclasses.fields(cls) if "make" in f.metadata or rng.random() < 0.4}
    return cls.create((), made)


def a_composition(
    rng: random.Random, tally: Counter[str], kept: Sequence[str] = ("residual", "none", "", ""), compressor: str = ""
) -> Composition:
    """Returns a composition whose parts fit, with one of these memories and this compressor ('': any); counts those that do not fit."""
    while True:
        try:
            parts: dict[str, Any] = {
                "compressor": a_part(compressors, rng, 0, tally, compressor),
                "memory": a_part(memories, rng, 0, tally, rng.choice(kept)),
                "communicator": a_part(communicators, rng, 0, tally) if rng.random() < 0.5 else None,
            }
            route = grace(**parts).route
        except REFUSALS:
            tally["refused"] += 1
            continue
        tally["compositions"] += 1
        assert isinstance(route, Composition)
        return route


def a_route(rng: random.Random, depth: int, tally: Counter[str]) -> Route:
    """Returns a composition, or a policy with at most `depth` policies one within the other."""
    if depth < 1 or rng.random() < 0.5:
        return a_composition(rng, tally)
    return a_part(policies, rng, depth, tally)  # type: ignore[return-value]


def a_spec(rng: random.Random, tally: Counter[str]) -> str:
    """Returns a spec that is accepted; counts those that are refused."""
    while True:
        try:
            found = str(grace(a_route(rng, 3, tally)))
        except REFUSALS:
            tally["refused"] += 1
            continue
        return found


# --- cases ------------------------------------------------------------------------------------------------------------
def a_case(seed: int, tally: Counter[str], paths: dict[str, int] = PATHS) -> Case:
    """Returns the case of a seed."""
    rng = random.Random(seed)
    if rng.random() < 0.01:
        return _a_long_case(rng, tally)
    spec = a_spec(rng, tally)
    size = rng.choice([1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 8]) if "@ hierarchical" not in spec else rng.choice([1, 2, 3, 4, 4, 6, 8])
    dtype = rng.choice(["float32"] * 4 + list(DTYPES))
    kind = "normal" if rng.random() < 0.5 else ""
    names, count = rng.sample(NAMES, len(NAMES)), rng.choice([1, 1, 2, 2, 3, 5] if size < 5 else [1, 1, 2])
    tensors = tuple(
        Tensor(names[i], rng.choice(SHAPES), dtype if rng.random() < 0.9 else rng.choice(list(DTYPES)), kind or rng.choice(KINDS))
        for i in range(count)
    )
    steps = rng.choice([2, 2, 3, 3, 4])
    bad = None
    if rng.random() < 0.3:
        share, rank = rng.choice([0.0, 0.02, 0.5, 1.0]), rng.choice([-1, rng.randrange(size)])
        bad = Bad(rng.randrange(steps), rng.randrange(count), share, rank, rng.choice([float("nan"), float("inf"), -float("inf")]))
    rates = rng.choice([(LR,)] * 4 + [(0.1, 0.05), (0.1, 0.0, 0.3), (1e-3,), (0.1, 1e-40)])
    return Case(
        spec, tensors, size, rng.choice([1, 2, size]), steps, rng.choice([0, 0, 0, 1, 2**63]), rng.randrange(2**31), rates, bad,
        rng.choices(list(paths), list(paths.values()))[0],
        rng.randrange(steps) if rng.random() < 0.5 else None, rng.choices(["state_dict", "save", "resize"], [20, 1, 1])[0],
    )  # fmt: skip


def _a_long_case(rng: random.Random, tally: Counter[str]) -> Case:
    """Returns a case of mix_long.py."""
    long = rng.choice(["unbiased", "converges", "dense", "dense", "memory"])
    if long == "memory":
        spec = a_spec(rng, tally)
    else:
        kept = {"unbiased": ("none",), "converges": ("ef21", "diana"), "dense": ("",)}[long]
        fits: dict[str, Callable[[Composition], bool]] = {
            "unbiased": lambda found: found.compressor.unbiased and found.compressor.name != "none",
            "converges": lambda found: True,
            "dense": lambda found: not found.memory.diverges and not found.memory.whole_model,
        }
        compressor = "none" if long == "dense" else ""
        while not fits[long](found := a_composition(rng, tally, kept, compressor)):
            pass
        spec = str(found)
    shape, kind = rng.choice([(7,), (50,), (401,), (24, 18)]), rng.choice(["normal", "normal", "one rank"])
    dtype = rng.choice(["float32", "float16", "bfloat16"]) if long == "memory" else "float32"
    size, steps = rng.choice([1, 2, 3, 4]), 10 if long == "dense" else 300
    data = rng.randrange(2**31)
    return Case(spec, (Tensor("w", shape, dtype, kind),), size, rng.choice([1, 2, size]), steps, rng.choice([0, 1]), data, long=long)
