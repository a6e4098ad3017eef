"""TensorSpec is what a part knows of a tensor before it sees the values; StepInfo is what it knows of the step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

DTYPES = ("float32", "float64", "float16", "bfloat16")


class Rows(NamedTuple):
    """Says which rows of a matrix this rank holds, if other ranks hold the rest: `counts` are the rows of each of these ranks, in order,
    and `place` is this rank's number among them. They are the shards of one replica, each with exchanges of its own."""

    counts: tuple[int, ...]
    place: int

    @property
    def first(self) -> int:
        """The number of this rank's first row in the whole matrix."""
        return sum(self.counts[: self.place])


@dataclass(frozen=True)
class TensorSpec:
    """Describes a gradient without its values: parameter name, shape and dtype (one of DTYPES). rows: for a matrix that is compressed
    together with the rows that other ranks hold (`Compressor.shares_rows`); None for every other tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    rows: Rows | None = None

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def whole(self) -> TensorSpec:
        """The spec of the whole matrix, with the rows of all ranks that share it; this one itself if there are none."""
        return self if self.rows is None else TensorSpec(self.name, (sum(self.rows.counts), *self.shape[1:]), self.dtype)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to exchange. A rank without rows of its own takes part in the exchange of a shared matrix."""
        return not self.whole.size

    @property
    def nbytes(self) -> int:
        """The bytes of the dense gradient in its own dtype."""
        return self.size * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True)
class StepInfo:
    """Describes a step for parts: `step` counts from 0, `size` is the world size, `divisor` is the world size for a mean and 1 for a sum,
    `lr` is the current learning rate if an optimizer is bound. `elements` are those of all parameters that are exchanged, other ranks'
    shards included; 0 if that is not known. All but `rank` is equal on all ranks."""

    step: int
    rank: int
    size: int
    divisor: int
    seed: int = 0
    lr: float | None = None
    elements: int = 0

    def shared_key(self, name: str, use: str, step: int | None = None) -> tuple[int, int]:
        """Returns 64 bits that every rank derives alike from (seed, parameter, use, step), as two 32-bit words; see rng.py."""
        return self._key(name, use, self.step if step is None else step, "shared")

    def private_key(self, name: str, use: str) -> tuple[int, int]:
        """Returns 64 bits that differ from rank to rank, derived from (seed, parameter, use, step, rank)."""
        return self._key(name, use, self.step, str(self.rank))

    def _key(self, name: str, use: str, step: int, who: str) -> tuple[int, int]:
        text = "\0".join((str(self.seed), name, use, str(step), who))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
