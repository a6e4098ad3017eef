"""Recovers a batch from the gradients that a rank sent: analytically, by matching gradients (DLG), and by matching directions (Geiping).

An attacker knows the model, its weights and the range of the inputs. A naive one takes what the payloads decode to for the gradients. An
adaptive one also knows the compressor: it compares only what was observed (Compressor.observed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..compressors.base import Observed, whole
from .observer import Leak
from .victim import Victim

ATTACKS = ("analytic", "dlg", "cosine")
ATTACKERS = ("naive", "adaptive")
Target = Mapping[str, Observed]
Tick = Callable[[float], None]
#: Conjugate gradients end at this share of the first squared residual: below it are the rounding errors of operators in float32, which
#: would turn up as huge inputs where several inputs fit (as those of a random projection do).
ROUNDING = 1e-12
#: L-BFGS has found the input if the squared distance of the gradients is this share of the target's squared norm.
EQUAL = 1e-10


def target_of(leak: Leak, attacker: str) -> Target:
    """Returns what an attacker compares gradients with."""
    if attacker == "adaptive":
        return leak.observed
    return {name: Observed(gradient.reshape(-1), whole) for name, gradient in leak.decoded.items()}


def seen(target: Target, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns what would have been observed of these gradients, as one vector."""
    return torch.cat([found.operator(gradients[name].reshape(-1)) for name, found in target.items()])


def values(target: Target) -> torch.Tensor:
    return torch.cat([found.values for found in target.values()])


def labels_of(victim: Victim, leak: Leak, batch: int) -> torch.Tensor | None:
    """Returns the labels of a batch, by the signs of the last layer's bias: the cross-entropy raises no scores but those of the batch's
    labels. Each label found takes away 1/batch, so that one may be found again. None if the model has no such layer, or another loss."""
    gradient = victim.label_gradient(leak.decoded) if victim.usual_loss else None
    if gradient is None:
        return None
    left, found = gradient.clone(), []
    for _ in range(batch):
        found.append(int(left.argmin()))
        left[found[-1]] += 1 / batch
    return torch.tensor(found)


def analytic(victim: Victim, target: Target, leak: Leak, batch: int) -> torch.Tensor:
    """Returns the inputs of the first layer, which is fully connected and has a bias. For one example dW = db x^T, and x is fitted to what
    was observed of all rows, by least squares. For several, it returns dW_i / db_i of every row: mixtures of the examples that reach it."""
    name = victim.first_layer()
    assert name is not None  # `applies` has asked
    biases, weights = target[f"{name}bias"], target[f"{name}weight"]
    rows, shape = spread(biases, leak.decoded[f"{name}bias"].numel()).float(), victim.inputs.shape[1:]
    if batch == 1:
        found = _fitted(weights, rows, shape.numel()).reshape(1, *shape)
    else:
        kept = rows != 0
        found = (spread(weights, leak.decoded[f"{name}weight"].numel()).reshape(len(rows), -1)[kept] / rows[kept, None]).reshape(-1, *shape)
    return found.clamp(*victim.box)


def spread(observed: Observed, size: int) -> torch.Tensor:
    """Returns what was observed as a gradient of this many elements, zero where nothing is known: the operator's transpose of the values.
    The transpose of a linear operator is its derivative, applied to a vector."""
    anywhere = torch.zeros(size, requires_grad=True)
    return torch.autograd.grad(observed.operator(anywhere), anywhere, observed.values)[0]


def _fitted(observed: Observed, rows: torch.Tensor, size: int, steps: int = 50) -> torch.Tensor:
    """Returns the x of least norm that minimizes ||operator(rows x^T) - values||, by conjugate gradients on the normal equations."""
    scale = rows.double().norm().clamp_min(1e-300)
    rows = rows.double() / scale
    raw = observed.values

    def forward(x: torch.Tensor) -> torch.Tensor:
        return observed.operator((rows[:, None] * x).reshape(-1).to(raw.dtype)).double()

    anywhere = torch.zeros(size, dtype=torch.float64, requires_grad=True)

    def backward(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(forward(anywhere), anywhere, y)[0]

    x = torch.zeros(size, dtype=torch.float64)
    residual = direction = backward(raw.double())
    before = residual @ residual
    first = before
    for _ in range(steps):
        if before <= ROUNDING * first or not first:
            break
        product = backward(forward(direction))
        step = before / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        after = residual @ residual
        direction, before = residual + after / before * direction, after
    return x / scale


def cosine(
    victim: Victim, target: Target, labels: torch.Tensor, generator: torch.Generator, tick: Tick, steps: int = 1000, smooth: float = 3e-3
) -> torch.Tensor:
    """Returns inputs whose gradient has the direction of the target (Geiping et al. 2020): 1 - cosine + `smooth` times the total variation,
    by Adam on the signs of the derivative, in the inputs' range, with a step of 0.1 that falls tenfold three times."""
    low, high = victim.box
    x = low + (high - low) * torch.rand(len(labels), *victim.inputs.shape[1:], generator=generator)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1 * (high - low))
    rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(steps * part) for part in (3 / 8, 5 / 8, 7 / 8)])
    wanted = values(target)
    for _ in range(steps):
        got = seen(target, victim.gradients(x, labels, differentiable=True))
        cost = 1 - nn.functional.cosine_similarity(got, wanted.to(got.dtype), dim=0) + smooth * variation(x) / (high - low)
        x.grad = torch.autograd.grad(cost, x)[0].sign()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            x.clamp_(low, high)
        tick(1 / steps)
    return x.detach()


def variation(x: torch.Tensor) -> torch.Tensor:
    """Returns the mean total variation of images; 0 for inputs that are no images."""
    if x.ndim < 4:
        return x.new_zeros(())
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


def dlg(
    victim: Victim, target: Target, labels: torch.Tensor, generator: torch.Generator, tick: Tick, steps: int = 40, starts: int = 2
) -> torch.Tensor:
    """Returns inputs whose gradient equals the target (Zhu et al. 2019), by L-BFGS on inputs and labels together. It often diverges: of
    several starts the best match counts. If the loss is not the cross-entropy, the labels are those that the bias gives."""
    wanted, best, least = values(target), None, float("inf")
    for start in range(starts):
        x = torch.randn(len(labels), *victim.inputs.shape[1:], generator=generator)
        guess = torch.randn(len(labels), victim.scores(x).shape[1], generator=generator)
        cost = _matched(victim, target, wanted, x, labels, guess, steps)
        tick(1 / starts)
        if best is None or cost < least:
            best, least = x.detach(), cost
        if least < EQUAL * float(wanted.square().sum()):
            tick((starts - start - 1) / starts)
            break
    assert best is not None
    return torch.nan_to_num(best).clamp(*victim.box)


def _matched(
    victim: Victim, target: Target, wanted: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, guess: torch.Tensor, steps: int
) -> float:
    """Changes x, and the scores `guess` of the labels, until gradients match or L-BFGS gets no further. Returns the squared distance."""
    free = [x.requires_grad_(), guess.requires_grad_()] if victim.usual_loss else [x.requires_grad_()]
    optimizer, cost = torch.optim.LBFGS(free, lr=1.0), float("inf")

    def closure() -> torch.Tensor:
        got = seen(target, victim.gradients(x, guess.softmax(dim=1) if victim.usual_loss else labels, differentiable=True))
        distance = (got - wanted.to(got.dtype)).square().sum()
        for tensor, derivative in zip(free, torch.autograd.grad(distance, free), strict=True):
            tensor.grad = derivative
        return distance

    for _ in range(steps):
        before, cost = cost, float(optimizer.step(closure).detach())
        if not EQUAL * float(wanted.square().sum()) < cost < 0.99 * before:
            break
    return float(closure().detach())
