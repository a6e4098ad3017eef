"""Elastic Horovod (`hvd.elastic`) with compression: `run`, `TorchState` and `ElasticSampler`.

Horovod's own state would copy rank 0's memory to all ranks, or lose it. Here each rank keeps its own memory: it is committed and rolled
back with the optimizer, and when ranks leave or join, it is resized to the present ranks before training continues.
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
from .optimizer import CompressedOptimizer, broadcast_optimizer_state


class TorchState(horovod_elastic.TorchState):
    """Horovod's TorchState, which also keeps the memory of grace_ext's DistributedOptimizer. Any other optimizer works as in Horovod.

    model, optimizer, attributes: as for Horovod's TorchState.
    resize: what happens to the memory when the number of ranks changes. 'mean': what the remaining ranks had not sent keeps its effect.
      'keep': each rank keeps its own, and new ranks start at zero. 'reset': all start at zero (see grace_ext.resize). What a rank that
      died had not sent is lost. If one rank is left, compression continues, as with simulate=True.
    The optimizers must exchange among all ranks, because process sets do not survive a change of ranks.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, *, resize: str = "mean", **attributes: Any):
        self._resize = check_how(resize)
        super().__init__(model=model, optimizer=optimizer, **attributes)

    def settle(self) -> None:
        """Resizes the memory of compression to the present ranks, and commits. It is a collective; `run` calls it on all ranks each time
        before the function begins."""
        for handler in self._handlers.values():
            if isinstance(handler, CompressedOptimizerHandler):
                handler.settle(self._resize)
        self.save()


class CompressedOptimizerHandler(StateHandler):
    """Saves, restores and synchronizes one DistributedOptimizer, including its memory."""

    def __init__(self, optimizer: CompressedOptimizer):
        super().__init__(optimizer)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(self._saved)

    def sync(self) -> None:
        # Horovod fills a new rank's optimizer by a step with zero gradients. With weight decay that would change the synchronized weights.
        parameters = [p for group in self.value.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        broadcast_optimizer_state(self.value, 0, memory=False)
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)

    def settle(self, how: str) -> None:
        self.value.move(functools.partial(carried_over, _gather, size=engine.api.size(), rank=engine.api.rank(), how=how))


def _gather(mine: Any) -> list[Any]:
    return engine.api.allgather_object(mine, name="grace.elastic")  # Horovod's default name is the object's type, which differs by rank


def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function(state, ...)`, and again from the last commit after ranks have failed, left or joined, as `horovod.torch.elastic.run`
    does."""

    @functools.wraps(function)
    def settled(state: Any, *args: Any, **options: Any) -> Any:
        if isinstance(state, TorchState):
            state.settle()
        return function(state, *args, **options)

    return horovod_elastic.run(settled)


get_handler_registry().insert(0, (CompressedOptimizer, CompressedOptimizerHandler))  # before Horovod's handler of all optimizers
