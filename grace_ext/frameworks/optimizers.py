"""Reads the learning rate of the user's optimizer, and checks that the optimizer fits the memories of a Grace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import IncompatiblePartsError

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


def check_optimizer(grace: Grace, name: str, settings: Mapping[str, Any]) -> None:
    """Raises IncompatiblePartsError if a memory is the momentum of the training, or needs plain SGD (cser), and this optimizer has a
    momentum of its own or is adaptive; for cser also if a setting of BESIDE_GRADIENTS is on.

    name: the name of the optimizer's class. settings: its hyperparameters by name."""
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
