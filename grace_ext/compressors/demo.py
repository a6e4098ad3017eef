from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor, Observed, sent_by
from .forms.positions import decode_indices, encode_indices
from .forms.sparse import VALUES, index_field, index_knob

PI = Decimal("3.14159265358979323846264338327950288")


@lru_cache(maxsize=64)
def tile(n: int, chunk: int) -> int:
    """Returns the side of the tiles along a dimension of n: the largest divisor of n up to `chunk`. If that is under half of `chunk` (for
    example for a prime), the side that the fewest tiles need; the last one is padded with zeros."""
    if n <= chunk:
        return n
    divisor = max(h for h in range(1, chunk + 1) if n % h == 0)
    return divisor if 2 * divisor >= chunk else -(-n // -(-n // chunk))


def _cosine(m: int, n: int) -> float:
    """Returns cos(pi m / 2n), 0 <= m <= n, by its series in decimal arithmetic: the functions of C libraries differ in the last bit."""
    if m == n:
        return 0.0
    with localcontext(Context(prec=30)):
        square, k = (PI * m / (2 * n)) ** 2, 0
        total = term = Decimal(1)
        while abs(term) > Decimal("1e-28"):
            k += 2
            term = -term * square / (k * (k - 1))
            total += term
        return float(total)


@lru_cache(maxsize=64)
def cosines(n: int) -> np.ndarray:
    """Returns the orthonormal DCT-II, float64[n, n]; row i holds the i-th cosine."""
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    quarter = [_cosine(m, n) for m in range(n + 1)]  # cos(pi m / 2n)
    around = np.array([*quarter, *(-value for value in quarter[-2::-1])])  # m = 0 .. 2n
    turn = (2 * j + 1) * i % (4 * n)
    matrix = np.sqrt(2 / n) * around[np.minimum(turn, 4 * n - turn)]
    matrix[0] /= np.sqrt(2)
    matrix.flags.writeable = False  # the cache shares it among all callers
    return matrix


@register("demo")
@dataclass(frozen=True)
class DeMo(Compressor):
    """Sends the largest coefficients of each tile's cosine transform; each is averaged over the ranks that sent it.

    The gradient is a matrix (first dimension x the rest; 1-D: one row), cut into tiles of h x w; T is the orthonormal DCT-II of a tile.
        C(x) = T^-1 of the k = min(topk, h w) largest |T x| of each tile (ties to the lowest), rounded to `values`
        result = T^-1 y,  y_c = mean of the values sent for coefficient c, over the ranks that sent it; sign(T^-1 y) with sign=True
    h (and w) is the largest divisor of the dimension up to `chunk`; if that is under chunk / 2, the dimension is cut into as few tiles
    as `chunk` allows, padded with zeros: a prime of 1009 becomes 16 tiles of 64, not 1009 of 1.
    x: float[d] -> k values per tile (16 bits), and their positions among all coefficients, coded. Fixed size.
    Wire: 1000 x 1000 elements are 400 tiles of 50 x 50, which send 32 values each, of 16 bits and 8.3 bits of position: 0.31 bits per
    element (0.36 with the 12-bit positions of the authors). A bias of 1000 sends 32 of every 50, which saves little.
    A projection of each rank's own gradient: with values='fp32', contraction delta = k / (h w). Biased: pair with 'residual'. With
    beta=0.999 that is exactly DeMo's decayed momentum (m <- beta m + g - what was sent); turn off the optimizer's own momentum then.
    A coefficient is divided by the number of its senders, not of all ranks, so the result is NOT the mean; with op=Sum it is n times as
    large. sign=True is the paper's update: in {-1, 0, 1}, whatever the op is; set the learning rate as for sign methods.
    A higher `topk` sends more; a larger `chunk` compresses more and costs more arithmetic. The transform is computed in float64.
    Source: Peng, Quesnelle, Kingma 2024 (decoupled momentum), whose code takes 1-D and 2-D tensors only. 'bf16' is the default for its
    range: float16 loses coefficients below 6e-8.
    """

    wants_memory: ClassVar[bool] = True
    grows: ClassVar[bool] = False  # the tiles of a prime number of elements are others
    deterministic_bytes: ClassVar[bool] = False  # matrix products round differently from library to library
    chunk: int = knob(64, "longest side of a tile", low=1, high=1024)
    topk: int = knob(32, "coefficients sent per tile", low=1, high=2**20, headline=True)
    values: str = knob("bf16", "precision of the coefficients on the wire", choices=tuple(VALUES))
    sign: bool = knob(False, "the result is the sign of the averaged gradient, as in the paper")
    index: str = index_knob()

    @property
    def result(self) -> str:  # type: ignore[override]
        return "signs" if self.sign else "mean"

    @property
    def averages(self) -> bool:
        return False

    def _tiles(self, spec) -> tuple[int, int, int, int]:
        """Returns (tiles down, h, tiles across, w)."""
        a = spec.shape[0] if len(spec.shape) > 1 else 1
        b = spec.size // a
        h, w = tile(a, self.chunk), tile(b, self.chunk)
        return -(-a // h), h, -(-b // w), w

    def _counts(self, spec) -> tuple[int, int, int]:
        """Returns (elements per tile, coefficients that are sent, all coefficients)."""
        down, h, across, w = self._tiles(spec)
        return h * w, down * across * min(self.topk, h * w), down * across * h * w

    def delta(self, d):
        return min(1.0, self.topk / min(d, self.chunk**2)) if self.values == "fp32" else None

    def fields(self, spec):
        _, kept, of = self._counts(spec)
        return Field("values", VALUES[self.values], kept), index_field(kept, of, self.index, exactly=True)

    def _transform(self, ops, x, spec):
        """Returns the coefficients of all tiles, tile by tile, as float64."""
        down, h, across, w = self._tiles(spec)
        a = spec.shape[0] if len(spec.shape) > 1 else 1
        padded = ops.zeros(down * h * across * w, "float64").reshape(down * h, across * w)
        padded[:a, : spec.size // a] = ops.cast(x, "float64").reshape(a, -1)
        tiles = ops.transpose(padded.reshape(down, h, across, w), (0, 2, 1, 3))
        return (ops.upload(cosines(h)) @ tiles @ ops.upload(cosines(w)).T).reshape(-1)

    def _restore(self, ops, coefficients, spec):
        """Returns float32[d], the inverse transform of coefficients in float64; the same bits on every rank."""
        down, h, across, w = self._tiles(spec)
        a = spec.shape[0] if len(spec.shape) > 1 else 1
        wide = ops.product(coefficients.reshape(-1, w), ops.upload(cosines(w))).reshape(down, across, h, w)
        turned = ops.transpose(wide, (0, 1, 3, 2)).reshape(-1, h)
        tiles = ops.product(turned, ops.upload(cosines(h))).reshape(down, across, w, h)
        padded = ops.transpose(tiles, (0, 3, 1, 2)).reshape(down * h, across * w)
        return _float32(ops, padded[:a, : spec.size // a].reshape(-1))

    def compress(self, ops, x, spec, info, state):
        each, _, of = self._counts(spec)
        coefficients = _float32(ops, self._transform(ops, x, spec))
        positions = ops.top_k_each(coefficients, each, min(self.topk, each))
        return (ops.to_bytes(coefficients[positions], VALUES[self.values]), encode_indices(ops, positions, of, self.index)), state

    def _sent(self, ops, payload, spec):
        """Returns (positions among the coefficients, their values as float64). Raises PayloadError."""
        _, kept, of = self._counts(spec)
        values = ops.from_bytes(payload[0], VALUES[self.values])
        if not ops.all_finite(values):
            raise PayloadError("has a coefficient that is not finite")
        return decode_indices(ops, payload[1], kept, of, self.index), ops.cast(values, "float64")

    def decompress(self, ops, payload, spec, info):
        coefficients = ops.zeros(self._counts(spec)[2], "float64")
        positions, values = self._sent(ops, payload, spec)
        coefficients[positions] = values
        return self._restore(ops, coefficients, spec)

    def observed(self, ops, payload, spec, info, state):
        positions, values = self._sent(ops, payload, spec)
        return Observed(values, lambda x: self._transform(ops, x, spec)[positions])

    def combine(self, ops, payloads, spec, info, out=None):
        total = ops.zeros(self._counts(spec)[2], "float64")
        senders = ops.zeros(len(total), "float64")
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                positions, values = self._sent(ops, payload, spec)
            total[positions] += values
            senders[positions] += 1
        mean = self._restore(ops, total / ops.where(senders > 0, senders, 1.0), spec)
        return ops.sign(mean) if self.sign else mean * (info.size / info.divisor)


def _float32(ops, x):
    """Rounds to float32; values that are too large saturate."""
    return ops.from_bytes(ops.to_bytes(x, "float32"), "float32")
