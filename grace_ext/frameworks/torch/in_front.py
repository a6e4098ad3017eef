"""Optimizers that stand in front of a user's own optimizer and share its parameter groups and its state."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch

from ...errors import UnsupportedError

COPIED = (
    "this {} cannot be copied or pickled: it belongs to collectives of this process. Save and load its state_dict(), or copy the model and "
    "wrap a new optimizer"
)


class InFront(torch.optim.Optimizer):
    """The base of the optimizers that `in_front_of` makes. Objects that change must be attributes from the start: some libraries
    (Lightning) copy an optimizer's attributes into an object of their own, and both must go on sharing them."""

    _behind: torch.optim.Optimizer  # the user's own

    def _mark_step(self) -> None:
        """Tells schedulers, which may hold the user's own optimizer, that a step was made; else they warn of a wrong order of calls."""
        self._behind._opt_called = True  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedError(COPIED.format(type(self).__name__))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(COPIED.format(type(self).__name__))


Made = TypeVar("Made", bound=InFront)


def in_front_of(optimizer: torch.optim.Optimizer, kind: type[Made]) -> Made:
    """Returns an optimizer whose class derives from `kind` and then from this optimizer's own class, so that schedulers and isinstance()
    see what they expect. It shares all attributes, and goes on sharing groups and state after either of the two loads a state."""
    cls: Any = type(type(optimizer).__name__, (kind, type(optimizer)), {"__module__": kind.__module__})
    made: Made = cls.__new__(cls)
    optimizer.register_load_state_dict_post_hook(keeps_containers(optimizer.param_groups, optimizer.state))
    # A scheduler may have replaced these two methods in the instance.
    made.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in ("step", "zero_grad")})
    made._behind = optimizer
    return made


def keeps_containers(groups: list[dict[str, Any]], state: Any) -> Any:
    """Returns a hook that runs after load_state_dict of either optimizer (the hooks are among the attributes that they share). Torch
    replaces groups and state by new objects then; the hook puts the new contents into the old ones, which schedulers and the other
    optimizer hold."""

    def after_load(optimizer: torch.optim.Optimizer) -> None:
        if optimizer.param_groups is not groups:
            for old, new in zip(groups, optimizer.param_groups, strict=True):
                old.clear()
                old.update(new)
            optimizer.param_groups = groups
        if optimizer.state is not state:
            loaded = dict(optimizer.state)
            state.clear()
            state.update(loaded)
            optimizer.state = state

    return after_load
