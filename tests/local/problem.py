"""Defines least squares on data that differ by rank, and reference implementations of local-update algorithms in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grace_ext.local import LocalSGDCluster

SHAPES = {"w": (9, 7), "b": (5,)}
LR = 0.125
Model = dict[str, np.ndarray]


def initial(dtype: Any = np.float64) -> Model:
    generator = np.random.default_rng(5)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradient(model: Model, rank: int, step: int) -> Model:
    """Returns the gradient, with noise, of a quadratic whose minimum is different on every rank."""
    generator = np.random.default_rng([rank, step])
    target = np.random.default_rng([7, rank])
    return {
        name: (0.5 + 0.1 * rank) * (x - target.standard_normal(x.shape)) + 0.1 * generator.standard_normal(x.shape)
        for name, x in model.items()
    }


def in_cluster(
    spec: str, size: int, steps: int, *, dtype: Any = np.float64, momentum: float = 0.0, who: Callable[[int], Sequence[int]] | None = None,
    lr: Callable[[int], float] = lambda step: LR, sync: bool = False, make: Any = LocalSGDCluster, **options: Any,
) -> tuple[list[Model], LocalSGDCluster]:  # fmt: skip
    """Trains by SGD (with local momentum). Returns every rank's model, and the cluster. who(tick): the ranks that step, if asynchronous."""
    cluster = make(spec, size, **options)
    models: list[Any] = [initial(dtype) for _ in range(size)]
    velocity: list[Any] = [{name: 0.0 for name in SHAPES} for _ in range(size)]
    made = [0] * size
    cluster.start(models)
    for tick in range(steps):
        ranks = list(range(size)) if who is None else list(who(tick))
        own = [{n: g.astype(dtype) for n, g in gradient(model, rank, made[rank]).items()} for rank, model in enumerate(models)]
        given = cluster.gradients(own, lr=lr(tick))
        for rank in ranks:
            velocity[rank] = {n: momentum * velocity[rank][n] + np.asarray(given[rank][n]) for n in SHAPES}
            models[rank] = {n: (x - lr(tick) * velocity[rank][n]).astype(dtype) for n, x in models[rank].items()}
            made[rank] += 1
        models = [{n: np.asarray(x) for n, x in model.items()} for model in cluster.tick(models, ranks)]
    if sync:
        models = [{n: np.asarray(x) for n, x in model.items()} for model in cluster.sync(models)]
    return models, cluster


def largest(x: np.ndarray, ratio: float) -> np.ndarray:
    """Returns x with all but its ceil(ratio d) largest elements set to zero."""
    flat = x.reshape(-1)
    keep = np.argsort(-np.abs(flat), kind="stable")[: int(np.ceil(ratio * flat.size))]
    out = np.zeros_like(flat)
    out[keep] = flat[keep]
    return out.reshape(x.shape)


def whole(x: np.ndarray) -> np.ndarray:
    return x


def qsparse(
    size: int, steps: int, due: Callable[[int], bool], compress: Callable[[np.ndarray], np.ndarray] = whole, momentum: float = 0.0,
    outer: tuple[float, float] = (1.0, 0.0),
) -> list[Model]:  # fmt: skip
    """Runs synchronous Qsparse-local-SGD (algorithm 1 of Basu et al.), with torch's Nesterov momentum on the mean. `due` counts from 1."""
    x = initial()
    y = [initial() for _ in range(size)]
    m = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(size)]
    v = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(size)]
    u = {n: np.zeros(s) for n, s in SHAPES.items()}
    for t in range(steps):
        for i in range(size):
            g = gradient(y[i], i, t)
            v[i] = {n: momentum * v[i][n] + g[n] for n in SHAPES}
            y[i] = {n: y[i][n] - LR * v[i][n] for n in SHAPES}
        if not due(t + 1):
            continue
        for n in SHAPES:
            total = np.zeros(SHAPES[n])
            for i in range(size):
                a = m[i][n] + x[n] - y[i][n]
                c = compress(a)
                m[i][n] = a - c
                total += c
            u[n] = outer[1] * u[n] + total / size
            x[n] = x[n] - outer[0] * (total / size + outer[1] * u[n])
            for i in range(size):
                y[i][n] = x[n].copy()
    return y


def asynchronous(size: int, ticks: int, who: Callable[[int], Sequence[int]], every: Sequence[int], compress=whole) -> list[Model]:
    """Runs asynchronous Qsparse-local-SGD (algorithm 2): a master's model, and the copy that each worker got last. Returns the models."""
    master = initial()
    x = [initial() for _ in range(size)]
    y = [initial() for _ in range(size)]
    m = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(size)]
    made = [0] * size
    for tick in range(ticks):
        reports = []
        for i in who(tick):
            g = gradient(y[i], i, made[i])
            y[i] = {n: y[i][n] - LR * g[n] for n in SHAPES}
            made[i] += 1
            if made[i] % every[i] == 0:
                reports.append(i)
        for i in reports:
            for n in SHAPES:
                a = m[i][n] + x[i][n] - y[i][n]
                c = compress(a)
                m[i][n] = a - c
                master[n] = master[n] - c / size
        for i in reports:
            x[i] = {n: w.copy() for n, w in master.items()}
            y[i] = {n: w.copy() for n, w in master.items()}
    return y
