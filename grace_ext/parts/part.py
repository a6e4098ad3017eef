"""What compressors, memories, communicators and policies have in common: a name, knobs with ranges, a config, equality by value.

A part is a frozen dataclass. Its fields are its knobs; `knob(...)` gives each a range and one line of help, from which the
errors, `str()`, the configuration and `grace-ext show` all derive.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import GraceError, LearningRateError, ParameterError, SpecSyntaxError

if TYPE_CHECKING:
    from .tensor import StepInfo


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    headline: bool = False,
    kind: type | None = None,
) -> Any:
    """A dataclass field with a valid range. `above` excludes the bound, `low`/`high` include it; a `headline` knob is always
    printed. Its type is that of the default, or, where the default is None (None then stays valid), `kind`, by default int."""
    rule = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "headline": headline, "kind": kind}
    return dataclasses.field(default=default, metadata=rule)


def made_knob(default: Any, help: str, words: str, make: Callable[[Any], Any]) -> Any:
    """A field whose values `make` makes of what is given, or refuses by a GraceError or a ValueError; `words` says what is valid. What it
    makes has `to_config` and `str`; it is always printed."""
    return dataclasses.field(default=default, metadata={"help": help, "make": make, "words": words, "choices": None, "headline": True})


def valid_range(field: dataclasses.Field) -> str:
    """The valid range of a knob in words, e.g. 'a number in (0, 1]'."""
    rule = field.metadata
    if "words" in rule:
        return rule["words"]
    if rule["choices"]:
        return "one of " + ", ".join(repr(c) for c in rule["choices"])
    kind, or_none = _type(field), " or None" if field.default is None else ""
    if kind is bool:
        return "True or False" + or_none
    number = "a number" if kind is float else "a whole number"
    left = f"({rule['above']:g}" if rule["above"] is not None else f"[{rule['low']:g}" if rule["low"] is not None else "(-inf"
    right = f"{rule['high']:g}]" if rule["high"] is not None else "inf)"
    return f"{number} in {left}, {right}{or_none}"


def _type(field: dataclasses.Field) -> type:
    """What a knob's values are, None aside."""
    return field.metadata.get("kind") or (int if field.default is None else type(field.default))


def _valid(field: dataclasses.Field, value: Any) -> Any:
    """The value, converted to the knob's type; raises ValueError if it is not valid."""
    rule, kind = field.metadata, _type(field)
    if "make" in rule:
        return rule["make"](value)
    if value is None and field.default is None:
        return None
    if rule["choices"]:
        if value not in rule["choices"]:
            raise ValueError
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError
    if kind is not float and value != int(value if math.isfinite(value) else 0.5):
        raise ValueError
    value = float(value) if kind is float else int(value)
    low, high, above = rule["low"], rule["high"], rule["above"]
    inside = math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not inside:
        raise ValueError
    return value


@dataclass(frozen=True)
class Part:
    """Base of every part. Subclasses are frozen dataclasses whose fields are made by `knob`."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    #: Keys of its state that are equal on all ranks; the others belong to one rank.
    shared_state: ClassVar[tuple[str, ...]] = ()
    #: Keys that a rank may go on with another's: settings that it learnt, no part of what is to be sent.
    borrowed_state: ClassVar[tuple[str, ...]] = ()
    #: Keys of which each rank has its shard of the tensor: one after the other, in rank order, they are whole.
    sharded_state: ClassVar[tuple[str, ...]] = ()
    #: Keys whose arrays add up to zero over the ranks.
    zero_sum_state: ClassVar[tuple[str, ...]] = ()
    #: Keys that are, on all ranks, the mean (or, for a sum, the sum) over the ranks of another key, which is each rank's own.
    mean_state: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: It divides by, or multiplies with, the current learning rate (`learning_rate(info)`), so an optimizer must be bound.
    uses_lr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _valid(field, value))
            except (ValueError, TypeError, OverflowError) as error:
                if isinstance(error, GraceError) and not isinstance(error, SpecSyntaxError):
                    raise  # of a part inside: it says more than the range
                why = f": {error}" if isinstance(error, SpecSyntaxError) else ""
                raise ParameterError(f"{self.name}: {field.name} must be {valid_range(field)}, got {value!r}{why}") from None

    @classmethod
    def create(cls, args: tuple[Any, ...] = (), knobs: dict[str, Any] | None = None) -> Part:
        """The part with these knobs, positional ones in the order of the fields. Raises ParameterError for an unknown knob."""
        fields = [f.name for f in dataclasses.fields(cls)]
        given = dict(zip(fields, args, strict=False))
        knobs = knobs or {}
        unknown = sorted(set(knobs) - set(fields)) + [repr(a) for a in args[len(fields) :]]
        twice = sorted(set(knobs) & set(given))
        if unknown or twice:
            has = f"its knobs are {', '.join(fields)}" if fields else "it has no knobs"
            problem = f"unknown knob {', '.join(unknown)}" if unknown else f"knob {', '.join(twice)} given twice"
            raise ParameterError(f"{cls.name}: {problem}; {has}")
        return cls(**given, **knobs)

    def learning_rate(self, info: StepInfo) -> float:
        """The current learning rate. Raises LearningRateError where there is none."""
        if info.lr is None:
            raise LearningRateError(
                f"{self.kind} {self.name!r} needs the learning rate: pass the optimizer (bind(..., optimizer=opt), ddp_comm_hook(..., "
                "optimizer=opt)) or step(..., lr=...); a gradient tape has none, so use a DistributedOptimizer there"
            )
        if math.isnan(info.lr):
            raise LearningRateError(
                f"{self.kind} {self.name!r} works with one learning rate, and the optimizer's parameter groups have different ones; give "
                "all groups one rate, or use memory 'residual', which needs none"
            )
        return info.lr

    def rate_change(self, before: float, info: StepInfo) -> float:
        """lr_before / lr, in float32; 1 where there was none before. lr is not 0."""
        import numpy as np

        return float(np.float32(before) / np.float32(self.learning_rate(info))) if before else 1.0

    def to_config(self) -> dict[str, Any]:
        """{'id': name, every knob: its value}, made of JSON types only."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"id": self.name, **{k: v.to_config() if hasattr(v, "to_config") else v for k, v in values.items()}}

    def __str__(self) -> str:
        shown: Callable[[dataclasses.Field], bool] = lambda f: (  # noqa: E731
            getattr(self, f.name) != f.default or (f.metadata["headline"] and f.default is not None)
        )
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if shown(f)]
        knobs = ", ".join(f"{name}={value if hasattr(value, 'to_config') else repr(value)}" for name, value in values)
        return f"{self.name}({knobs})" if knobs else self.name
