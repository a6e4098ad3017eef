"""The message that one rank sends for one bucket.

    message  = header (24 bytes) | payload of tensor 0 | payload of tensor 1 | ...
    header   = magic 'GX' | version u8 | flags u8 | step u32 | digest u64 | length of what follows u64      (little-endian)

The digest names the spec and the bucket's tensors, so that a peer which compresses something else is found out before its bytes are
read. Sizes are checked here and in parts/payload.py; what the bytes mean (ranges of indices) is checked by the compressor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import PayloadError
from ..parts.ops import Array, Ops

MAGIC, VERSION = b"GX", 3
HEADER = struct.Struct("<2sBBIQQ")
#: The flag that some gradient of the bucket was not finite; the payloads are then of zeros.
NOT_FINITE = 1
OTHERWISE = (
    "was made with another spec, for other parameters, at another learning rate (if a part uses it), or after a discard() or undo() that "
    "not all ranks called: make every rank run the same script"
)


def message(ops: Ops, pieces: Sequence[Array], *, digest: int, step: int, finite: bool) -> Array:
    """Returns the header and the pieces as one uint8 array."""
    length = sum(len(p) for p in pieces)
    header = HEADER.pack(MAGIC, VERSION, 0 if finite else NOT_FINITE, step & 0xFFFFFFFF, digest, length)
    return ops.concat([ops.upload(np.frombuffer(header, np.uint8).copy()), *pieces])


def open_message(ops: Ops, data: Array, *, digest: int, step: int, rank: int, header: np.ndarray | None = None) -> tuple[Array, bool]:
    """Checks the header of a message that `rank` sent. Returns (what follows the header, whether the sender's gradients were finite).
    Raises PayloadError, naming the rank. header: the first bytes on the host, if the caller has read them (`headers_of`)."""
    if len(data) < HEADER.size:
        raise PayloadError(f"{len(data)} bytes are shorter than a header of {HEADER.size}", rank)
    magic, version, flags, its_step, its_digest, length = HEADER.unpack(
        (ops.host(data[: HEADER.size]) if header is None else header).tobytes()
    )
    if magic != MAGIC:
        raise _of_another_kind(magic, rank)
    if version != VERSION:
        raise PayloadError(f"has payload version {version}, this is {VERSION}: install the same grace_ext everywhere", rank)
    if its_digest != digest:
        raise PayloadError(OTHERWISE, rank)
    if its_step != step & 0xFFFFFFFF:
        raise PayloadError(f"is of step {its_step}, this is step {step}", rank)
    if flags & ~NOT_FINITE:
        raise PayloadError(f"has unknown flags {flags:#x}", rank)
    body = data[HEADER.size :]
    if len(body) != length:
        raise PayloadError(f"is truncated or too long: {len(body)} bytes after the header, which says {length}", rank)
    return body, not flags & NOT_FINITE


def headers_of(ops: Ops, messages: Sequence[Array]) -> list[np.ndarray]:
    """Returns the first bytes of each message on the host."""
    return ops.hosts([data[: HEADER.size] for data in messages])


def _of_another_kind(magic: bytes, rank: int) -> PayloadError:
    left = "; that is what Horovod sends for a rank in hvd.join(): let it call step() without gradients instead, until all are done"
    return PayloadError(f"does not start with {MAGIC!r} but {magic!r}{left if magic and not any(magic) else ''}", rank)


def open_text(ops: Ops, body: Array, rank: int) -> dict[str, Any]:
    """Reads the JSON object with which a rank describes itself. Raises PayloadError, naming the rank."""
    try:
        said = json.loads(ops.host(body).tobytes())
    except (ValueError, RecursionError):  # no text, no JSON, or nested without end
        said = None
    if not isinstance(said, dict):
        raise PayloadError("is not a rank's description of itself", rank)
    return said


def split_messages(ops: Ops, data: Array, size: int) -> list[Array]:
    """Cuts the concatenation of `size` ranks' messages by the lengths in their headers. Raises PayloadError, naming the rank."""
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
