from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..parts.part import made_knob
from . import register
from .base import Policy, route_knob


class Patterns(tuple):
    """(pattern, composition or policy) in their order. Its configuration is a list of pairs, because the order counts."""

    def to_config(self) -> list[list[Any]]:
        return [[pattern, route.to_config()] for pattern, route in self]

    def __str__(self) -> str:
        return "{" + ", ".join(f"{pattern!r}: {route}" for pattern, route in self) + "}"


def _patterns(value: Any) -> Patterns:
    from ..composition.making import route_from

    pairs = list(value.items()) if isinstance(value, Mapping) else [tuple(pair) for pair in value]
    if any(len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError
    return Patterns((pattern, route_from(route)) for pattern, route in pairs)


@register("by_name")
@dataclass(frozen=True)
class ByName(Policy):
    """Sends a tensor the way that is said for its name.

    A tensor goes through the spec of the first pattern that its name matches, and through `default` where none does. Patterns are those of
    shells: * is any text, ? one character, [ab] one of these; case counts. Names are the parameters' full ones ('encoder.0.bias').
    A pattern that matches no parameter, and parameters that a later pattern matches too, are told once, in the log
    'grace_ext' of rank 0, at the first step. The same at every step. State: none.
    Source: common practice.
    """

    patterns: Any = made_knob((), "the first that matches counts", "specs by pattern, such as {'*.bias': 'none'}", _patterns)
    default: Any = route_knob("none", "what tensors go through that match no pattern")

    def _match(self, name: str) -> tuple[str, Any]:
        """(the knob's name in paths, the spec)."""
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
                said.append(f"by_name: {pattern!r} matches no parameter; there are {some([spec.name for spec in specs])}")
            for earlier in dict.fromkeys(first[name] for name in names if name in first):
                both = [name for name in names if first.get(name) == earlier]
                said.append(f"by_name: {earlier!r} comes before {pattern!r} and takes {some(both)}, which both match")
            first = {**dict.fromkeys(names, pattern), **first}
        return said


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
