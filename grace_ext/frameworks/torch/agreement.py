"""`check_agreement`: checks that all ranks still train the same model in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...driver.agreement import agree, check_values
from ...errors import UnsupportedError
from ...exchange.perform import perform
from . import engine
from .adapter import BoundCompression
from .devices import ops_for
from .hook_state import HookState
from .optimizer import CompressedOptimizer
from .session import Session, digests_of


def check_agreement(of: Any, model: torch.nn.Module | None = None) -> None:
    """Raises DisagreementError on every rank alike, naming ranks and parameters, if the ranks' specs, parameter names, shapes, versions or
    steps differ, or the bits of their parameters.

    of: a DistributedOptimizer, the state of `ddp_comm_hook` or `fsdp_hook`, a bound Grace, or Horovod's own DistributedOptimizer. The
      parameters whose gradients it exchanges are compared.
    model: compares the whole state_dict of this model instead, including buffers. (BatchNorm's running statistics differ by rank, unless
      it is a SyncBatchNorm.)

    Every rank of the process set must call it between steps, after `step()` and before the next `backward()`; else it raises GraceError.
    It waits for the slowest rank, reads every parameter once and gathers about 30 bytes per parameter, so call it about every hundred
    steps. At world size 1 it does nothing.
    """
    session = _session_of(of)
    tensors = _tensors_of(of) if model is None else {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    if session is not None:
        if session.driver.transport.size > 1:
            session.compare(tensors)
        return
    process_set = getattr(of, "process_set", None) or engine.api.global_process_set
    if tensors and process_set.included() and process_set.size() > 1:
        transport = engine.transport(ops_for(next(iter(tensors.values())).device), process_set)
        mine = {"spec": f"{type(of).__name__} without compression", "seed": 0, "parameters": []}
        _, values = perform(agree(transport.ops, transport, mine, digests_of(tensors)), transport, {})
        check_values(values)


def _session_of(of: Any) -> Session | None:
    """Returns the session of one of grace_ext's objects; None for another optimizer. Raises UnsupportedError for anything else."""
    if isinstance(of, HookState):
        return of._session()
    if isinstance(of, BoundCompression):
        return of._get_session()
    if isinstance(of, CompressedOptimizer):
        return of._exchange.session
    if isinstance(of, torch.optim.Optimizer):
        return None
    raise UnsupportedError(f"check_agreement takes a DistributedOptimizer, a hook's state or a bound Grace, not {type(of).__name__}")


def _tensors_of(of: Any) -> Mapping[str, torch.Tensor]:
    if isinstance(of, CompressedOptimizer):
        return of._exchange.parameters
    if isinstance(of, HookState):
        return of._tensors()
    if isinstance(of, BoundCompression):
        return of._parameters
    return {f"parameter {i}.{j}": p for i, group in enumerate(of.param_groups) for j, p in enumerate(group["params"])}
