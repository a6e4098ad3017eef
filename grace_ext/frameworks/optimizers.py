"""Reads the learning rate of the user's optimizer, and checks that the optimizer fits the memories of a Grace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..composition.composition import Composition
from ..errors import IncompatiblePartsError, UnsupportedError
from ..policies.schedules import Warmup

if TYPE_CHECKING:
    from ..composition.grace import Grace

#: Hyperparameters that only adaptive optimizers have (those with moments or scales of their own), by their names in torch and Keras.
ADAPTIVE = ("betas", "eps", "etas", "rho", "beta_1", "beta_2_decay", "epsilon", "learning_rate_power", "history_size")

#: Hyperparameters that make an update differ from -lr * gradient. CSER undoes exactly what plain SGD makes of a gradient.
BESIDE_GRADIENTS = ("weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps", "use_ema", "lambd")


def rate_of(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the learning rate of an optimizer's parameter groups: None if there is none, NaN if they differ (parts that use the rate
    reject NaN)."""
    rates = {float(group["lr"]) for group in groups if "lr" in group}
    if len(rates) > 1:
        return float("nan")
    return rates.pop() if rates else None


def require_optimizer(grace: Grace, optimizer: Any, caller: str) -> None:
    """Raises UnsupportedError if there is no optimizer, and a part of this Grace uses its learning rate or is the momentum in its place."""
    parts = [part for leaf in grace.leaves for part in (leaf.memory, leaf.communicator)]
    for part in parts if optimizer is None else ():
        momentum, its = getattr(part, "is_momentum", False), getattr(part, "optimizer_momentum", None)
        if momentum or its is not None or part.uses_lr:
            why = "is the momentum of the training, so the optimizer must not have one" if momentum else "uses the learning rate"
            why = why if its is None else f"needs an optimizer whose momentum is {its:g}"
            raise UnsupportedError(f"{part.kind} {part} {why}: pass the optimizer to {caller}(..., optimizer=optimizer)")


def check_optimizer(grace: Grace, name: str, settings: Mapping[str, Any]) -> None:
    """Raises IncompatiblePartsError if a memory is the momentum of the training, or needs plain SGD (cser), and this optimizer has a
    momentum of its own or is adaptive; for cser also if a setting of BESIDE_GRADIENTS is on. Also if a memory compresses another momentum
    than the optimizer's, or something is compressed before the optimizer freezes its variance (`freeze_step`, see OneBitAdam).

    name: the name of the optimizer's class. settings: its hyperparameters by name."""
    _check_same_momentum(grace, name, settings)
    _check_frozen(grace, name, settings)
    memory = next((memory for memory in grace.memories if memory.is_momentum or memory.diverges), None)
    if memory is None:
        return
    adaptive = [key for key in ADAPTIVE if key in settings]
    beside = [key for key in BESIDE_GRADIENTS if settings.get(key)] if memory.diverges else []
    if beside:
        raise IncompatiblePartsError(
            f"memory {memory} removes from the model the errors that plain SGD put into it, and the optimizer {name} has "
            f"{', '.join(f'{key}={settings[key]}' for key in beside)}: the ranks' models would not come together again. Use plain SGD (a "
            "decay can be part of the loss, and gradients can be clipped before step()), or memory 'residual'"
        )
    if settings.get("momentum") or adaptive:
        has = f"adapts its steps ({', '.join(adaptive)})" if adaptive else f"has momentum={settings['momentum']} of its own"
        why = "is the momentum of the training", "momentum would be applied twice"
        if memory.diverges:
            why = "removes from the model the errors that plain SGD put into it", "the ranks' models would not come together again"
        raise IncompatiblePartsError(
            f"memory {memory} {why[0]}, and the optimizer {name} {has}: {why[1]}. Use SGD with momentum=0, or memory 'residual'"
        )


def _check_same_momentum(grace: Grace, name: str, settings: Mapping[str, Any]) -> None:
    betas = settings.get("betas") or (settings.get("beta_1"),)
    own = settings.get("momentum") or betas[0] or 0.0
    for memory in grace.memories:
        needed = memory.optimizer_momentum
        if needed is not None and needed != own:
            raise IncompatiblePartsError(
                f"memory {memory} compresses the optimizer's momentum, and that of {name} is {own:g}, not {needed:g}: give both the same "
                "(for an Adam it is the first of its betas), or use memory 'residual'"
            )


def _check_frozen(grace: Grace, name: str, settings: Mapping[str, Any]) -> None:
    freeze, dense = settings.get("freeze_step", math.inf), _dense_steps(grace.route)
    if dense < freeze < math.inf:
        raise IncompatiblePartsError(
            f"the optimizer {name} adapts its variance in the first {freeze} steps, and {grace} compresses after {dense}: the variance "
            f"would be that of compressed gradients. Use warmup(steps={freeze}, then=...), or a lower freeze_step"
        )


def _dense_steps(route: Any) -> float:
    """Returns how many steps from the first on send every tensor uncompressed."""
    if isinstance(route, Composition):
        return math.inf if route.compressor.name == "none" else 0
    own = route.steps if isinstance(route, Warmup) else 0
    return max(own, min((_dense_steps(child) for child in route.children()), default=0))
