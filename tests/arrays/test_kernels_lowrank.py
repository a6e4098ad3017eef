"""Kernels of the low-rank compressors match float64, for any rank, for rows of any length, and if results are written over inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import grace_ext
from grace_ext.arrays import kernels
from grace_ext.arrays.kernels.sizes import L1_PIECE, L2_PIECE
from grace_ext.testing.worlds import WORLDS, same_bits, states

TORCH = next(world for world in WORLDS if world.name == "torch-host")
SIZES = [(1, 1), (3, 16), (5, 33), (6, 147), (4, 2 * L1_PIECE + 9), (5, L2_PIECE + 35)]
by_size = pytest.mark.parametrize(("rows", "columns"), SIZES)
by_rank = pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 9])
compiled = pytest.mark.skipif(not kernels.enabled(), reason="GRACE_EXT_KERNELS=0, or no numba")


def normals(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def wide(*matrices: np.ndarray) -> list[np.ndarray]:
    return [matrix.astype(np.float64) for matrix in matrices]


@compiled
@pytest.mark.parametrize("over", ["nothing", "grad"])
@by_size
@by_rank
def test_compensate_product(rows, columns, rank, over):
    residual, grad, q = normals(rows, columns), normals(columns, rows).reshape(rows, columns), normals(rank, columns)
    given, p, factors = grad.reshape(-1).copy(), np.zeros(rows * rank, np.float32), (np.float32(0.5), np.float32(2))
    x = given if over == "grad" else np.full(grad.size, np.nan, np.float32)
    assert kernels.load().compensate_product(residual.reshape(-1), given, *factors, q.reshape(-1), rows, rank, x, p)
    assert same_bits({"x": x}, {"x": (factors[0] * residual + factors[1] * grad).reshape(-1)})
    residual, grad, q = wide(residual, grad, q)
    close(p, (0.5 * residual + 2 * grad) @ q.T)


@compiled
@pytest.mark.parametrize("where", [0, 15, 16, 146, 147, 3 * 147 - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compensate_product_tells_what_is_not_finite(value, where):
    residual, grad, q = np.zeros(3 * 147, np.float32), np.ones(3 * 147, np.float32), np.zeros(2 * 147, np.float32)
    grad[where] = value
    x, p, one = np.empty_like(grad), np.zeros(6, np.float32), np.float32(1)
    assert not kernels.load().compensate_product(residual, grad, one, one, q, 3, 2, x, p)


@compiled
@by_size
@by_rank
def test_project(rows, columns, rank):
    x, p, q = normals(rows, columns), normals(rows, rank), np.zeros(rank * columns, np.float32)
    kernels.load().project(x.reshape(-1), p.reshape(-1), rows, rank, q)
    x, p = wide(x, p)
    close(q, p.T @ x)


@compiled
@pytest.mark.parametrize("over", ["nothing", "unsent", "out"])
@by_size
@by_rank
def test_products(rows, columns, rank, over):
    x, a, b, sent = normals(rows, columns), normals(rows, rank), normals(rank, columns), normals(rank, columns)[::-1]
    given = x.reshape(-1).copy()
    unsent, out = (given if over == name else np.full(x.size, np.nan, np.float32) for name in ("unsent", "out"))
    flat = (np.ascontiguousarray(factor).reshape(-1) for factor in (a, b, sent))
    kernels.load().products(given, *flat, rows, rank, unsent, out)
    x, a, b, sent = wide(x, a, b, sent)
    close(unsent, x - a @ sent)
    close(out, a @ b)


def test_what_overflows_is_kept_although_the_gradient_is_written_over():
    """If P of finite gradients overflows, nothing is sent, and the residual holds the whole gradient in its own memory."""
    for in_place in (False, True):
        cluster = TORCH.cluster(grace_ext.grace("powersgd(rank=2) + residual"), 2)
        for driver in cluster.drivers:
            driver._in_place = in_place
        given = [{"w": torch.full((20, 300), 1e38)} for _ in range(2)]
        out = cluster.step(given)
        assert (out["w"] == 0).all()
        given[0]["w"].fill_(5)
        assert all((kept["residual/w"] == np.float32(1e38)).all() for kept in states(cluster, TORCH))
