"""Cuts a tensor into shards, each of which one rank sums up for all ranks."""

from __future__ import annotations

import hashlib
from functools import lru_cache

#: The fewest elements of a shard, if a tensor has so many: a rank's calls for a smaller one take longer than its work on the elements.
FEWEST = 1 << 14


@lru_cache(maxsize=1024)  # asked for each tensor at every step
def shards(name: str, d: int, n: int) -> dict[int, slice]:
    """Splits the d elements of tensor `name` into consecutive shards. Returns them by rank, in rank order; ranks without one are left out.
    Each of n ranks has an n-th of a large tensor; a small tensor has one shard.

    It depends on nothing else, so that results and states do not depend on which tensors travel together. Shards of one tensor differ by
    at most one element. The name's digest says which ranks have them: over many tensors all ranks get about as much."""
    pieces = min(n, most(d))
    turn = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % n
    before = turn * pieces // n
    owners = [-(-n * (before + i + 1) // pieces) - 1 - turn for i in range(pieces)]
    return {rank: slice(d * i // pieces, d * (i + 1) // pieces) for i, rank in enumerate(owners)}


def most(d: int) -> int:
    """Returns how many shards there are of d elements, if there are enough ranks."""
    return max(1, d // FEWEST)


def shard_of(name: str, d: int, n: int, rank: int) -> slice:
    """Returns this rank's shard, which is empty if it has none."""
    return shards(name, d, n).get(rank, slice(0, 0))
