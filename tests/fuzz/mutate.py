"""Damages valid messages: changes bits, lengths and numbers at the edges of fields, and moves pieces."""

from __future__ import annotations

import random
import struct

from grace_ext.exchange.message import HEADER, MAGIC

INTEGERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
LONG = (0, 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(honest: bytes, places: tuple[int, ...], rng: random.Random) -> bytes:
    """Returns the message with one to four changes. places: where its fields begin and end. In 80% of the messages with a changed length,
    the header states the new length, so that the body is decoded, too."""
    data = bytearray(honest)
    for _ in range(1 if rng.random() < 0.5 else rng.randint(2, 4)):
        data = rng.choice(CHANGES)(data, places, rng)
    if data[:2] == MAGIC and len(data) >= HEADER.size and len(data) != len(honest) and rng.random() < 0.8:
        struct.pack_into("<Q", data, HEADER.size - 8, len(data) - HEADER.size)
    return bytes(data)


def _place(data: bytearray, places: tuple[int, ...], rng: random.Random) -> int:
    """Returns the beginning or end of a field, a byte near it, or any position."""
    if places and rng.random() < 0.7:
        return max(0, min(len(data), rng.choice(places) + rng.choice((0, 0, 0, -1, 1, -4, 4))))
    return rng.randrange(len(data) + 1)


def bits(data, places, rng):
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def near(data, places, rng):
    """Replaces a byte at the edge of a field by a random one."""
    at = _place(data, places, rng)
    if at < len(data):
        data[at] = rng.randrange(256)
    return data


def number(data, places, rng):
    """Overwrites a place with an extreme number."""
    form, values = rng.choice((("<I", INTEGERS), ("<H", INTEGERS[:10]), ("<B", INTEGERS[:7]), ("<f", FLOATS), ("<Q", LONG)))
    at = _place(data, places, rng)
    if at + struct.calcsize(form) <= len(data):
        struct.pack_into(form, data, at, rng.choice(values))
    return data


def count(data, places, rng):
    """Changes a 32-bit number a little, like a wrong count."""
    at = _place(data, places, rng)
    if at + 4 <= len(data):
        (value,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<I", data, at, (value + rng.choice((-2, -1, 1, 2, 8, 1 << 16))) & 0xFFFFFFFF)
    return data


def shorter(data, places, rng):
    at = _place(data, places, rng)
    return data[:at] if rng.random() < 0.6 else data[:at] + data[at + rng.choice((1, 2, 4, 8)) :]


def longer(data, places, rng):
    at = _place(data, places, rng) if rng.random() < 0.5 else len(data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 7, 64))) + data[at:]


def fill(data, places, rng):
    """Overwrites a stretch with one value, or with noise."""
    at = _place(data, places, rng)
    size = min(len(data) - at, rng.choice((1, 4, 16, 64, 1 << 20)))
    data[at : at + size] = rng.randbytes(size) if rng.random() < 0.5 else bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * size
    return data


def moved(data, places, rng):
    """Copies one stretch over another, so that fields replace fields."""
    one, other = _place(data, places, rng), _place(data, places, rng)
    size = min(len(data) - max(one, other), rng.choice((2, 4, 16, 256)))
    data[one : one + size] = data[other : other + size]
    return data


def header(data, places, rng):
    """Overwrites a field of the header: magic, version, flags, step, digest, length."""
    if len(data) >= HEADER.size:
        at, size = rng.choice(((0, 2), (2, 1), (3, 1), (4, 4), (8, 8), (16, 8)))
        data[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), (rng.randrange(2)).to_bytes(size, "little")))
    return data


def noise(data, places, rng):
    return bytearray(rng.randbytes(rng.choice((0, 1, 23, 24, 25, len(data), 2 * len(data)))))


CHANGES = (bits, bits, near, near, number, number, number, count, count, shorter, longer, fill, moved, header, noise)
