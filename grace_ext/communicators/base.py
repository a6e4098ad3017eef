"""The base of communicators: which collectives carry a payload, and how the ranks' payloads become one result. Subclass and register it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ..compressors.base import Compressor, Exchanged
from ..compressors.fast_path import Payload
from ..compressors.forms.coded import Coder
from ..errors import IncompatiblePartsError
from ..memories.base import Memory
from ..parts.field import Field
from ..parts.part import Part
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ..parts.ops import Array, Ops, Zeros


@dataclass(frozen=True)
class Communicator(Part):
    """Carries a compressor's payloads. Its `exchange` is a generator that yields requests (parts/requests.py) and never blocks.

    A subclass must define two methods: `exchange`, and `collectives`, which tells what that starts, for costs and plans."""

    kind: ClassVar[str] = "communicator"
    #: Whether it sends one payload per tensor, as the compressor made it, so that `send` takes that.
    carries_payloads: ClassVar[bool] = False
    #: Whether it exchanges inside the nodes first, and only then, by `inner`, between them (exchange/hierarchy.py).
    two_level: ClassVar[bool] = False

    @abstractmethod
    def exchange(
        self, ops: Ops, compressor: Compressor, x: Array, spec: TensorSpec, info: StepInfo, state: State
    ) -> Generator[Any, Any, Exchanged]:
        """Compresses x, yields requests, is resumed with their results, and aggregates."""

    @abstractmethod
    def collectives(self, n: int, payload: float, dense: float) -> Sequence[tuple[str, float]]:
        """Returns (kind, bytes of one rank's buffer) of each collective that n ranks start, one after another, for payloads of `payload`
        bytes of tensors of `dense` bytes. Kinds: 'allreduce', 'allgather', 'broadcast' (every rank in turn), 'alltoall'."""

    def decodes(self, n: int) -> float:
        """How many payloads each of n ranks decodes per step: all of them, unless the network or other ranks have added them up."""
        return n

    def send(
        self, ops: Ops, compressor: Compressor, payload: Payload, spec: TensorSpec, info: StepInfo, state: State,
        out: Array | Zeros | None = None,
    ) -> Generator[Any, Any, Exchanged]:  # fmt: skip
        """Exchanges what was compressed already, if `carries_payloads`. The aggregate may be written to `out`."""
        raise NotImplementedError(f"{type(self).__name__} carries payloads, so it must define send()")

    def sum_of_codes(
        self, ops: Ops, coder: Coder, name: str, x: np.ndarray, spec: TensorSpec, info: StepInfo
    ) -> Generator[Any, Any, tuple[np.ndarray, np.ndarray]]:
        """Makes one round of a compressor that codes arrays (a Coder) and names this communicator in `rounds`: sums the ranks' x, which is
        float64[count] on the host, by their codes. Returns (x as its own codes say it, the sum, which is equal on all ranks)."""
        raise NotImplementedError(f"{type(self).__name__} sums no codes: only compressors that name it in `rounds` may ask it to")

    def init(self, ops: Ops, compressor: Compressor, spec: TensorSpec, info: StepInfo) -> State:
        """Returns the communicator's own state before the first step, if it has one."""
        return {}

    def keeps_state(self, compressor: Compressor) -> bool:
        """Whether it has a state of its own (see `init`)."""
        return False

    def inner(self, compressor: Compressor) -> Communicator:
        """Returns what carries this compressor's payloads in the end: itself, unless it works in two levels."""
        return self

    def check(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError if this communicator cannot carry that compressor's payloads."""
        if compressor.rounds and self.name not in compressor.rounds:
            raise IncompatiblePartsError(
                f"{compressor.name!r} communicates in rounds of its own, which {self.name!r} would drop; "
                f"use communicator {' or '.join(map(repr, compressor.rounds))}"
            )

    def check_memory(self, memory: Memory) -> None:
        """Raises IncompatiblePartsError if this communicator cannot work under that memory."""

    def input_bytes(self, compressor: Compressor, spec: TensorSpec, n: int) -> int:
        """Upper bound of the bytes that one of n ranks hands to collectives for such a tensor, headers excluded."""
        return compressor.nbytes(spec)

    def bytes_sent(self, n: int, payload: float, dense: float) -> float:
        """Bytes that one of n ranks sends to the network, by the algorithms of planning/cost.py."""
        shares = {"allreduce": 2 * (n - 1) / n, "alltoall": (n - 1) / n, "allgather": n - 1, "broadcast": n - 1}
        return sum(shares[kind] * nbytes for kind, nbytes in self.collectives(n, payload, dense))


@lru_cache(maxsize=4096)  # asked for each tensor at every step, and by each of them kept until the payloads have arrived
def fields_of(compressor: Compressor, spec: TensorSpec) -> Sequence[Field]:
    """Returns `compressor.fields(spec)`, the same objects at every step."""
    return compressor.fields(spec)


def fields_by_rank(compressor: Compressor, specs: Mapping[int, TensorSpec]) -> dict[int, Sequence[Field]]:
    """Returns the fields of the payloads of shards, which are given by rank."""
    return {rank: fields_of(compressor, spec) for rank, spec in specs.items()}


def exchanged(
    ops: Ops, compressor: Compressor, payload: Payload, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State
) -> Exchanged:
    """Returns what the exchange of one payload gives."""
    return Exchanged(
        aggregate,
        lambda: compressor.decompress(ops, payload, spec, info),
        state,
        lambda: compressor.positions(ops, payload, spec, info),
        remove=lambda x: compressor.remove(ops, x, payload, spec, info),
    )
