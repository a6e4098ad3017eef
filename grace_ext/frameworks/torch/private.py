"""Makes the gradients of one optimizer private: clips ranks or examples, and lets the driver add the noise."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ...driver.driver import Driver
from ...errors import ParameterError, UnsupportedError, few
from ...parts.tensor import TensorSpec
from ...privacy import settings
from ...privacy.settings import Privacy
from .ops import describe

Parameters = Mapping[str, torch.nn.Parameter]
BATCH_NORM = settings.BATCH_NORM + "Use GroupNorm or LayerNorm, or set these layers to eval()"
SCALER = (
    "scaler= cannot be used with privacy: a gradient that is not finite counts as 0, because a skipped step would tell about one example, "
    "so the scaler would never lower its scale. Train in bfloat16 (torch.autocast), which needs no scaler"
)
NO_EXAMPLES = (
    "{} parameters ({}) have gradients and no per-example gradients, so examples cannot be clipped one by one: compute them by "
    "hvd.per_example_backward(model, loss, inputs, targets), or wrap the model in opacus.GradSampleModule"
)


def check_private_training(privacy: Privacy, optimizer: torch.optim.Optimizer, scaler: Any, clip_before: float | None) -> None:
    """Raises an error if something beside the gradient would leave a rank, or if private gradients would be used wrongly."""
    if scaler is not None:
        raise UnsupportedError(SCALER)
    if clip_before is not None:
        raise ParameterError(
            f"clip_before={clip_before:g} is given, and privacy clips to {privacy.clip:g} before the exchange: leave it out"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS ends its iterations by the ranks' mean loss, which would be exchanged without noise: use another optimizer with privacy"
        )


def check_no_batch_norm(parameters: Parameters) -> None:
    """Raises UnsupportedError if a living model that holds one of these parameters has batch normalization in training mode. Searches all
    objects of the process, so call it once."""
    mine = {id(p) for p in parameters.values()}
    modules = [module for module in gc.get_objects() if issubclass(type(module), torch.nn.Module)]
    _refuse_batch_norm(module for module in modules if any(id(p) in mine for p in module.parameters()))


def _refuse_batch_norm(modules: Iterable[torch.nn.Module]) -> None:
    """Raises UnsupportedError if one of these modules, which may contain each other, has batch normalization in training mode."""
    names: dict[int, str] = {}
    for module in modules:
        for path, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                # Of a layer's names, that in the whole model is the longest.
                names[id(layer)] = max(path or type(layer).__name__, names.get(id(layer), ""), key=len)
    if names:
        raise UnsupportedError(BATCH_NORM.format(len(names), max(names.values(), key=len)))


def privatized(driver: Driver, parameters: Parameters, computed: Iterable[str], sparse_as_dense: bool) -> dict[str, torch.Tensor]:
    """Returns the private gradients of all these parameters, and clears the per-example ones.

    computed: the names of those that a backward pass has given a gradient since the last step."""
    mechanism = driver.mechanism
    assert mechanism is not None
    if not driver.agreed:
        check_no_batch_norm(parameters)
    specs = {name: TensorSpec(name, *describe(parameter)) for name, parameter in parameters.items()}
    if mechanism.privacy.unit == "rank":
        return driver.privatize(_own(parameters, sparse_as_dense), specs)
    lacking = [name for name in computed if getattr(parameters[name], "grad_sample", None) is None]
    if lacking:
        raise UnsupportedError(NO_EXAMPLES.format(len(lacking), few(lacking)))
    private = driver.privatize(_per_example(parameters), specs)
    forget_examples(parameters.values())
    return private


def _own(parameters: Parameters, sparse_as_dense: bool) -> dict[str, torch.Tensor]:
    """Returns this rank's gradients."""
    own = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            if not sparse_as_dense:
                raise UnsupportedError(
                    f"the gradient of {name!r} is sparse, and which rows it has tells about the examples, whatever noise is on them: pass "
                    "sparse_as_dense=True, or make the layer with sparse=False"
                )
            gradient = gradient.to_dense()
        if gradient is not None:
            own[name] = gradient
    return own


def _per_example(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Returns the per-example gradients of this step; those of several backward passes make up one batch."""
    samples = {name: getattr(parameter, "grad_sample", None) for name, parameter in parameters.items()}
    return {
        name: torch.cat(list(sample)).detach() if isinstance(sample, list) else sample.detach()
        for name, sample in samples.items()
        if sample is not None
    }


def forget_examples(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Drops the per-example gradients of these parameters."""
    for parameter in parameters:
        if getattr(parameter, "grad_sample", None) is not None:
            parameter.grad_sample = None  # type: ignore[attr-defined]


def per_example_backward(model: torch.nn.Module, loss: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any) -> torch.Tensor:
    """Computes each example's own gradient, by torch.func, and leaves them in `grad_sample` of the parameters, where
    `DistributedOptimizer(privacy=Privacy(unit='example', ...))` takes them in step(). It stands in place of loss.backward().

    model: is called with a batch of one example at a time, vectorized over the examples. loss(outputs, targets): a scalar.
    inputs, targets: tensors whose first dimension counts the examples; there may be none.
    Several calls before a step make up one batch. Returns the examples' losses, which are not private: do not publish them.
    Raises UnsupportedError for a model with batch normalization in training mode."""
    if len(inputs) != len(targets):
        raise ParameterError(f"inputs and targets must be of the same examples, got {len(inputs)} and {len(targets)}")
    _refuse_batch_norm([model])
    gradients, losses = gradients_of_examples(model, loss, inputs, targets)
    for name, parameter in model.named_parameters() if len(losses) else ():
        if name in gradients:
            before = getattr(parameter, "grad_sample", None)
            earlier = [] if before is None else before if isinstance(before, list) else [before]
            parameter.grad_sample = [*earlier, gradients[name]]  # type: ignore[attr-defined]
    return losses


def gradients_of_examples(
    model: torch.nn.Module, loss: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns (the gradients of each example, by parameter that is trained, with one dimension more in front; the examples' losses). The
    arguments are those of `per_example_backward`."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not len(inputs):
        return {name: p.new_zeros(0, *p.shape) for name, p in trained.items()}, torch.zeros(0)
    fixed = {**{name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}, **dict(model.named_buffers())}

    def loss_of(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, {**parameters, **fixed}, (x.unsqueeze(0),))
        return loss(outputs, y.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
    gradients, losses = each(trained, inputs, targets)
    return gradients, losses.detach()
