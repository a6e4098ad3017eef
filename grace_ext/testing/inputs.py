"""Makes gradients for tests: many shapes at once, on a grid where float32 sums are exact, and adversarial values."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "seven": (7,),
    "vector": (1000,),
    "matrix": (33, 17),
    "kernel": (4, 3, 5, 5),
    "strided": (24, 30),  # not contiguous: a transposed view of every second column
}


def normal(rank: int, step: int, dtype: str = "float32", shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    """Returns Gaussian gradients, the same at every call."""
    made = {}
    for place, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng([rank, step, place])
        if name == "strided":
            made[name] = rng.standard_normal((shape[1], 2 * shape[0])).astype(DTYPES[dtype])[:, ::2].T
            assert made[name].shape == shape and not made[name].flags.c_contiguous
        else:
            made[name] = np.asarray(rng.standard_normal(shape), DTYPES[dtype])
    return made


def ranks(size: int, step: int, dtype: str = "float32", shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[dict[str, np.ndarray]]:
    return [normal(rank, step, dtype, shapes) for rank in range(size)]


def grid(size: int, step: int, shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Returns non-zero multiples of 1/64, by rank: sums of many of them, and residuals, are exact in float32."""
    made = []
    for rank in range(size):
        rng = np.random.default_rng([seed, rank, step])
        made.append((rng.integers(1, 512, shape) * rng.choice([-1, 1], shape) / 64).astype(np.float32))
    return made


def adversarial(d: int) -> dict[str, np.ndarray]:
    """Returns finite float32[d] that break careless code, by a name for their kind."""
    rng = np.random.default_rng(d)
    spike = np.zeros(d, np.float32)
    spike[d // 2] = -1.0
    return {
        "zeros": np.zeros(d, np.float32),
        "negative zeros": np.full(d, -0.0, np.float32),
        "ties": np.full(d, -0.75, np.float32),
        "spike": spike,
        "negative": -np.abs(rng.standard_normal(d)).astype(np.float32) - 1,
        "tiny": (rng.standard_normal(d) * 1e-38).astype(np.float32),
        "subnormal": np.full(d, 1.4e-45, np.float32),
        "huge": (rng.choice([-1, 1], d) * 3e38).astype(np.float32),
        "largest": np.full(d, np.finfo(np.float32).max, np.float32),
        "one huge": np.where(np.arange(d) == d - 1, np.float32(3e38), np.float32(1e-3)),
        "wide range": (rng.standard_normal(d) * 10.0 ** rng.uniform(-44, 37, d)).astype(np.float32),
    }
