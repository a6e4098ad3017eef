"""Checks of mix_fuzz.py that need specs of their own, or many steps: unbiased means, memories that converge to the mean, memories without
compression, memory that stays flat."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.testing.worlds import NUMPY

from .mix_case import Broken, Case, gradients


def _cluster(case: Case) -> Any:
    return NUMPY.cluster(grace_ext.grace(case.spec, seed=case.seed), case.size, case.per_node)


def unbiased(case: Case, tally: Counter[str]) -> None:
    """Checks that the mean over `steps` of an unbiased compressor's results is the mean gradient, within six standard deviations of what
    its declared variance, omega, allows."""
    cluster, given = _cluster(case), gradients(case, 0)
    name = case.tensors[0].name
    outs = [NUMPY.step(cluster, given)[name].astype(np.float64) for _ in range(case.steps)]
    compressor, _, communicator = cluster.drivers[0].parts[name]
    omega = compressor.omega(given[0][name].size)
    if omega is None:
        return
    again = 2 if communicator.inner(compressor).name == "reduce_scatter" else 1  # compressed once more
    norms = sum(float(np.linalg.norm(g[name].astype(np.float64))) ** 2 for g in given) / case.size
    variance = ((1 + omega) ** again - 1) * norms / case.steps
    off = float(np.linalg.norm(np.mean(outs, axis=0) - np.mean([g[name].astype(np.float64) for g in given], axis=0)))
    tally["long: unbiased"] += 1
    if off > 6 * variance**0.5 + 1e-5 * norms**0.5:
        text = f"the mean of {case.steps} results is {off:.3g} from the mean gradient; its deviation is at most {variance**0.5:.3g}"
        raise Broken("long: unbiased", text, compressor.name)


def converges(case: Case, tally: Counter[str]) -> None:
    """Checks that a memory that learns the ranks' gradients returns their mean, once it knows them, if they do not change."""
    cluster, given = _cluster(case), gradients(case, 0)
    name = case.tensors[0].name
    for _ in range(case.steps):
        out = NUMPY.step(cluster, given)[name].astype(np.float64)
    compressor, memory, _ = cluster.drivers[0].parts[name]
    d = given[0][name].size
    if memory.name == "diana":
        omega = compressor.omega(d)
        rate = memory.alpha or (None if omega is None else 1 / (1 + omega))
        if omega is not None and rate and rate > 1 / (1 + omega):
            return  # more than is safe
    else:
        rate = compressor.delta(d)
    mean = np.mean([g[name].astype(np.float64) for g in given], axis=0)
    scale = max(float(np.linalg.norm(g[name].astype(np.float64))) for g in given)
    if not rate or (left := (1 - rate) ** (case.steps / 2)) > 1e-4:
        return
    off = float(np.linalg.norm(out - mean))
    tally["long: converges"] += 1
    if off > (100 * left + 1e-4) * scale:
        text = f"after {case.steps} steps of the same gradients the result is {off / scale:.3g} of their norm off their mean"
        raise Broken("long: converges", text, f"{compressor.name} + {memory.name}")


def dense(case: Case, tally: Counter[str]) -> None:
    """Checks that a memory does the same to what is not compressed, however many ranks and nodes there are: as on two ranks that both have
    the mean gradient."""
    cluster, name = _cluster(case), case.tensors[0].name
    reference = NUMPY.cluster(grace_ext.grace(f"none + {cluster.grace.memory} @ allreduce"), 2)
    scale = 0.0
    for step in range(case.steps):
        given = gradients(case, step)
        mean = np.mean([g[name].astype(np.float64) for g in given], axis=0)
        out = NUMPY.step(cluster, given, case.rate(step))[name].astype(np.float64)
        want = NUMPY.step(reference, [{name: mean.astype(np.float32)}] * 2, case.rate(step))[name].astype(np.float64)
        scale = max(scale, *(float(np.abs(x).max(initial=0)) for x in (want, *(g[name] for g in given))))
        off = float(np.abs(out - want).max(initial=0))
        tally["long: dense"] += 1
        if off > 1e-4 * scale:
            text = f"step {step}: {off / scale:.3g} of the largest value off what two ranks with the mean gradient get"
            raise Broken("long: dense", text, cluster.grace.memory.name)


def flat(case: Case, tally: Counter[str]) -> None:
    """Checks that memory does not grow in the second half of the steps, once the cache of positions is full."""
    cluster, held = _cluster(case), []
    given = [gradients(case, step) for step in range(4)]
    tracemalloc.start()
    try:
        with mock.patch.object(sampling, "RECENT_BYTES", 1 << 14):
            for step in range(case.steps):
                NUMPY.step(cluster, given[step % 4], case.rate(step))
                if step + 1 in (case.steps // 2, case.steps):
                    gc.collect()
                    held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    tally["long: memory"] += 1
    if held[1] - held[0] > (64 << 10 if cluster.grace.policy is None else 512 << 10):  # a policy may use what it chooses for the first time
        raise Broken("long: memory", f"{held[1] - held[0]:,} bytes more after {case.steps} steps than after half of them")


CHECKS = {"unbiased": unbiased, "converges": converges, "dense": dense, "memory": flat}
