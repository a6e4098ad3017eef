"""The Gaussian mechanism, for the gradients of one rank, over the array protocol: written once for every library.

A unit's contribution is restricted to the support, then clipped, then contributions are added up, then noise is added. That order is the
proof: the sum changes by at most `clip` if a unit is left out, whatever its gradient is (NaN counts as 0), and the noise is in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.sampling import sample
from ..errors import GraceError, few
from ..parts.ops import Array, Ops
from ..parts.tensor import StepInfo, TensorSpec
from .noise import Noise
from .settings import Privacy


class Mechanism:
    """Makes the gradients of one rank private. releases: how often it has, which epsilon counts."""

    def __init__(self, privacy: Privacy, ops: Ops):
        self.privacy, self.ops, self.releases = privacy, ops, 0
        self._noise = Noise()

    def positions(self, spec: TensorSpec, info: StepInfo) -> np.ndarray | None:
        """Returns the positions that are kept at this step, the same on all ranks; None for all of them."""
        if self.privacy.support == 1 or not spec.size:
            return None
        return sample(info.shared_key(spec.name, "support"), spec.size, max(1, round(self.privacy.support * spec.size)))

    def deviation(self, info: StepInfo) -> float:
        """Returns the standard deviation of the noise that this rank adds."""
        each = 1 / math.sqrt(info.size) if self.privacy.trust == "sum" else 1.0
        return self.privacy.noise_multiplier * self.privacy.clip * each

    def release(self, gradients: Mapping[str, Any], specs: Mapping[str, TensorSpec], info: StepInfo) -> dict[str, Any]:
        """Returns private gradients of all parameters, in new memory, with the shapes and dtypes of `specs`.

        gradients: those that there are; a parameter without one counts as 0. For unit 'rank' they are the rank's own; for unit 'example'
          each has one dimension more than its parameter, in front, which counts the examples. Raises GraceError if they are of different
          numbers of examples."""
        self.releases += 1
        kept = {name: self._kept(gradients[name], spec, info) for name, spec in specs.items() if name in gradients}
        sums = self._clipped(kept) if self.privacy.unit == "rank" else self._sum_of_clipped(kept)
        divisor = self.privacy.batch or 1.0
        return {name: self._noised(sums.get(name), spec, info, divisor) for name, spec in specs.items()}

    def _kept(self, gradient: Any, spec: TensorSpec, info: StepInfo) -> Array:
        """Returns the elements of the gradient that are in the support: a vector, or for unit 'example' a matrix of one row per example."""
        flat, positions = self.ops.ingest(gradient), self.positions(spec, info)
        if self.privacy.unit == "example":
            flat = flat.reshape(len(gradient), spec.size)
        return flat if positions is None else flat[..., self.ops.upload(positions)]

    def _clipped(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Returns the arrays as one vector of norm `clip` at most; none of them if it is not finite."""
        norm = math.hypot(*(self.ops.norm(array) for array in arrays.values()))
        if not math.isfinite(norm):
            return {}
        factor = min(1.0, self.privacy.clip / norm) if norm else 1.0
        return {name: array * factor for name, array in arrays.items()}

    def _sum_of_clipped(self, rows: dict[str, Array]) -> dict[str, Array]:
        """Returns the sums over the examples, each of which, as one vector, is clipped. One that is not finite counts as 0."""
        rows = {name: matrix for name, matrix in rows.items() if matrix.shape[1]}
        counts = {len(matrix) for matrix in rows.values()}
        if len(counts) > 1:
            raise GraceError(f"the parameters have per-example gradients of different numbers of examples ({few(map(str, counts))})")
        if not any(counts):
            return {}
        norms = np.sqrt(sum(self.ops.host(self.ops.block_norms(matrix.reshape(-1), matrix.shape[1], 2)) ** 2 for matrix in rows.values()))
        finite = np.flatnonzero(np.isfinite(norms))
        if len(finite) < len(norms):
            rows = {name: matrix[self.ops.upload(finite)] for name, matrix in rows.items()}
        if not len(finite):
            return {}
        factors = self.ops.upload((self.privacy.clip / np.maximum(norms[finite], self.privacy.clip))[:, None])
        sums = {}
        for name, matrix in rows.items():
            weights = self.ops.cast(factors, "float64" if matrix.itemsize == 8 else "float32")
            sums[name] = self.ops.project(weights, matrix.reshape(-1)).reshape(-1)
        return sums

    def _noised(self, kept: Array | None, spec: TensorSpec, info: StepInfo, divisor: float) -> Any:
        """Returns a private gradient. kept: what is clipped, in the support; None if there is nothing but noise."""
        positions = self.positions(spec, info)
        count = spec.size if positions is None else len(positions)
        dtype = "float64" if spec.dtype == "float64" else "float32"
        noise = self._noise.normals(count) * self.deviation(info)
        total = self.ops.cast(self.ops.upload(noise), dtype)
        if kept is not None:
            total = total + kept
        if divisor != 1:
            total = total / divisor
        if positions is not None:
            whole = self.ops.zeros(spec.size, dtype)
            whole[self.ops.upload(positions)] = total
            total = whole
        return self.ops.emit(total, spec)
