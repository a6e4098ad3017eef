"""A part is a compressor, memory, communicator or policy: all have a name, knobs with ranges, a configuration, and equality by value.

A part is a frozen dataclass. Its fields are its knobs; `knob(...)` gives each a range and one line of help, from which errors, `str()`,
the configuration and `grace-ext show` are all derived.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import GraceError, LearningRateError, ParameterError, SpecSyntaxError, few, shown

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
    """Declares a dataclass field with a valid range. `above` excludes the bound, `low`/`high` include it; a `headline` knob is always
    printed. Its type is that of the default. If the default is None, None stays valid, and the type is `kind`, by default int."""
    rule = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "headline": headline, "kind": kind}
    return dataclasses.field(default=default, metadata=rule)


def made_knob(default: Any, help: str, words: str, make: Callable[[Any], Any]) -> Any:
    """Declares a field whose value `make` creates from the user's value. `make` raises a GraceError or ValueError if that is not valid;
    `words` says what is valid. The created values need `to_config` and `str`. The knob is always printed."""
    return dataclasses.field(default=default, metadata={"help": help, "make": make, "words": words, "choices": None, "headline": True})


def valid_range(field: dataclasses.Field[Any]) -> str:
    """Returns the valid range of a knob in words, e.g. 'a number in (0, 1]'."""
    rule = field.metadata
    if "words" in rule:
        return str(rule["words"])
    if rule["choices"]:
        return "one of " + ", ".join(repr(c) for c in rule["choices"])
    kind, or_none = _type(field), " or None" if field.default is None else ""
    if kind is bool:
        return "True or False" + or_none
    number = "a number" if kind is float else "a whole number"
    left = f"({rule['above']:g}" if rule["above"] is not None else f"[{rule['low']:g}" if rule["low"] is not None else "(-inf"
    right = f"{rule['high']:g}]" if rule["high"] is not None else "inf)"
    return f"{number} in {left}, {right}{or_none}"


def _type(field: dataclasses.Field[Any]) -> type:
    """Returns the type of a knob's values other than None."""
    return field.metadata.get("kind") or (int if field.default is None else type(field.default))


def _valid(field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value, converted to the knob's type. Raises ValueError if it is not valid."""
    rule, kind = field.metadata, _type(field)
    if "make" in rule:
        return rule["make"](value)
    if value is None and field.default is None:
        return None
    if rule["choices"]:
        same = [choice for choice in rule["choices"] if choice == value]
        if not same or isinstance(value, bool):
            raise ValueError
        return same[0]  # 16.0 stands for 16, and numpy's strings for Python's
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError
    if kind is not float and number != int(number if math.isfinite(number) else 0.5):
        raise ValueError
    value = float(number) if kind is float else int(number)
    low, high, above = rule["low"], rule["high"], rule["above"]
    inside = math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not inside:
        raise ValueError
    return value


#: Gradients times a lower learning rate, and their quotients, leave the range of float32.
LOWEST_RATE = 1e-30


@dataclass(frozen=True)
class Part:
    """Every part inherits from this class. Subclasses are frozen dataclasses whose fields are made by `knob`."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    #: Keys of its state whose arrays are equal on all ranks; those of other keys are each rank's own.
    shared_state: ClassVar[tuple[str, ...]] = ()
    #: Keys whose arrays a rank may take over from another rank: learned settings, not something that is still to be sent.
    borrowed_state: ClassVar[tuple[str, ...]] = ()
    #: Keys under which each rank holds its shard of the tensor; concatenated in rank order, the shards are the whole.
    sharded_state: ClassVar[tuple[str, ...]] = ()
    #: Keys whose arrays sum to zero over the ranks.
    zero_sum_state: ClassVar[tuple[str, ...]] = ()
    #: Maps a key that is equal on all ranks to each rank's own key whose mean over the ranks (or sum, for a sum) it holds.
    mean_state: ClassVar[Mapping[str, str]] = MappingProxyType({})
    #: Whether it uses the current learning rate (`learning_rate(info)`), so that an optimizer must be bound.
    uses_lr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _valid(field, value))
            except (ValueError, TypeError, OverflowError) as error:
                if isinstance(error, GraceError) and not isinstance(error, SpecSyntaxError):
                    raise  # from a part inside this one: its message says more than the range
                why = f": {error}" if isinstance(error, SpecSyntaxError) else ""
                raise ParameterError(f"{self.name}: {field.name} must be {valid_range(field)}, got {shown(value)}{why}") from None

    @classmethod
    def create(cls, args: tuple[Any, ...] = (), knobs: dict[str, Any] | None = None) -> Part:
        """Returns the part with these knobs, positional ones in the order of the fields. Raises ParameterError for an unknown knob."""
        fields = [f.name for f in dataclasses.fields(cls)]
        given = dict(zip(fields, args, strict=False))
        knobs = knobs or {}
        unknown = [shown(k, 40)[1:-1] for k in sorted(set(knobs) - set(fields))] + [shown(a, 40) for a in args[len(fields) :]]
        twice = sorted(set(knobs) & set(given))
        if unknown or twice:
            has = f"its knobs are {', '.join(fields)}" if fields else "it has no knobs"
            problem = f"unknown knob {few(unknown)}" if unknown else f"knob {', '.join(twice)} given twice"
            raise ParameterError(f"{cls.name}: {problem}; {has}")
        return cls(**given, **knobs)

    def learning_rate(self, info: StepInfo) -> float:
        """Returns the current learning rate; rates below LOWEST_RATE count as 0. Raises LearningRateError if there is none, or none that
        can be used."""
        if info.lr is None:
            raise LearningRateError(
                f"{self.kind} {self.name!r} needs the learning rate: pass the optimizer (bind(..., optimizer=opt), ddp_comm_hook(..., "
                "optimizer=opt)) or step(..., lr=...); a gradient tape has none, so use a DistributedOptimizer there"
            )
        if math.isnan(info.lr):
            raise LearningRateError(
                f"{self.kind} {self.name!r} works with one learning rate, but the optimizer's parameter groups have different ones; give "
                "all groups the same rate, or use memory 'residual', which needs none"
            )
        if not 0 <= info.lr < math.inf:
            raise LearningRateError(
                f"{self.kind} {self.name!r} needs a learning rate that is finite and not negative, got {info.lr}; correct the schedule, or "
                "use memory 'residual', which needs none"
            )
        return info.lr if info.lr >= LOWEST_RATE else 0.0

    def rate_change(self, before: float, info: StepInfo) -> float:
        """Returns lr_before / lr in float32, or 1 if there was no rate before. lr must not be 0."""
        import numpy as np

        return float(np.float32(before) / np.float32(self.learning_rate(info))) if before else 1.0

    def nested(self) -> Iterator[Part]:
        """Yields this part and the parts in its knobs."""
        yield self
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Part):
                yield from value.nested()

    def to_config(self) -> dict[str, Any]:
        """Returns {'id': name, every knob: its value}, made of JSON types only."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"id": self.name, **{k: v.to_config() if hasattr(v, "to_config") else v for k, v in values.items()}}

    def __str__(self) -> str:
        shown: Callable[[dataclasses.Field[Any]], bool] = lambda f: (  # noqa: E731
            getattr(self, f.name) != f.default or (f.metadata["headline"] and f.default is not None)
        )
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if shown(f)]
        knobs = ", ".join(f"{name}={value if hasattr(value, 'to_config') else repr(value)}" for name, value in values)
        return f"{self.name}({knobs})" if knobs else self.name
