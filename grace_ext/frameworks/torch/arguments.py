"""Checks what `DistributedOptimizer` is given, and names the parameters."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import NamesError
from .guards import check_parameters


def check_groups(groups: Any) -> None:
    """Raises ValueError, as Horovod does, if `groups` is neither a number nor lists of different tensors."""
    if groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 0):
        return
    if not isinstance(groups, list):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor.")
    flat = [p for group in groups for p in group]
    if any(not isinstance(p, torch.Tensor) for p in flat):
        raise ValueError("groups must consist of torch.Tensor.")
    if len({id(p) for p in flat}) < len(flat):
        raise ValueError("A parameter can only appear once in groups.")


def named(optimizer: torch.optim.Optimizer, named_parameters: Any) -> dict[str, torch.nn.Parameter]:
    """Returns the optimizer's parameters that train, by name. Raises NamesError if one of the optimizer's parameters has no name."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        named_parameters = [
            (f"allreduce.noname.{i}.{j}", p) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])
        ]
    by_name = check_parameters(named_parameters)
    known, mine = {id(p) for p in by_name.values()}, {id(p) for p in own}
    unnamed = [i for i, p in enumerate(own) if id(p) not in known]
    if unnamed:
        raise NamesError(f"named_parameters lacks {len(unnamed)} of the optimizer's {len(own)} parameters (positions {unnamed[:5]}...)")
    return {name: p for name, p in by_name.items() if id(p) in mine and p.requires_grad}
