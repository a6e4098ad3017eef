"""Converts payloads to the bytes of a message and back: the message that one rank gathers for one bucket.

    message  = header (24 bytes) | payload of tensor 0 | payload of tensor 1 | ...
    header   = magic 'GX' | version u8 | flags u8 | step u32 | digest u64 | length of what follows u64      (little-endian)
    payload  = its fields one after the other; a variable field carries its element count as u32 before it

The digest identifies the spec and the bucket's tensors, so that a peer which compresses something else is detected before its
bytes are read. All sizes are checked here; what the bytes mean (ranges of indices) is checked by the compressor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from ..errors import PayloadError
from .field import ITEMSIZE, Field
from .ops import Array, Ops


def pack(ops: Ops, fields: Sequence[Field], arrays: Sequence[Array]) -> list[Array]:
    """Returns the wire pieces of one payload, uint8 arrays. The compressor has already rounded floats to their field's dtype."""
    pieces: list[Array] = []
    for field, array in zip(fields, arrays, strict=True):
        count, rest = divmod(len(array), ITEMSIZE[field.dtype])
        if rest or count > field.count or (count < field.count and not field.variable):
            raise ValueError(f"field {field.name!r} holds {len(array)} bytes, but it is declared as {field}")  # a bug in a compressor
        if field.variable and not field.merged:
            pieces.append(ops.upload(np.frombuffer(struct.pack("<I", count), np.uint8).copy()))
        pieces.append(array)
    return pieces


def unpack(ops: Ops, body: Array, tensors: Iterable[tuple[str, Sequence[Field]]], rank: int) -> Iterator[list[Array]]:
    """Yields the payload of each (name, fields), one uint8 array per field. Raises PayloadError, which names the rank and the tensor."""
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
                    raise PayloadError(f"claims {count} elements of {field.name!r}, but at most {field.count} are possible", rank, name)
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
    """Returns how many bytes a merged field takes. Raises PayloadError, which names the rank and the tensor."""
    taken: int = ops.kernels.extent(body, *_table(field.merged))
    if taken < 0:
        _named(ops, body, field, rank)
    return taken


def _named(ops: Ops, body: Array, field: Field, rank: int) -> None:
    """Raises the PayloadError for a malformed merged field, which names the tensor at fault."""
    for _ in unpack(ops, body, field.merged, rank):
        pass


@lru_cache(maxsize=1024)
def _table(tensors: tuple[tuple[str, tuple[Field, ...]], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns three arrays with one entry per field: the maximal count, the bytes per element, and whether the count is variable."""
    fields = [field for _, its_fields in tensors for field in its_fields]
    return np.array([f.count for f in fields]), np.array([ITEMSIZE[f.dtype] for f in fields]), np.array([f.variable for f in fields])
