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
from ..parts.ops import Array, Flag, Ops

MAGIC, VERSION = b"GX", 3
HEADER = struct.Struct("<2sBBIQQ")
#: Where the byte of the flags is in it.
FLAGS_AT = 3
#: The flag that some gradient of the bucket was not finite; the payloads are then of zeros.
NOT_FINITE = 1
OTHERWISE = (
    "was made with another spec, for other parameters, at another learning rate (if a part uses it), or after a discard() or undo() that "
    "not all ranks called: make every rank run the same script"
)


def message(ops: Ops, pieces: Sequence[Array], *, digest: int, step: int, finite: Flag) -> Array:
    """Returns the header and the pieces as one uint8 array."""
    header = ops.upload(_header(digest, step, sum(len(p) for p in pieces)))
    header[FLAGS_AT] = (finite ^ True) * NOT_FINITE
    return ops.concat([header, *pieces])


def _header(digest: int, step: int, length: int) -> np.ndarray:
    """Returns the header of a message whose sender's gradients are finite."""
    return np.frombuffer(HEADER.pack(MAGIC, VERSION, 0, step & 0xFFFFFFFF, digest, length), np.uint8).copy()


def open_messages(ops: Ops, messages: Sequence[Array], *, digest: int, step: int) -> tuple[list[Array], Flag]:
    """Checks the header of each rank's message. Returns (what follows it, by rank; whether all ranks' gradients were finite). Raises
    PayloadError, naming the rank."""
    for rank, data in enumerate(messages):
        _check_size(data, rank)
    lengths = [len(data) - HEADER.size for data in messages]
    bodies, headers = [data[HEADER.size :] for data in messages], ops.concat([data[: HEADER.size] for data in messages])

    def checked() -> list[bool]:
        by_rank = ops.host(headers).reshape(-1, HEADER.size)
        return [_check(header, length, digest, step, rank) for rank, (header, length) in enumerate(zip(by_rank, lengths, strict=True))]

    if not ops.defers:
        return bodies, all(checked())
    found = headers.reshape(-1, HEADER.size)
    flags = found[:, FLAGS_AT]
    same = found == ops.upload(np.concatenate([_header(digest, step, length) for length in lengths])).reshape(-1, HEADER.size)
    same[:, FLAGS_AT] = flags <= NOT_FINITE
    ops.require(same.all(), checked)
    return bodies, (flags == 0).all()


def open_message(ops: Ops, data: Array, *, digest: int, step: int, rank: int) -> tuple[Array, bool]:
    """Checks the header of a message that `rank` sent. Returns (what follows the header, whether the sender's gradients were finite).
    Raises PayloadError, naming the rank."""
    _check_size(data, rank)
    body = data[HEADER.size :]
    return body, _check(ops.host(data[: HEADER.size]), len(body), digest, step, rank)


def _check_size(data: Array, rank: int) -> None:
    if len(data) < HEADER.size:
        raise PayloadError(f"{len(data)} bytes are shorter than a header of {HEADER.size}", rank)


def _check(header: np.ndarray, its_length: int, digest: int, step: int, rank: int) -> bool:
    """Checks one header, on the host, before so many bytes. Returns whether the sender's gradients were finite. Raises PayloadError."""
    magic, version, flags, its_step, its_digest, length = HEADER.unpack(header.tobytes())
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
    if its_length != length:
        raise PayloadError(f"is truncated or too long: {its_length} bytes after the header, which says {length}", rank)
    return not flags & NOT_FINITE


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
