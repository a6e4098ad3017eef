"""`OneBitAdam`: Adam that stops to adapt its variance when compression begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...errors import ParameterError, UnsupportedError


class OneBitAdam(torch.optim.Optimizer):
    """Adam for compressed momentum: it adapts its variance in the first, dense steps, and then no more (1-bit Adam, Tang et al. 2021).

        optimizer = hvd.OneBitAdam(model.parameters(), lr=1e-3, freeze_step=1000)
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), compression="warmup(steps=1000, then=efsignsgd + momentum_compression)"
        )

    At step t, for the mean gradient g over the ranks, F = freeze_step, b1, b2 = betas and every element:
        m <- b1 m + (1 - b1) g;  M = m / (1 - b1^t)
        v <- b2 v + (1 - b2) g^2 if t <= F;  V = v / (1 - b2^min(t, F))
        x <- x - lr weight_decay x;  x <- x - lr M / (sqrt(V) + eps)
    Until step F this is AdamW; by default without weight decay, which is Adam. After it the variance v is frozen, with one exception: where
    M^2 > K V, v is raised until both are equal; K = (1 - b1)^2 / ((1 - b2) (1 - b1^2 / b2)), which is 53 by default. Adam never has M^2
    above K V, so this touches only elements that had no or tiny gradients by step F (rows of an embedding), and no step is longer than
    sqrt(K) lr, Adam's longest. The authors leave such elements out of bounds. DeepSpeed's OnebitAdam also has no corrections by 1 - b^t.
    With memory 'momentum_compression' the ranks' momenta are what is compressed, and m is their mean. Compression must not begin before
    step F, and the memory's `momentum` must be b1; the wrappers check both. In the paper the mean is compressed, too: '@ reduce_scatter'.
    Rows that never have a gradient need 'efsignsgd(block=...)', with a block that divides the row, to stay as they are.

    params: as for any torch optimizer, on their device already. lr, betas, eps, weight_decay: as for torch.optim.AdamW.
    freeze_step: the step after which the variance is frozen: past the warm-up of the learning rate, and better more than 1 / (1 - b2).
      math.inf never freezes it, for parameter groups that are not compressed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "freeze_step": freeze_step})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as any torch optimizer does. The state of its parameters begins at once: Horovod's broadcast of an optimizer
        without state would make a step, which would count."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        b1, b2 = group["betas"]
        valid = {
            "lr, eps and weight_decay must not be negative": min(group["lr"], group["eps"], group["weight_decay"]) >= 0,
            "betas must be in [0, 1) and (0, 1)": 0 <= b1 < 1 and 0 < b2 < 1,
            "freeze_step must be a whole number from 1, or math.inf": group["freeze_step"] >= 1
            and (group["freeze_step"] == math.inf or group["freeze_step"] == int(group["freeze_step"])),
        }
        for rule, holds in valid.items():
            if not holds:
                raise ParameterError(f"OneBitAdam: {rule}, got { {key: value for key, value in group.items() if key != 'params'} }")
        for parameter in group["params"]:
            self.state[parameter].update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes a step with the gradients in `.grad`, which must be dense; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if g.is_sparse:
        raise UnsupportedError(f"OneBitAdam takes dense gradients, got a sparse one of shape {list(g.shape)}; use Embedding(sparse=False)")
    lr, (b1, b2), frozen_at = float(group["lr"]), group["betas"], group["freeze_step"]
    m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"] + 1
    state["step"] = t
    x.mul_(1 - lr * group["weight_decay"])
    m.lerp_(g, 1 - b1)
    m_unbias, v_unbias = 1 - b1**t, 1 - b2 ** min(t, frozen_at)
    if t <= frozen_at:
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
    elif b1 * b1 < b2:  # else Adam's steps have no bound
        longest = (1 - b1) ** 2 / ((1 - b2) * (1 - b1 * b1 / b2))
        torch.maximum(v, m.square().mul_(v_unbias / (m_unbias**2 * longest)), out=v)
    x.addcdiv_(m, (v.sqrt() / v_unbias**0.5).add_(group["eps"]), value=-lr / m_unbias)
