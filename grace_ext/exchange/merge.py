"""Merges small tensors of a bucket: laid end to end and exchanged as one, they cost one tensor's Python calls instead of a hundred's. On a
device tensors of any size are merged, so that a bucket starts as many operations as one tensor.

The bytes are those of each tensor by itself, one after the other (compressors/forms/merged.py), so ranks need not merge alike.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..communicators.base import Communicator
from ..compressors.base import Compressor
from ..compressors.forms.merged import ROOM, SMALL
from ..errors import IncompatiblePartsError
from ..parts.fast_ops import fast
from ..parts.ops import Ops
from ..parts.tensor import StepInfo, TensorSpec
from .tensor import Job, Outcome, exchange_fused, exchange_tensor, one_pass


def merge_key(ops: Ops, job: Job) -> Any:
    """Returns what neighbours must have in common to be merged; None for a tensor that must be exchanged by itself."""
    spec, state = job.spec, job.state
    if not (spec.size and (spec.size <= SMALL or ops.defers) and job.watch is None and job.memory.elementwise and len(state) <= 1):
        return None
    if not (ops.kernels or ops.defers) or job.grad.itemsize != 4 or (state and "residual" not in state):
        return None
    if not _stateless(job.compressor, job.communicator):
        return None
    return job.compressor, job.memory, job.communicator, spec.dtype, not state


@lru_cache(maxsize=256)
def _stateless(compressor: Compressor, communicator: Communicator) -> bool:
    """Whether an exchange is one pass and leaves no state but the memory's."""
    changes = compressor.keeps_state or type(compressor).on_aggregate is not Compressor.on_aggregate
    return one_pass(compressor, communicator) and not changes and not communicator.keeps_state(compressor)


def runs(ops: Ops, jobs: list[Job]) -> Iterator[list[Job]]:
    """Splits the jobs into runs of at most ROOM elements, so that each run stays in the cache. All are one run on a device."""
    if ops.defers:
        yield jobs
        return
    run: list[Job] = []
    size = 0
    for job in jobs:
        if size + job.spec.size > ROOM:
            yield run
            run, size = [], 0
        run.append(job)
        size += job.spec.size
    yield run


def merge(ops: Ops, jobs: Sequence[Job], info: StepInfo) -> tuple[TensorSpec, Generator[Any, Any, list[Outcome]]] | None:
    """Returns (the whole's spec, the exchange of these tensors as one). None if their compressor has no merged form or a gradient is not
    finite: then they go one by one."""
    first, compiled = jobs[0], fast(ops)
    found = _merged(first.compressor, first.communicator, tuple(job.spec for job in jobs), ops.defers)
    if not found:
        return None
    compressor, spec = found
    grad = ops.concat([job.grad for job in jobs])
    state = {key: ops.concat([job.state[key] for job in jobs]) for key in first.state} or dict(first.memory.init(ops, spec, info))
    if compiled is None:
        whole = first._replace(spec=spec, compressor=compressor, grad=grad, state=state, out=None)
        return spec, _apart([job._replace(out=None) for job in jobs], exchange_tensor(ops, whole, info))
    feedback = first.memory.feedback(state)
    assert feedback is not None  # an elementwise memory has it
    fused = compressor.fused(compiled, grad, feedback, spec, info, {})
    whole = first._replace(spec=spec, compressor=compressor, grad=None, state={}, out=None)  # not to hold what is done with
    return (spec, _apart(jobs, exchange_fused(ops, whole, info, {}, fused))) if fused else None


def _apart(jobs: Sequence[Job], exchange: Generator[Any, Any, Outcome]) -> Generator[Any, Any, list[Outcome]]:
    """Runs the merged exchange and returns the outcome of each of its tensors."""
    whole = yield from exchange
    outcomes, start = [], 0
    for job in jobs:
        end = start + job.spec.size
        output = whole.output[start:end]
        if job.out is not None:
            job.out[:] = output
            output = job.out
        state = {**job.state, **{key: array[start:end] for key, array in whole.state.items()}}
        outcomes.append(Outcome(output, state, whole.finite))
        start = end
    return outcomes


@lru_cache(maxsize=1024)  # asked for each bucket of a model, at every step
def _merged(
    compressor: Compressor, communicator: Communicator, specs: tuple[TensorSpec, ...], batched: bool = False
) -> tuple[Compressor, TensorSpec] | None:
    """Returns the compressor of these tensors' concatenation, and its spec; None if the communicator cannot carry it. batched: by plain
    array operations."""
    one = compressor.batched(specs) if batched else compressor.merged(specs)
    if one is None:
        return None
    try:
        communicator.check(one)
    except IncompatiblePartsError:
        return None
    return one, TensorSpec(", ".join(spec.name for spec in specs), (sum(spec.size for spec in specs),), specs[0].dtype)
