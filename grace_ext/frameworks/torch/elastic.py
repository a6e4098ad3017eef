"""Elastic Horovod (`hvd.elastic`) with compression: `run`, `TorchState` and `ElasticSampler`.

Horovod's own state would copy rank 0's memory to all, or lose it. Here each rank's memory is its own: it is committed and rolled back with
the optimizer, and when ranks leave or join, it is brought to the new ones before training goes on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import horovod.torch.elastic as horovod_elastic
from horovod.torch.elastic import ElasticSampler as ElasticSampler
from horovod.torch.elastic.state import StateHandler, get_handler_registry

from ...checkpoints.elastic import carried_over, check_how
from . import engine
from .optimizer import _Distributed, broadcast_optimizer_state


class TorchState(horovod_elastic.TorchState):
    """Horovod's TorchState, for optimizers of grace_ext's DistributedOptimizer, too (and any others).

    resize: what becomes of the memory when the number of ranks changes: 'mean' (what the remaining ranks had not sent keeps its effect),
      'keep' (each goes on with its own, new ranks start at zero) or 'reset' (see grace_ext.resize). What a rank that died had not sent is
      lost with it. With one rank left, compression goes on, as with simulate=True.
    The optimizers must exchange among all ranks: process sets do not survive a change of ranks.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, *, resize: str = "mean", **attributes: Any):
        self._resize = check_how(resize)
        super().__init__(model=model, optimizer=optimizer, **attributes)

    def settle(self) -> None:
        """Brings the memory of compression to the ranks that there are now, and commits. Collective; `run` calls it on all ranks before the
        function begins, each time."""
        for handler in self._handlers.values():
            if isinstance(handler, CompressedOptimizerHandler):
                handler.settle(self._resize)
        self.save()


class CompressedOptimizerHandler(StateHandler):
    """Of one DistributedOptimizer, its memory included."""

    def __init__(self, optimizer: _Distributed):
        super().__init__(optimizer)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(self._saved)

    def sync(self) -> None:
        # A new rank's optimizer is filled by a step on zero gradients, which weight decay would let change the weights that were synced.
        parameters = [p for group in self.value.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        broadcast_optimizer_state(self.value, 0, memory=False)
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)

    def settle(self, how: str) -> None:
        self.value.move(functools.partial(carried_over, _gather, size=engine.api.size(), rank=engine.api.rank(), how=how))


def _gather(mine: Any) -> list[Any]:
    return engine.api.allgather_object(mine, name="grace.elastic")  # Horovod's default is the object's type, which differs by rank


def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """As Horovod's: runs `function(state, ...)`, and again from the last commit after ranks have failed, left or joined."""

    @functools.wraps(function)
    def settled(state: Any, *args: Any, **options: Any) -> Any:
        if isinstance(state, TorchState):
            state.settle()
        return function(state, *args, **options)

    return horovod_elastic.run(settled)


get_handler_registry().insert(0, (_Distributed, CompressedOptimizerHandler))  # before that of all optimizers
