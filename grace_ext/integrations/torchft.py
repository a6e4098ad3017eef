"""`DistributedDataParallel` takes the place of torchft's, and exchanges gradients compressed among the replicas of its manager's quorum."""
# No `from __future__ import annotations` here: DDP checks the hook's annotations, and does not accept strings.

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future
from torch.nn import parallel
from torchft import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroupDummy, ProcessGroupGloo, ProcessGroupNCCL

from ..composition.making import grace
from ..errors import ParameterError, UnsupportedError
from ..frameworks.optimizers import require_optimizer
from ..frameworks.torch.quorum import QuorumState, check_spec
from ..frameworks.torch.session import check_torch_optimizer

NAME = "grace_ext.integrations.torchft.DistributedDataParallel"
_managers: weakref.WeakSet[Manager] = weakref.WeakSet()  # those that have a model


class DistributedDataParallel(parallel.DistributedDataParallel):
    """torchft's DistributedDataParallel with compressed gradients. Replicas may leave, die and join, as its manager says.

        manager = Manager(pg=ProcessGroupGloo(timeout=timedelta(seconds=10)), min_replica_size=2, ...)
        model = DistributedDataParallel(manager, model, "powersgd(rank=4) + residual", optimizer)
        optimizer = torchft.Optimizer(manager, optimizer)

    compression: what grace_ext.grace takes, of the specs whose payloads are summed by all-reduce.
    optimizer: the one that applies the gradients; memories that are the momentum need it, and are checked against it.
    check_start: compares the bits of the parameters of all replicas when the quorum changes; raises DisagreementError if they differ.
    kwargs: those of torch's DistributedDataParallel but process_group and find_unused_parameters, which torchft sets.
    state: the state of the hook; it tells `wire_bytes` and `metrics()`.

    A replica that dies takes its memory with it: what it had not sent is lost, and the log says so. The others keep theirs, and the step
    under way is made again without it. A replica that joins starts with an empty memory. A manager has one such model.
    Raises UnsupportedError for specs, memories and process groups that cannot do this."""

    def __init__(
        self,
        manager: Manager,
        module: torch.nn.Module,
        compression: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        check_start: bool = True,
        **kwargs: Any,
    ):
        g, group = grace(compression), _group(manager)
        check_spec(g, NAME)
        if isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.optim
        require_optimizer(g, optimizer, NAME)
        check_torch_optimizer(g, optimizer)
        for name in ("process_group", "device_mesh", "find_unused_parameters"):
            if name in kwargs:
                raise ParameterError(f"{NAME} sets {name} itself, as torchft's does: leave it out")
        # Its own exchange is nothing, and buckets stay as they are: those of a replica that joins would be others otherwise.
        super().__init__(module, process_group=ProcessGroupDummy(0, 1), find_unused_parameters=True, **kwargs)
        self.state = QuorumState(manager, group, g, self, optimizer, check_start)
        self.register_comm_hook(self.state, _hook)
        _managers.add(manager)


def _hook(state: QuorumState, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    return state.take(bucket)


def _group(manager: Any) -> Any:
    """Returns the process group that this manager makes anew for each quorum."""
    if not isinstance(manager, Manager):
        raise ParameterError(f"{NAME}(manager, module, compression) takes a torchft.Manager first, and got {type(manager).__name__}")
    if manager in _managers:
        raise UnsupportedError("this manager has a compressed model already: put both into one module (torch.nn.ModuleList), in one DDP")
    group = manager._pg
    if type(group) not in (ProcessGroupGloo, ProcessGroupNCCL):
        raise UnsupportedError(
            f"the manager's process group is a {type(group).__name__}: give Manager(pg=...) a torchft.ProcessGroupGloo or ProcessGroupNCCL"
        )
    return group
