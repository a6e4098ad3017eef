"""Puts off what the host would have to wait for a device to know: flags stay on the device until a driver reads them all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from ...errors import PayloadError, Sender, sender
from ...parts.ops import Flag, Ops


class DeferringOps(Ops):
    """The base of TorchOps. `deferring` returns a copy that defers: whose answers about values are flags on the device."""

    #: (whether it holds, what to say else, who sent the payload and for which parameter), of each requirement that was put off.
    _required: list[tuple[torch.Tensor, str | Callable[[], object], Sender | None]]

    def deferring(self) -> DeferringOps:
        own = copy.copy(self)
        own.defers, own._required = True, []
        return own

    def require(self, holds: Flag, otherwise: str | Callable[[], object]) -> None:
        if self.defers and isinstance(holds, torch.Tensor):
            self._required.append((holds, otherwise, sender.get()))
        else:
            super().require(holds, otherwise)

    def judged(self, flags: Sequence[Flag]) -> list[bool]:
        required, self._required = self._required, []
        asked = [*flags, *(holds for holds, _, _ in required)]
        on_device = [flag.reshape(()) for flag in asked if isinstance(flag, torch.Tensor)]
        told = iter(self.host(torch.stack(on_device)).tolist() if on_device else [])
        answers = [next(told) if isinstance(flag, torch.Tensor) else bool(flag) for flag in asked]
        for holds, (_, otherwise, who) in zip(answers[len(flags) :], required, strict=True):
            self.defers = False  # what says why may decode the payload again
            try:
                super().require(holds, otherwise)
            except PayloadError as error:
                raise (who.blamed(error) if who else error) from None
            finally:
                self.defers = True
        return answers[: len(flags)]

    def forget(self) -> None:
        self._required = []

    def kept_if(self, flag: Flag, x: torch.Tensor) -> torch.Tensor:
        return torch.where(flag, x, 0.0) if isinstance(flag, torch.Tensor) else super().kept_if(flag, x)

    def within(self, positions: torch.Tensor, size: int) -> torch.Tensor:
        return positions.clamp(0, size - 1) if self.defers else positions
