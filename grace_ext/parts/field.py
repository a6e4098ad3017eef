"""A field is one array of a payload. This module also lists the dtypes that payloads have on the wire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """Declares one array of a payload: its name, wire dtype and number of elements. A `variable` field holds at most `count` elements, and
    its true count precedes it in 4 bytes. `merged`: (name, fields) of the tensors whose payloads it holds one after the other; if such a
    field is variable, the payloads in it carry their own counts."""

    name: str
    dtype: str
    count: int
    variable: bool = False
    merged: tuple[tuple[str, tuple[Field, ...]], ...] = ()

    @property
    def max_bytes(self) -> int:
        return self.count * ITEMSIZE[self.dtype] + (4 if self.variable and not self.merged else 0)


#: The largest number that float32 holds.
FLOAT32_MAX = float.fromhex("0x1.fffffep127")
# numpy has no bfloat16: on the wire and in payloads its 16 bits are held as uint16.
HALVES = ("float16", "bfloat16")
INTEGERS = {"int8": 1, "int16": 2, "int32": 4}
ITEMSIZE = {"uint8": 1, "uint16": 2, "uint32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, **INTEGERS}
