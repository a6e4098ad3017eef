"""`QuorumState`: the hook of a DDP whose ranks change from step to step, as a manager of quorums (torchft's) says.

The manager agrees with its peers, before each step, on the replicas that make it: the quorum. If that changes, the manager makes its
process group anew, and the exchange goes on over the new group. If a collective fails, because a replica has died, nothing is raised: the
manager is told, and the step does not count. After the backward pass the manager says whether a step counts, and replicas that have
missed one get the model of a replica that has not.

So the memory follows the manager's steps:
  1. An exchange is finished as revocable. When the next begins, the manager has counted the step, and the memory stays; or it has not, and
     the memory becomes what it was.
  2. Among the replicas of a new quorum, each keeps its own memory. A replica that gets the model of another (one that has just joined, or
     has missed a step) starts with an empty one: what it had not sent, the model that it gets knows nothing of. What all ranks share
     (PowerSGD's Q) it gets from the first replica that has it.
  3. Until a step among the new ranks counts, the memory from before the change is kept: the change, too, can fail on some ranks only.
     So all replicas that keep a memory have counted the same steps.
  4. A replica that gets its model only at the end of the step takes part with zeros, and sums are divided by the number of the others.
"""
# No `from __future__ import annotations` here: DDP checks the hook's annotations (ddp.py).

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

from ...checkpoints.saveable import LOG
from ...checkpoints.statefile import decode, encode
from ...composition.grace import Grace
from ...driver.agreement import share
from ...driver.choices import Choices
from ...errors import CollectiveError, UnsupportedError
from ...exchange.effects import Collective
from ...exchange.perform import at_once, perform
from ...exchange.transport import Transport, arriving
from ...privacy.settings import refuse
from .ddp import DDPState
from .ops import HostOps, TorchOps
from .session import Session, digests_of
from .transports import SingleTransport


class GroupTransport(Transport):
    """The collectives of a process group that torch.distributed's functions do not know, called on the group itself."""

    ops: HostOps | TorchOps

    def __init__(self, ops: HostOps | TorchOps, group: Any, rank: int, size: int):
        self.ops, self._group, self.rank, self.size = ops, group, rank, size

    def start(self, collective: Collective, name: str) -> Any:
        tensor, group = self.ops.as_torch(collective.array), self._group
        if collective.kind == "allreduce":
            return collective, tensor, [group.allreduce([tensor], c10d.AllreduceOptions())]
        assert collective.sizes is not None
        if collective.kind == "alltoall":
            mine = arriving(collective, self.rank)
            out = tensor.new_empty(sum(mine))
            works = [group.alltoall_base(out, tensor, mine, list(collective.sizes), c10d.AllToAllOptions())]
            return collective, list(out.split(mine)), works
        outs = [tensor.new_empty(length) for length in collective.sizes]
        if collective.kind == "allgather":
            return collective, outs, [group.allgather([outs], [tensor], c10d.AllgatherOptions())]
        outs[self.rank] = tensor
        return collective, outs, [self._broadcast(out, root) for root, out in enumerate(outs) if len(out)]

    def _broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        options = c10d.BroadcastOptions()
        options.rootRank = root
        return self._group.broadcast([tensor], options)

    def wait(self, handle: Any) -> Any:
        collective, result, works = handle
        for work in works:
            work.wait()
        if collective.kind == "allreduce":
            return self.ops.from_torch(result) / collective.divisor
        return [self.ops.from_torch(data) for data in result]


def check_spec(g: Grace, wrapper: str) -> None:
    """Raises UnsupportedError if this exchange cannot go on when the number of ranks changes."""
    refuse(g.privacy, wrapper)
    if g.route.changes:
        raise UnsupportedError(
            f"{wrapper} cannot change what is sent from step to step, as '{g}' does, because replicas join at any step: use one spec, or a "
            "policy that chooses by size or name"
        )
    for leaf in g.leaves:
        compressor, memory, communicator = leaf.compressor, leaf.memory, leaf.communicator
        if not compressor.summable or communicator.name != "allreduce":
            what = f"{compressor.name!r} is" if not compressor.summable else f"communicator {communicator.name!r} is"
            raise UnsupportedError(
                f"{wrapper} takes specs whose payloads are summed by all-reduce, to which a replica that joins can add zeros, and {what} "
                f"not one of them: use 'powersgd(rank=4) + residual', 'randomk(ratio=0.01) + residual', 'bf16' or 'none'"
            )
        if not memory.resumes_alone or memory.uses_lr or memory.diverges:
            raise UnsupportedError(
                f"{wrapper} cannot keep memory {memory.name!r} when replicas leave and join, because it ties together what all ranks hold, "
                "or the learning rate, which a replica that joins does not know yet: use memory 'residual'"
            )


class QuorumState(DDPState):
    """The exchange of one DDP among the replicas of a manager's quorum.

    manager: has the interface of torchft.Manager. group: the process group that the manager makes anew for each quorum.
    ddp: a DDP that exchanges nothing by itself, in a process group of one rank."""

    def __init__(self, manager: Any, group: Any, g: Grace, ddp: torch.nn.Module, optimizer: Any, check_start: bool):
        self._manager, self._changing = manager, group
        self._quorum: int | None = None  # the quorum whose replicas this exchange knows
        self._step: int | None = None  # the manager's step of an exchange of which we do not know yet whether it counts
        self._kept: tuple[dict[str, Any] | None] | None = None  # the memory before the last change of ranks, until a step counts
        self._got_model = False  # since the last exchange this replica got the model of another
        self._takes_part = self._failed = False  # in the step under way; it has failed
        self._pending: list[tuple[Future[torch.Tensor], torch.Tensor]] = []  # DDP waits for these futures
        super().__init__(g, ddp, optimizer, True, None, None, True, check_start)
        manager.register_state_dict_fn("grace_ext", self._note_model, dict)

    def _check_world(self) -> None:
        """The ranks are known once the manager has its first quorum; until then this is a world of one."""

    def _compresses(self) -> bool:
        return True

    def _transport(self, ops: HostOps | TorchOps) -> Transport:
        return SingleTransport(ops)

    def _note_model(self, _: Any) -> None:
        """The manager calls this when it loads the model of another replica; if that is at the end of a step, the exchange knows it."""
        self._got_model = self._step is None or self._takes_part

    # --- one step -----------------------------------------------------------------------------------------------------
    def take(self, bucket: Any) -> Future[torch.Tensor]:
        """The hook: as DDPState's. If the exchange fails, it tells the manager, and gives DDP what it has; the step will not count."""
        if bucket.index() == 0:
            self._failed, self._pending = False, []
            self._safely(self._begin)
        buffer = bucket.buffer()
        if not self._failed and not self._takes_part:
            buffer.zero_()
        future: Future[torch.Tensor] | None = None if self._failed else self._safely(lambda: DDPState.take(self, bucket))
        if future is None:
            future = Future()
            future.set_result(buffer)
        self._pending.append((future, buffer))
        return future

    def _safely(self, action: Any) -> Any:
        try:
            return action()
        except CollectiveError as error:
            self._failed = True
            self._manager.report_error(error)
            self._session().forget()
            for future, buffer in self._pending:
                if not future.done():
                    future.set_result(buffer)
            return None

    def _begin(self) -> None:
        self._manager.wait_quorum()
        self._failed = self._manager.errored() is not None
        if self._failed:
            return
        self._settle()
        self._takes_part = self._manager.is_participating()
        if self._manager._quorum_id == self._quorum:
            self._session().driver.divide_by(self._manager.num_participants())
        else:
            self._change_ranks()

    def _settle(self) -> None:
        """Takes the last exchange back if the manager did not count its step."""
        if self._step is not None:
            if self._manager.current_step() > self._step:
                self._kept = None
            else:
                self._session().undo()
            self._step = None

    def _finish(self, session: Session) -> None:
        super()._finish(session)
        self._step, self._got_model = self._manager.current_step(), False

    # --- another quorum -----------------------------------------------------------------------------------------------
    def _change_ranks(self) -> None:
        session = self._session()
        inner = getattr(self._changing, "parent", self._changing)
        transport = GroupTransport(session.ops, self._changing, inner.rank(), inner.size())
        contributors = 0

        def carried(own: dict[str, Any] | None) -> dict[str, Any] | None:
            nonlocal contributors
            own = own if self._kept is None else self._kept[0]
            if self._got_model or not self._takes_part:
                own = None
            mine = {"holds": own is not None, "size": own["size"] if own else 0, "takes_part": self._takes_part}
            said = perform(share(session.ops, transport, mine), transport, {})
            contributors = sum(other["takes_part"] for other in said)
            holders = [rank for rank, other in enumerate(said) if other["holds"]]
            shared = self._shared(own, holders, transport) if 0 < len(holders) < transport.size else None
            self._tell(transport, holders, max(other["size"] for other in said), own is None)
            self._kept = (own,)
            if own is not None:
                return {**own, "rank": transport.rank, "size": transport.size}
            return None if shared is None else {**shared, "rank": holders[0], "size": transport.size}

        session.move(carried, lambda _: transport, average=True)
        if contributors:
            session.driver.divide_by(contributors)
        if self._check_start:
            # A replica that gets its model at the end of the step has another one until then.
            session.driver.starting = (lambda: digests_of(session.parameters)) if self._takes_part else None
        self._quorum = self._manager._quorum_id

    def _shared(self, own: Mapping[str, Any] | None, holders: list[int], transport: Transport) -> dict[str, Any] | None:
        """Gives the ranks without a memory what all ranks share, from the first rank that has it. Every rank calls it."""
        ops, data = transport.ops, b""
        if own is not None and transport.rank == holders[0]:
            keys = Choices(self._grace).shared()
            state = {path: array for path, array in own["state"].items() if path.split("/", 1)[0] in keys}
            data = encode({**{key: value for key, value in own.items() if key != "sizes"}, "state": state})
        most = 2**20 + 16 * sum(p.numel() * p.element_size() for p in self._parameters.values())
        limits = tuple(most if rank == holders[0] else 0 for rank in range(transport.size))
        wanted = Collective("broadcast", ops.upload(np.frombuffer(data, np.uint8).copy()), "memory", limits=limits)
        found = perform(at_once(transport, wanted, "grace/memory"), transport, {})[holders[0]]
        return decode(ops.host(found).tobytes()) if own is None else None

    def _tell(self, transport: Transport, holders: list[int], before: int, empty: bool) -> None:
        """Logs what becomes of the replicas' memories: on rank 0 what is lost, and on each replica that starts anew, that it does."""
        step, size = self._manager.current_step(), transport.size
        lost = before - len(holders)
        if holders and lost > 0 and transport.rank == holders[0]:
            LOG.warning(
                "at step %d, %d of %d replicas go on, and %d now make a quorum: what the others had not sent (their memory) is lost",
                step, len(holders), before, size,
            )  # fmt: skip
        if holders and empty:
            LOG.warning("this replica joins %d others at step %d: its memory (what was not sent) starts at zero", size - 1, step)

    # --- state --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns this replica's memory, for a checkpoint of this replica. Call it between steps: after a step that the manager did not
        count, it is the memory of the last one that it did."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes from what `state_dict` returned on this replica, however many there are now. Every replica must load the checkpoint of
        one step before it begins, and the manager's, too."""
        transport = self._session().driver.transport
        super().load_state_dict({**saved, "rank": transport.rank, "size": transport.size})

    def undo(self) -> None:
        raise UnsupportedError("torchft's manager says which steps count, so undo() is for no one else: call manager.report_error(error)")

    def _saveable(self) -> Any:
        raise UnsupportedError(
            "grace_ext.save writes one checkpoint of a fixed number of ranks, and replicas leave and join here: save state.state_dict() "
            "with each replica's own checkpoint, and manager.state_dict()"
        )
