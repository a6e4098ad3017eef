"""A field is one array of a payload; also the dtypes that payloads have on the wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One array of a payload: its name, wire dtype and number of elements; a `variable` one holds at most `count` elements and
    carries its true count in 4 bytes before it. `merged`: (name, fields) of the tensors whose payloads it holds, one after the other; where
    it is variable, they say themselves how long they are."""

    name: str
    dtype: str
    count: int
    variable: bool = False
    merged: tuple[tuple[str, tuple[Field, ...]], ...] = ()

    @property
    def max_bytes(self) -> int:
        return self.count * ITEMSIZE[self.dtype] + (4 if self.variable and not self.merged else 0)


# bfloat16 has no numpy dtype: on the wire and in payloads it is the 16 bits, held as uint16.
HALVES = ("float16", "bfloat16")
INTEGERS = {"int8": 1, "int16": 2, "int32": 4}
ITEMSIZE = {"uint8": 1, "uint16": 2, "uint32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, **INTEGERS}
