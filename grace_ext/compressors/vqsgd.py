from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts import rng
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor
from .forms.scales import floats_from_bytes, floats_to_bytes


@register("vqsgd")
@dataclass(frozen=True)
class VQSGD(Compressor):
    """Sends a few random corners of a cross-polytope around the gradient, drawn so that their mean is unbiased (vector quantization).

    x = sum_v w_v v over the 2d corners v = +-N e_j, with N = sqrt(d) ||x||_2 (hull='l2', the paper: the polytope contains the whole
    ball) or ||x||_1 (hull='l1': the smallest that contains x). Corner sign(x_j) N e_j has weight |x_j| / N, and all corners share the rest
    of 1 equally. `repeats` = R corners are drawn independently with these weights, and averaged.
    x: float[d] -> N as float32, and R codes of ceil(log2(2d)) bits, 2 j + [negative]: R ceil(log2(2d)) / 8 + 4 bytes.
    Unbiased, E||C(x)||^2 = ||x||^2 + (N^2 - ||x||^2) / R, omega = (d - 1) / R: enormous for few repeats, so use an R near d, or a low
    learning rate. It is meant for messages of a few bytes, and for private ones ('l2'). A zero tensor decodes to zeros. Weights are
    rounded to about 2^-53 of their sum, N saturates at 3.4e38. Draws are private to each rank. With error feedback the residual may
    grow without bound: use no memory.
    Source: Gandikota et al. 2021 (vqSGD).
    """

    unbiased: ClassVar[bool] = True
    repeats: int = knob(100, "corners drawn; the variance falls as 1 / repeats", low=1, high=2**24, headline=True)
    hull: str = knob("l2", "size of the polytope: l2 contains the ball of radius ||x||, l1 only just x", choices=("l2", "l1"))

    def omega(self, d):
        return (d - 1) / self.repeats

    def fields(self, spec):
        return Field("norm", "float32", 1), Field("corners", "uint8", (self.repeats * _width(spec) + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        d, largest = spec.size, ops.largest(x)
        if not largest:
            corners = ops.arange(self.repeats) * 0
            return (floats_to_bytes(ops, np.zeros(1)), ops.pack(corners, _width(spec))), state
        # The weights are integers, so that their running sums are exact in every library.
        one = 2.0 ** (61 - d.bit_length())
        weights = ops.as_int(ops.floor(abs(ops.cast(x, "float64")) / largest * one))
        running = ops.cumsum(weights)
        mass = int(running[-1])
        norm = ops.norm(x) * d**0.5 if self.hull == "l2" else float(ops.block_norms(x, d, 1)[0])
        whole = max(mass, int(norm / largest * one)) if self.hull == "l2" else mass
        draws, evenly = _uniform(info.private_key(spec.name, "vqsgd"), self.repeats)
        drawn = np.minimum((draws * whole).astype(np.int64), whole - 1)
        places = ops.rank_among(running, ops.upload(np.minimum(drawn, mass - 1)))
        corners = 2 * places + ops.as_int(x[places] < 0)
        evenly = ops.upload(np.minimum((evenly * (2 * d)).astype(np.int64), 2 * d - 1))
        corners = ops.where(ops.upload(drawn < mass), corners, evenly)
        return (floats_to_bytes(ops, np.array([norm])), ops.pack(corners, _width(spec))), state

    def _decode(self, ops, payload, spec):
        """Returns (distinct positions, their float32 values); computed on the host, as they are few. Raises PayloadError."""
        norm = float(floats_from_bytes(ops, payload[0], "norm")[0])
        corners = ops.host(ops.unpack(payload[1], _width(spec), self.repeats))
        if int(corners.max()) >= 2 * spec.size:
            raise PayloadError(f"has corner {int(corners.max())} of {2 * spec.size}, which are numbered from 0")
        positions, places = np.unique(corners // 2, return_inverse=True)
        counts = np.bincount(places.reshape(-1), weights=1 - 2 * (corners % 2))
        return ops.upload(positions), ops.upload((counts / self.repeats * norm).astype(np.float32))

    def decompress(self, ops, payload, spec, info):
        total = ops.zeros(spec.size)
        self.accumulate(ops, total, payload, spec, info)
        return total

    def accumulate(self, ops, total, payload, spec, info):
        positions, values = self._decode(ops, payload, spec)
        total[positions] += values


def _width(spec) -> int:
    return (2 * spec.size - 1).bit_length()


def _uniform(key, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two arrays of float64[count] in [0, 1), multiples of 2^-53."""
    high, low = rng.words(key, 4 * count).astype(np.int64).reshape(2, -1, 2).transpose(2, 0, 1)
    return tuple(((high >> 5) * 2.0**26 + (low >> 6)) / 2.0**53)
