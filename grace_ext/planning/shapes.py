"""Describes the shapes of a model's gradients, and makes gradients of these shapes to time codecs on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..parts.tensor import TensorSpec

#: The dims of a float32 tensor, or a TensorSpec, by name.
Shapes = Mapping[str, tuple[int, ...] | TensorSpec]


def specs_of(shapes: Shapes) -> list[TensorSpec]:
    return [dims if isinstance(dims, TensorSpec) else TensorSpec(name, tuple(dims)) for name, dims in shapes.items()]


def gradients(shapes: Shapes, rank: int) -> dict[str, np.ndarray]:
    """Returns Gaussian float32 gradients. Each tensor has a scale of its own (log-normal, as layers differ by an order of magnitude)."""
    generator = np.random.default_rng(rank)
    scales = 1e-3 * np.exp(0.7 * np.random.default_rng(50).standard_normal(len(shapes)))
    return {
        spec.name: np.asarray(np.float32(scale) * generator.standard_normal(spec.shape, np.float32))
        for spec, scale in zip(specs_of(shapes), scales, strict=True)
    }
