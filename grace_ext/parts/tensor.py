"""TensorSpec is what a part knows of a tensor before it sees the values; StepInfo is what it knows of the step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorSpec:
    """Describes a gradient without its values: parameter name, shape and dtype (one of DTYPES)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the dense gradient in its own dtype."""
        return self.size * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True)
class StepInfo:
    """Describes a step for parts: `step` counts from 0, `size` is the world size, `divisor` is the world size for a mean and 1 for a sum,
    `lr` is the current learning rate if an optimizer is bound. All but `rank` is equal on all ranks."""

    step: int
    rank: int
    size: int
    divisor: int
    seed: int = 0
    lr: float | None = None

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
