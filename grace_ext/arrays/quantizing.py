"""Implements the part of the compiled array protocol that quantizers use: 16-bit floats, and the arguments of their kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..parts.fast_ops import FastOps, Sources
from ..parts.field import HALVES
from ..parts.ops import Feedback
from .kernels.sizes import INFINITY
from .numpy import NumpyOps, typed

#: Elements that are processed at a time if several operations use them; a multiple of 8.
STRETCH = 1 << 16
NOTHING = np.zeros(0, np.float32)


def stretches(size: int) -> list[slice]:
    """Splits `size` elements into pieces that stay in the second-level cache while several operations use them."""
    return [slice(start, min(start + STRETCH, size)) for start in range(0, size, STRETCH)]


class QuantizingOps(NumpyOps, FastOps):
    """Adds to NumpyOps what quantizers use, for contiguous float32 on the host; see CompiledOps."""

    def compiles(self, x: np.ndarray) -> bool:
        return x.dtype == np.float32 and x.ndim == 1 and x.flags.c_contiguous

    # --- 16 bits ----------------------------------------------------------------------------------------------------
    def to_bytes(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if dtype not in HALVES or not self.kernels.narrow or not self.compiles(x):
            return super().to_bytes(x, dtype)
        out = np.empty(x.size, np.uint16)
        self.kernels.narrow(x, dtype == "bfloat16", out)
        return out.view(np.uint8)

    def from_bytes(self, data: np.ndarray, dtype: str) -> np.ndarray:
        if dtype not in HALVES or not self.kernels.narrow:
            return super().from_bytes(data, dtype)
        bits = self.halves(data)
        out = self.empty(bits.size)
        self.kernels.widen(out, bits, dtype == "bfloat16")
        return out

    def halves(self, data: np.ndarray) -> np.ndarray:
        """Returns uint16, of bytes that may start anywhere."""
        return typed(data, "uint16")

    # --- what is compressed -----------------------------------------------------------------------------------------
    def sources(self, feedback: Feedback, grad: np.ndarray) -> Sources:
        """Returns the residual, the gradient and their factors; what is compressed; and where kernels leave what was not sent, which is the
        same array, or empty if nobody keeps it."""
        if feedback.residual is None:
            return Sources(grad, grad, np.float32(1), np.float32(1), grad, NOTHING)
        total = self.empty(grad.size)
        return Sources(feedback.residual, grad, np.float32(feedback.beta), np.float32(feedback.gamma), total, total)

    def pieces(self, sources: Sources) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (which, what is compressed, where to leave what was not sent) in pieces that are in the cache, the residual added."""
        residual, grad, beta, gamma, x, left = sources
        for piece in stretches(grad.size):
            if left.size:
                self.kernels.compensate(residual[piece], grad[piece], beta, gamma, left[piece])
            yield piece, x[piece], left[piece]

    def measured(self, sources: Sources) -> float | None:
        """Returns the largest magnitude of what is compressed, the residual added; None if it is not finite."""
        most = max(int(self.kernels.most(x)) for _, x, _ in self.pieces(sources))
        return float(np.uint32(most).view(np.float32)) if most < INFINITY else None
