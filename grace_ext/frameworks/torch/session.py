"""Names and checks the gradients of one model on this rank, and runs the driver for them on a transport.

The wrapper (optimizer.py), the DDP hook (ddp.py) and the `compression=` object for unmodified Horovod (adapter.py) share it.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ...checkpoints.saveable import Saveable, saveable_by
from ...composition.grace import Grace
from ...driver.agreement import digest_of
from ...driver.driver import Driver
from ...driver.state import check_form
from ...errors import GraceError, UnsupportedError
from ...exchange.perform import perform
from ...exchange.transport import Transport
from ...parts.tensor import TensorSpec
from ..optimizers import check_optimizer
from .dcp import OfOneRank
from .devices import ops_for
from .guards import check_containers, local_of
from .ops import HostOps, TorchOps, as_bytes, describe


def check_torch_optimizer(grace: Grace, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises IncompatiblePartsError if a memory of this Grace cannot work with the optimizer."""
    for group in [] if optimizer is None else optimizer.param_groups:
        check_optimizer(grace, type(optimizer).__name__, group)


def check_none_new(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Raises UnsupportedError if the optimizer trains parameters other than these, which were known when it was wrapped."""
    known = {id(p) for p in parameters}
    new = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) not in known]
    if new:
        raise UnsupportedError(
            f"{len(new)} parameters (shapes {[list(p.shape) for p in new[:3]]}) train now that did not when the optimizer was wrapped, "
            "so their gradients would not be exchanged: wrap the optimizer again on every rank after layers are unfrozen or added"
        )


class Session:
    """One model's exchange. Parameters are registered at the first `finish`, when it is known which have dense gradients.

    wrapper: the name of the public function that exchanges these parameters, which no DDP may exchange, too; None if it is DDP that does.
    check_start: compares the ranks' parameters at the first step. compressing: as for the driver.
    scaler: the GradScaler by whose scale the gradients are multiplied, or None. They are divided by the scale before they are compressed,
    and the results are multiplied by it again: the memory is in units of the gradient, however the scale changes. Both are exact if the
    scale is a power of two."""

    def __init__(
        self,
        grace: Grace,
        parameters: dict[str, torch.nn.Parameter],
        make_transport: Callable[[HostOps | TorchOps], Transport],
        *,
        wrapper: str | None,
        average: bool,
        read_lr: Callable[[], float | None],
        scaler: Any = None,
        check_start: bool = True,
        compressing: bool = True,
    ):
        self.parameters, self._wrapper = parameters, wrapper
        self.ops = ops_for(next(iter(parameters.values())).device)
        transport = make_transport(self.ops)
        divisor = None if average else 1
        self.driver = Driver(grace, self.ops, transport, divisor=divisor, read_lr=read_lr, in_place=True, compressing=compressing)
        if check_start:
            self.driver.starting = lambda: digests_of(self.parameters)
        self._scaler = scaler
        self._scale: float | None = None  # the scale of the step under way, once it was read
        self._handles: dict[str, Any] = {}
        self._first: dict[str, torch.Tensor] = {}
        self._spans: list[tuple[int, int]] = []  # where this step's gradients lie in memory, in order, without overlaps
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()  # backward hooks of different devices may run at the same time

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to collectives in the last step."""
        return self.driver.wire_bytes

    @property
    def scale(self) -> float:
        """The factor by which this step's gradients are multiplied; 1 without a scaler."""
        if self._scale is None:  # read once per step: on a GPU it waits for the device
            self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        return self._scale

    def put(self, name: str, gradient: torch.Tensor) -> None:
        """Takes a gradient, and starts the buckets whose turn it is; never waits. The result is written over the gradient, unless its
        memory has gaps or is another gradient's, too; then over a copy."""
        with self._lock:
            compact, again = _is_compact(gradient), self._seen_before(gradient)
            with torch.no_grad():
                if not compact or again:
                    gradient = gradient.clone(memory_format=torch.preserve_format if compact else torch.contiguous_format)
                if self.scale != 1 and not again:
                    gradient.div_(self.scale)
            if self.driver.specs:
                perform(self.driver.put(name, gradient), self.driver.transport, self._handles)
            else:
                self._first[name] = gradient

    def _seen_before(self, gradient: torch.Tensor) -> bool:
        """Whether another gradient of this step has the same memory; torch.autograd.grad, for example, can give one tensor for two
        parameters. Raises UnsupportedError for memory that two gradients share in part, if a scaler has to divide each of them."""
        if not gradient.numel():
            return False
        begin = gradient.data_ptr()
        last = sum((n - 1) * step for n, step in zip(gradient.shape, gradient.stride(), strict=True))
        span = begin, begin + (last + 1) * gradient.element_size()
        at = bisect.bisect(self._spans, span)
        overlapping = [other for other in self._spans[max(0, at - 1) : at + 1] if other[0] < span[1] and span[0] < other[1]]
        if self.scale != 1 and overlapping not in ([], [span]):
            raise UnsupportedError(
                "two gradients share a part of their memory, which scaler= cannot divide by the scale twice: give each parameter a "
                "gradient of its own (gradient.clone())"
            )
        if not overlapping:
            self._spans.insert(at, span)
        return bool(overlapping)

    def agree(self, names: Iterable[str]) -> None:
        """Registers the parameters of these names, and makes the ranks agree, before the first step is finished. Every rank calls it."""
        with self._lock:
            try:
                self._register(names)
                perform(self.driver.agree(), self.driver.transport, {})
            except BaseException:
                self._end()
                raise

    def _register(self, names: Iterable[str]) -> None:
        if self._wrapper:
            check_containers(self.parameters, self._wrapper)
        self.driver.register(self._spec(name) for name in names)

    def finish(
        self, names: Iterable[str], *, commit: bool = True, revocable: bool = False, others_finite: bool = True
    ) -> dict[str, torch.Tensor]:
        """Ends the step for the parameters of these names (the same at every step). Returns the aggregates by name; they are written over
        the gradients that `put` got. commit, revocable: as for Driver.finish. others_finite: see Driver."""
        with self._lock:
            try:
                if not self.driver.specs:
                    self._register(names)
                for name, gradient in self._first.items():
                    perform(self.driver.put(name, gradient), self.driver.transport, self._handles)
                self.driver.others_finite = others_finite
                results = perform(self.driver.finish(commit=commit, revocable=revocable), self.driver.transport, self._handles)
                return {name: x.mul_(self.scale) for name, x in results.items()} if self.scale != 1 else results
            finally:
                self._end()

    def _end(self) -> None:
        self._scale = None
        self._first.clear()
        self._spans.clear()
        self._handles.clear()

    def forget(self) -> None:
        """Drops the gradients of a step of which nothing was started. Every rank must call it."""
        with self._lock:
            self._first.clear()
            self._spans.clear()
            self._scale = None
            self.driver.abandon()
            self.driver.revoke()

    def undo(self) -> None:
        """Restores the memory that the last step changed, if it was revocable and no other step has begun. Every rank must call it."""
        with self._lock:
            self.driver.undo()

    def _spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, *describe(self._first.get(name, self.parameters[name])))

    def compare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compares these tensors, by name, between the ranks, as Driver.compare does. Raises GraceError or DisagreementError."""
        with self._lock:
            if self._first:
                raise GraceError("parameters are compared between steps: call it after the optimizer's step, before the next backward pass")
            perform(self.driver.compare(digests_of(tensors)), self.driver.transport, {})

    def move(self, carried_over: Callable[[Any], Any], make_transport: Callable[[Any], Transport], average: bool) -> None:
        """Continues among other ranks, as Driver.move does. `carried_over` maps this rank's state (numpy arrays; None if there is none) to
        its state among the new ranks."""
        driver = self.driver
        saved = driver.state_dict()
        state = {key: self.ops.host(array) for key, array in saved["state"].items()}
        if driver.specs:  # else the ranks have changed again before the first step
            self._sizes = {spec.name: spec.size for spec in driver.specs.values()}
        own = {**saved, "state": state, "sizes": self._sizes}
        moved = carried_over(own if driver.step else None)
        self._first.clear()
        self._spans.clear()
        self._handles.clear()
        transport = make_transport(self.ops)
        driver.move(transport, None if average else 1)
        if moved is not None:
            arrays = {key: self.ops.upload(array) for key, array in moved["state"].items()}
            driver.load_state_dict({**moved, "state": arrays}, joining=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the driver's state, with torch tensors (so that `torch.load` reads them without pickle)."""
        saved = self.driver.state_dict()
        return OfOneRank({**saved, "state": {key: self.ops.as_torch(array) for key, array in saved["state"].items()}})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` returned. Raises GraceError, and changes nothing, if the state does not fit."""
        self.driver.load_state_dict(self._own_arrays(saved), self._specs())

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raises GraceError if `load_state_dict` would; changes nothing."""
        self.driver.read_state(self._own_arrays(saved), self._specs())

    def _own_arrays(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the state with arrays of this exchange's library and device, made from tensors or numpy arrays."""
        check_form(saved)
        device = next(iter(self.parameters.values())).device
        arrays = {key: torch.as_tensor(array).detach().to(device) for key, array in saved["state"].items()}
        return {**saved, "state": {key: self.ops.from_torch(array) for key, array in arrays.items()}}

    def _specs(self) -> list[TensorSpec]:
        return [self._spec(name) for name in self.parameters]

    def saveable(self) -> Saveable:
        """Returns what grace_ext.save and load need."""
        driver = self.driver
        return saveable_by(
            driver.transport, driver.state_dict, lambda saved: driver.read_state(saved, self._specs()), driver.load_state_dict
        )


def _is_compact(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps and without overlaps, in whatever order."""
    expected = 1
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step != expected:
            return False
        expected *= n
    return not tensor.is_conj() and not tensor.is_neg()


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns a digest of each tensor's dtype, shape and bits, by name (agreement.digest_of), for any dtype."""
    found = {}
    for name, tensor in tensors.items():
        data = local_of(tensor.detach()).cpu().contiguous()
        found[name] = f"{data.dtype}{list(data.shape)}:" + digest_of(as_bytes(data).numpy())
    return found


def require_sum_or_mean(op: Any, api: Any) -> bool:
    """Whether `op` is the mean. Raises UnsupportedError if it is neither mean nor sum."""
    if op in (None, api.Average):
        return True
    if op == api.Sum:
        return False
    known = {api.Adasum: "Adasum", api.Min: "Min", api.Max: "Max", api.Product: "Product"}
    reason = (
        "it combines parameter updates by their angles, and grace_ext compresses gradients"
        if op == api.Adasum
        else "compressed gradients can only be averaged or summed"
    )
    raise UnsupportedError(f"op={known.get(op, op)} cannot be combined with compression: {reason}; use op=hvd.Average or compression=None")
