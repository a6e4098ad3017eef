from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..parts.part import made_knob
from . import register
from .base import Policy, route_knob


class Patterns(tuple):
    """Holds pairs (pattern, composition or policy) in order. Its configuration is a list of pairs, because the order matters."""

    def to_config(self) -> list[list[Any]]:
        return [[pattern, route.to_config()] for pattern, route in self]

    def __str__(self) -> str:
        return "{" + ", ".join(f"{pattern!r}: {route}" for pattern, route in self) + "}"


def _patterns(value: Any) -> Patterns:
    from ..composition.making import route_from

    if isinstance(value, str):
        raise ValueError
    pairs = list(value.items()) if isinstance(value, Mapping) else [tuple(pair) for pair in value]
    if any(len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError
    return Patterns((str(pattern), route_from(route)) for pattern, route in pairs)


@register("by_name")
@dataclass(frozen=True)
class ByName(Policy):
    """Chooses the spec by parameter name (glob patterns).

    A tensor goes through the spec of the first pattern that its name matches, or through `default` if none does. Patterns are those of
    shells: * matches any text, ? one character, [ab] one of these; case matters. Names are the parameters' full ones ('encoder.0.bias').
    At the first step, rank 0 logs in 'grace_ext' each pattern that matches no parameter, and parameters that a later pattern matches too.
    The choice is the same at every step. State: none.
    Source: common practice.
    """

    patterns: Any = made_knob((), "the first pattern that matches wins", "specs by pattern, such as {'*.bias': 'none'}", _patterns)
    default: Any = route_knob("none", "spec for tensors that match no pattern")

    def _match(self, name: str) -> tuple[str, Any]:
        """Returns (the knob's name in paths, the spec) for a parameter name."""
        for number, (pattern, route) in enumerate(self.patterns):
            if fnmatchcase(name, pattern):
                return f"patterns[{number}]", route
        return "default", self.default

    def choose(self, query):
        knob, route = self._match(query.spec.name)
        return route.choose(query.under(knob))

    def branches(self, spec):
        return dict([self._match(spec.name)])

    def children(self):
        return [self.default, *(route for _, route in self.patterns)]

    @property
    def leaves(self):
        return tuple(leaf for child in self.children() for leaf in child.leaves)

    def notices(self, specs):
        said, first = [], {}
        for pattern, _ in self.patterns:
            names = [spec.name for spec in specs if fnmatchcase(spec.name, pattern)]
            if not names:
                said.append(f"by_name: {pattern!r} matches no parameter; the parameters are {some([spec.name for spec in specs])}")
            for earlier in dict.fromkeys(first[name] for name in names if name in first):
                both = [name for name in names if first.get(name) == earlier]
                said.append(f"by_name: {earlier!r} comes before {pattern!r} and takes {some(both)}, which both match")
            first = {**dict.fromkeys(names, pattern), **first}
        return said


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
