"""Computes L-GreCo's error tables: what compression loses of a gradient, ||x - C(x)||_2, for several values of a knob at once, and what
that costs Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..compressors.forms.sparse import kept
from ..parts import rng
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..composition.composition import Composition
    from ..parts.ops import Array, Ops

#: How many iterations estimate the leading singular subspace, and how many columns it has beyond the highest rank.
ITERATIONS, BEYOND = 5, 4
#: Compressors that send the largest magnitudes, exactly or nearly so.
BY_MAGNITUDE = ("topk", "dgc", "sidco", "global_topk")


def losses(ops: Ops, x: Array, spec: TensorSpec, choices: list[Composition], knob: str) -> list[float]:
    """Returns the norm of each choice's error on x, float[d] and finite. 0 if the tensor is sent dense.

    For the ratio of a compressor that sends the largest magnitudes: the norm of the others. For a rank: from the remaining singular values,
    by `ITERATIONS` subspace iterations (exact if the matrix has few rows or columns). For anything else: by compressing x."""
    sent_dense = [choice.parts_for(spec)[0].name == "none" for choice in choices]
    if all(sent_dense):
        return [0.0] * len(choices)
    compressors: list[Any] = [choice.compressor for choice in choices]
    if knob == "ratio" and compressors[0].name in BY_MAGNITUDE:
        found = _beyond_the_largest(ops.host(x), [kept(each.ratio, spec.size) for each in compressors])
    elif knob == "rank" and not compressors[0].unbiased:  # atomo samples, and loses more than what is beyond the rank
        found = _beyond_the_rank(ops.host(x).reshape(spec.shape[0], -1), [each.rank for each in compressors], spec.name)
    else:
        found = [_by_compressing(ops, x, spec, choice) for choice in choices]
    return [0.0 if dense else float(loss) for dense, loss in zip(sent_dense, found, strict=True)]


def of_adam(lost: list[float], x: np.ndarray, *, unbiased: bool = False) -> list[float]:
    """Returns sqrt(d) (||x|| - <x, C(x)> / ||C(x)||) for each of `lost` = ||x - C(x)||, x: float[d]: how much less an Adam step descends. A
    step is about lr sqrt(d) long, however long the gradient is, so along C(x) the loss falls by lr sqrt(d) <x, C(x)> / ||C(x)||.

    Top-k and low rank are projections: <x, C(x)> = ||C(x)||^2 = ||x||^2 - ||x - C(x)||^2. `unbiased` compressors add noise, which in the
    mean is orthogonal to x: <x, C(x)> = ||x||^2 and ||C(x)||^2 = ||x||^2 + ||x - C(x)||^2."""
    norm, root = float(np.linalg.norm(x.astype(np.float64))), float(np.sqrt(len(x)))
    if unbiased:
        # n - n^2 / c with c = sqrt(n^2 + e^2), as n e^2 / (c (c + n)): small losses are not rounded away.
        sent = [float(np.hypot(norm, e)) for e in lost]
        return [root * norm * (e / c) * (e / (c + norm)) if e else 0.0 for e, c in zip(lost, sent, strict=True)]
    # a - b as (a^2 - b^2) / (a + b): small losses are not rounded away, and a loss above ||x|| still gives a larger result.
    return [root * e**2 / (norm + np.sqrt(max(0.0, norm**2 - e**2))) if e else 0.0 for e in lost]


def _beyond_the_largest(x: np.ndarray, counts: list[int]) -> list[float]:
    """Returns, for each k, the norm of x without its k largest magnitudes."""
    squares = np.sort(np.abs(x)).astype(np.float64) ** 2
    below = np.concatenate([[0.0], np.cumsum(squares)])
    return [float(np.sqrt(below[len(x) - min(k, len(x))])) for k in counts]


def _beyond_the_rank(matrix: np.ndarray, ranks: list[int], name: str) -> list[float]:
    """Returns, for each r, sqrt(sum of the squared singular values after the first r). An estimated subspace is never better than the best
    one, so these are upper bounds."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    scale = float(np.abs(matrix).max(initial=0)) or 1.0
    matrix = matrix / np.float32(scale)  # so that squares stay in the range of float32
    rows, columns = matrix.shape
    width = min(rows, max(ranks) + BEYOND)
    total = float(np.sum(matrix.astype(np.float64) ** 2))
    start = rng.normals(StepInfo(0, 0, 1, 1).shared_key(name, "lgreco"), rows * width).reshape(rows, width)
    basis = np.eye(rows, dtype=np.float32) if width == rows else np.linalg.qr(start)[0].astype(np.float32)
    for _ in range(ITERATIONS if width < rows else 0):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    small = (matrix.T @ basis).astype(np.float64)
    values = np.linalg.eigvalsh(small.T @ small)[::-1].clip(0)  # squared singular values of the matrix within the subspace
    taken = np.concatenate([[0.0], np.cumsum(values)])
    return [scale * float(np.sqrt(max(0.0, total - taken[min(r, width)]))) if r < rows else 0.0 for r in ranks]


def _by_compressing(ops: Ops, x: Array, spec: TensorSpec, choice: Composition) -> float:
    """Returns the norm of the error by compressing x, as at the first step of world size 1."""
    info = StepInfo(0, 0, 1, 1)
    compressor: Any = choice.compressor
    payload, _ = compressor.compress(ops, x, spec, info, compressor.init(ops, spec, info))
    return float(ops.block_norms(x - compressor.decompress(ops, payload, spec, info), spec.size, 2)[0])
