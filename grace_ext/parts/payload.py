"""Arrays <-> bytes: the message that one rank gathers for one bucket.

    message  = header (24 bytes) | payload of tensor 0 | payload of tensor 1 | ...
    header   = magic 'GX' | version u8 | flags u8 | step u32 | digest u64 | length of what follows u64      (little-endian)
    payload  = its fields one after the other; a variable field carries its element count as u32 before it

The digest names the spec and the bucket's tensors, so that a peer which compresses something else is found out before its
bytes are read. Everything about sizes is checked here; what the bytes mean (ranges of indices) is checked by the compressor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import PayloadError
from .field import ITEMSIZE, Field
from .ops import Array, Ops

MAGIC, VERSION = b"GX", 1
HEADER = struct.Struct("<2sBBIQQ")
NOT_FINITE = 1  # flag: some gradient of the bucket was not finite; the payloads are of zeros


def pack(ops: Ops, fields: Sequence[Field], arrays: Sequence[Array]) -> list[Array]:
    """The wire pieces of one payload: uint8 arrays as they are, floats rounded to their field's dtype by the compressor already."""
    pieces: list[Array] = []
    for field, array in zip(fields, arrays, strict=True):
        count, rest = divmod(len(array), ITEMSIZE[field.dtype])
        if rest or count > field.count or (count < field.count and not field.variable):
            raise ValueError(f"field {field.name!r} holds {len(array)} bytes, declared {field}")  # a bug in a compressor
        if field.variable and not field.joined:
            pieces.append(ops.upload(np.frombuffer(struct.pack("<I", count), np.uint8).copy()))
        pieces.append(array)
    return pieces


def message(ops: Ops, pieces: Sequence[Array], *, digest: int, step: int, finite: bool) -> Array:
    """Header and pieces as one uint8 array."""
    length = sum(len(p) for p in pieces)
    header = HEADER.pack(MAGIC, VERSION, 0 if finite else NOT_FINITE, step & 0xFFFFFFFF, digest, length)
    return ops.concat([ops.upload(np.frombuffer(header, np.uint8).copy()), *pieces])


def open_message(ops: Ops, data: Array, *, digest: int, step: int, rank: int) -> tuple[Array, bool]:
    """(what follows the header, whether the sender was finite). Raises PayloadError naming the rank."""
    if len(data) < HEADER.size:
        raise PayloadError(f"{len(data)} bytes are shorter than a header of {HEADER.size}", rank)
    magic, version, flags, its_step, its_digest, length = HEADER.unpack(ops.host(data[: HEADER.size]).tobytes())
    if magic != MAGIC:
        raise _of_another_kind(magic, rank)
    if version != VERSION:
        raise PayloadError(f"has payload version {version}, this is {VERSION}: install the same grace_ext everywhere", rank)
    if its_digest != digest:
        raise PayloadError("was made with another spec or for other parameters", rank)
    if its_step != step & 0xFFFFFFFF:
        raise PayloadError(f"is of step {its_step}, this is step {step}", rank)
    if flags & ~NOT_FINITE:
        raise PayloadError(f"has unknown flags {flags:#x}", rank)
    body = data[HEADER.size :]
    if len(body) != length:
        raise PayloadError(f"is truncated or too long: {len(body)} bytes after the header, which says {length}", rank)
    return body, not flags & NOT_FINITE


def _of_another_kind(magic: bytes, rank: int) -> PayloadError:
    joined = "; that is what Horovod sends for a rank in hvd.join(): let it call step() without gradients instead, until all are done"
    return PayloadError(f"does not start with {MAGIC!r} but {magic!r}{joined if magic and not any(magic) else ''}", rank)


def open_text(ops: Ops, body: Array, rank: int) -> dict[str, Any]:
    """A JSON object that a rank said of itself. Raises PayloadError naming the rank."""
    try:
        said = json.loads(ops.host(body).tobytes())
    except (ValueError, RecursionError):  # no text, no JSON, or nested without end
        said = None
    if not isinstance(said, dict):
        raise PayloadError("is not what a rank says of itself", rank)
    return said


def split_messages(ops: Ops, data: Array, size: int) -> list[Array]:
    """The messages of `size` ranks from their concatenation, by the lengths in their headers. Raises PayloadError."""
    messages, at = [], 0
    for rank in range(size):
        header = ops.host(data[at : at + HEADER.size]).tobytes()
        if not header.startswith(MAGIC):
            raise _of_another_kind(header[: len(MAGIC)], rank)
        if len(header) < HEADER.size:
            raise PayloadError(f"{len(header)} bytes are shorter than a header of {HEADER.size}", rank)
        end = at + HEADER.size + HEADER.unpack(header)[-1]
        if end > len(data):
            raise PayloadError(f"is truncated: its header promises {end - at} bytes, {len(data) - at} are there", rank)
        messages.append(data[at:end])
        at = end
    if at != len(data):
        raise PayloadError(f"is followed by {len(data) - at} bytes that belong to no rank", size - 1)
    return messages


def unpack(ops: Ops, body: Array, tensors: Sequence[tuple[str, Sequence[Field]]], rank: int) -> Iterator[list[Array]]:
    """The payload of each (name, fields), as uint8 arrays a field. Raises PayloadError naming rank and tensor."""
    at = 0
    for name, fields in tensors:
        arrays = []
        for field in fields:
            count = field.count
            if field.variable and field.joined:
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
                if field.joined:
                    _named(ops, body[at:], field, rank)
                raise PayloadError(f"ends inside {field.name!r}", rank, name)
            arrays.append(body[at:end])
            at = end
        yield arrays
    if at != len(body):
        raise PayloadError(f"has {len(body) - at} bytes that belong to no tensor", rank)


def _extent(ops: Ops, body: Array, field: Field, rank: int) -> int:
    """How many bytes a joined field takes. Raises PayloadError naming rank and tensor."""
    taken = ops.kernels.extent(body, *_table(field.joined))
    if taken < 0:
        _named(ops, body, field, rank)
    return taken


def _named(ops: Ops, body: Array, field: Field, rank: int) -> None:
    """Raises the PayloadError that names the tensor of a joined field that is not as it should be."""
    for _ in unpack(ops, body, field.joined, rank):
        pass


@lru_cache(maxsize=1024)
def _table(tensors: tuple[tuple[str, tuple[Field, ...]], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all their fields: the most elements, their bytes, and whether the number varies."""
    fields = [field for _, its_fields in tensors for field in its_fields]
    return np.array([f.count for f in fields]), np.array([ITEMSIZE[f.dtype] for f in fields]), np.array([f.variable for f in fields])
