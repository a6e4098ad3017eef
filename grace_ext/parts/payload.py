"""Arrays <-> bytes: the message that one rank gathers for one bucket.

    message  = header (24 bytes) | payload of tensor 0 | payload of tensor 1 | ...
    header   = magic 'GX' | version u8 | flags u8 | step u32 | digest u64 | length of what follows u64      (little-endian)
    payload  = its fields one after the other; a variable field carries its element count as u32 before it

The digest names the spec and the bucket's tensors, so that a peer which compresses something else is found out before its
bytes are read. Everything about sizes is checked here; what the bytes mean (ranges of indices) is checked by the compressor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ..errors import PayloadError
from .field import ITEMSIZE, Field
from .ops import Array, Ops


def pack(ops: Ops, fields: Sequence[Field], arrays: Sequence[Array]) -> list[Array]:
    """The wire pieces of one payload: uint8 arrays as they are, floats rounded to their field's dtype by the compressor already."""
    pieces: list[Array] = []
    for field, array in zip(fields, arrays, strict=True):
        count, rest = divmod(len(array), ITEMSIZE[field.dtype])
        if rest or count > field.count or (count < field.count and not field.variable):
            raise ValueError(f"field {field.name!r} holds {len(array)} bytes, declared {field}")  # a bug in a compressor
        if field.variable and not field.merged:
            pieces.append(ops.upload(np.frombuffer(struct.pack("<I", count), np.uint8).copy()))
        pieces.append(array)
    return pieces


def unpack(ops: Ops, body: Array, tensors: Sequence[tuple[str, Sequence[Field]]], rank: int) -> Iterator[list[Array]]:
    """The payload of each (name, fields), as uint8 arrays a field. Raises PayloadError naming rank and tensor."""
    at = 0
    for name, fields in tensors:
        arrays = []
        for field in fields:
            count = field.count
            if field.variable and field.merged:
                count = _extent(ops, body[at:], field, rank)
            elif field.variable:
                if at + 4 > len(body):
                    raise PayloadError(f"ends before the count of {field.name!r}", rank, name)
                (count,) = struct.unpack("<I", ops.host(body[at : at + 4]).tobytes())
                at += 4
                if count > field.count:
                    raise PayloadError(f"claims {count} elements of {field.name!r}, at most {field.count} are possible", rank, name)
            end = at + count * ITEMSIZE[field.dtype]
            if end > len(body):
                if field.merged:
                    _named(ops, body[at:], field, rank)
                raise PayloadError(f"ends inside {field.name!r}", rank, name)
            arrays.append(body[at:end])
            at = end
        yield arrays
    if at != len(body):
        raise PayloadError(f"has {len(body) - at} bytes that belong to no tensor", rank)


def _extent(ops: Ops, body: Array, field: Field, rank: int) -> int:
    """How many bytes a merged field takes. Raises PayloadError naming rank and tensor."""
    taken = ops.kernels.extent(body, *_table(field.merged))
    if taken < 0:
        _named(ops, body, field, rank)
    return taken


def _named(ops: Ops, body: Array, field: Field, rank: int) -> None:
    """Raises the PayloadError that names the tensor of a merged field that is not as it should be."""
    for _ in unpack(ops, body, field.merged, rank):
        pass


@lru_cache(maxsize=1024)
def _table(tensors: tuple[tuple[str, tuple[Field, ...]], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all their fields: the most elements, their bytes, and whether the number varies."""
    fields = [field for _, its_fields in tensors for field in its_fields]
    return np.array([f.count for f in fields]), np.array([ITEMSIZE[f.dtype] for f in fields]), np.array([f.variable for f in fields])
