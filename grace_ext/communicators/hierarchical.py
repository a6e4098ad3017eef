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
    """Adds gradients up inside each node, dense, and exchanges the nodes' gradients, compressed, by another communicator.

        G_i = (N / n) sum of the gradients of node i's ranks,  for n ranks on N nodes;  result: that of `between` for G_1 ... G_N
    With as many ranks on every node G_i is the node's mean; with uneven nodes the weights make the result the mean over all ranks still.
    (Votes, signs and selections are a node's, so a node counts once there, whatever its ranks.) Between the nodes only the first rank of
    each one talks, and what it gets goes to the others of its node as it came: so all ranks of a node decode the same, and hold the same
    memory, that of the node's gradient. Each can be saved or lost for all.
    Sent per rank: inside, 2 (g-1)/g S for g ranks and gradients of S bytes, and what the node received; to other nodes, once a node, what
    `between` sends for N ranks: (N-1) m with allgather, where a flat ring of all ranks takes (n-1) m across every node's link.
    With one rank a node it is `between`; with one node alone nothing is compressed. A node is a host name, or what the environment
    variable GRACE_EXT_NODE says. In a policy, where one spec is hierarchical all of them go in two levels. For Horovod (not with
    TensorFlow's LocalSGD or its unmodified tape), torch.distributed, MPI and LocalCluster(ranks_per_node=...); over all ranks of the job.
    `between`: by default the compressor's natural one; not one that keeps state.
    Source: the usual two-level all-reduce (Horovod's hierarchical one), compressed between the nodes.
    """

    between: Communicator | None = communicator_knob("what carries the nodes' gradients; None: the compressor's natural one")

    #: It works in two levels: the driver makes them, and gives `inner` what is left.
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
                "'hierarchical' has two levels, and 'between' is what carries the second one: it cannot be hierarchical; use 'allgather'"
            )
        inner.check(compressor)
        if inner.keeps_state(compressor):
            raise IncompatiblePartsError(
                f"{inner.name!r} keeps a residual of its own of each rank's shard, which 'hierarchical' has no place for; use between="
                f"'allgather', or {inner.name}(feedback=False)"
            )

    def check_memory(self, memory):
        if self.between is not None:
            self.between.check_memory(memory)

    def exchange(self, ops, compressor, x, spec, info, state):
        """Where all ranks are nodes of their own."""
        return (yield from self.inner(compressor).exchange(ops, compressor, x, spec, info, state))

    def input_bytes(self, compressor, spec, n):
        return 8 * spec.size + (1 + n) * self.inner(compressor).input_bytes(compressor, spec, n)

    def collectives(self, n, payload, dense):
        return (self.between or get("allgather").create()).collectives(n, payload, dense)

    def decodes(self, n):
        return (self.between or get("allgather").create()).decodes(n)
