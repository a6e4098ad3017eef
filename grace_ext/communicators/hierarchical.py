from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import IncompatiblePartsError
from ..parts.spec import communicator_knob
from . import get, register
from .base import Communicator

if TYPE_CHECKING:
    from ..compressors.base import Compressor


@register("hierarchical")
@dataclass(frozen=True)
class Hierarchical(Communicator):
    """Sums uncompressed gradients inside each node, and sends compressed gradients between the nodes, once per node.

        G_i = (N / n) sum of the gradients of node i's ranks,  for n ranks on N nodes;  result: that of `between` for G_1 ... G_N
    If all nodes have equally many ranks, G_i is the node's mean; if not, these weights still make the result the mean over all ranks.
    (Votes, signs and selections are made per node, so a node counts once there, however many ranks it has.) Between nodes only the first
    rank of each node communicates, and it passes what it receives to its node's other ranks unchanged. So all ranks of a node decode the
    same and hold the same memory, that of the node's gradient: one rank's copy can be saved for all, and a lost one restored from another.
    Sent per rank: inside a node, 2 (g-1)/g S for g ranks and gradients of S bytes, plus what the node received; to other nodes, once per
    node, what `between` sends for N ranks: (N-1) m with allgather, while a flat ring of all ranks sends (n-1) m across every node's link.
    With one rank per node it equals `between`; with a single node nothing is compressed, but memories go on, and votes stay votes. A node
    is named by its host name, or by the environment variable GRACE_EXT_NODE. In a policy, if one spec is hierarchical, all are exchanged in
    two levels. Works with Horovod (not with TensorFlow's LocalSGD or its unmodified tape), torch.distributed, MPI and
    LocalCluster(ranks_per_node=...), over all ranks of the job. `between`: by default the compressor's natural communicator; not one that
    keeps state.
    Source: the usual two-level all-reduce (Horovod's hierarchical one), compressed between the nodes.
    """

    between: Communicator | None = communicator_knob("communicator between the nodes; None: the compressor's natural one")

    #: Works in two levels: the driver sums inside the nodes, and `inner` exchanges the sums between them.
    two_level: ClassVar[bool] = True

    def inner(self, compressor: Compressor) -> Communicator:
        return self.between or get("allreduce" if compressor.summable else "allgather").create()

    @property
    def uses_lr(self) -> bool:  # type: ignore[override]
        return self.between is not None and self.between.uses_lr

    def check(self, compressor):
        inner = self.inner(compressor)
        if isinstance(inner, Hierarchical):
            raise IncompatiblePartsError(
                "'hierarchical' has two levels, and `between` carries the second one, so it cannot be hierarchical itself; use "
                "between='allgather'"
            )
        inner.check(compressor)
        if inner.keeps_state(compressor):
            raise IncompatiblePartsError(
                f"{inner.name!r} keeps a residual of each rank's shard, which 'hierarchical' cannot store; use between='allgather', or "
                f"{inner.name}(feedback=False)"
            )

    def check_memory(self, memory):
        if self.between is not None:
            self.between.check_memory(memory)

    def exchange(self, ops, compressor, x, spec, info, state):
        """Runs only if every rank is a node of its own: `inner` does all of it."""
        return (yield from self.inner(compressor).exchange(ops, compressor, x, spec, info, state))

    def input_bytes(self, compressor, spec, n):
        return 8 * spec.size + (1 + n) * self.inner(compressor).input_bytes(compressor, spec, n)

    def collectives(self, n, payload, dense):
        return (self.between or get("allgather").create()).collectives(n, payload, dense)

    def decodes(self, n):
        return (self.between or get("allgather").create()).decodes(n)
