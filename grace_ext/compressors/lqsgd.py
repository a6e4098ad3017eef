from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts.field import FLOAT32_MAX, Field
from ..parts.part import knob
from . import register
from .base import Exchanged
from .forms.lowrank import _LowRank, kept_subspace, orthonormalize


@lru_cache(maxsize=16)
def values(alpha: float, levels: int) -> np.ndarray:
    """Returns float64[2 levels + 1]: what the codes decode to, for a scale of 1. Computed in decimal arithmetic, because the functions of C
    libraries differ in the last bit, and all ranks must decode alike."""
    with localcontext(Context(prec=30)):
        growth = (1 + Decimal(alpha)).ln() / levels
        above = [float(((growth * level).exp() - 1) / Decimal(alpha)) for level in range(1, levels + 1)]
    table = np.array([*(-value for value in reversed(above)), 0.0, *above])
    table.flags.writeable = False  # the cache shares it among all callers
    return table


@register("lqsgd")
@dataclass(frozen=True)
class LQSGD(_LowRank):
    """Sends a low-rank approximation whose factors are quantized on a logarithmic scale.

    The steps are those of powersgd, with M_i: float[a, b], Q: float[b, r], r = min(rank, a, b), and D = decode(encode(.)) for each factor:
        P = orthonormalize(mean_i D(M_i Q));  Q_i = D(M_i^T P);  Q = mean_i(Q_i);  result P Q^T; the next step starts from Q.
    The code q of x, in a factor with largest magnitude s, is the nearest of L = 2**(bits-1) - 1 levels per sign to
        sign(x) ln(1 + alpha |x| / s) / ln(1 + alpha);   decoded: s sign(q) ((1 + alpha)**|q| - 1) / alpha.
    Codes of different ranks cannot be added. Either every rank gets all of them (allgather, broadcast: from about 8 ranks on more bytes
    than powersgd's); or one rank adds up a factor, or a shard of it, and codes the mean once more for all (reduce_scatter: fewer bytes
    at any number of ranks). Then the error of coding the mean of Q is not fed back; that of P only turns the subspace.
    Wire: bits r (a + b) + 64 bits (8-bit codes, 1000 x 1000, rank 1: 0.016 bits per element), in whole bytes per factor. 0-d and 1-D
    tensors, and matrices for which that is not less, are sent dense.
    The memory subtracts P Q_i^T with this rank's own decoded Q_i, so that it keeps the quantization error, too. P is the same on all ranks
    and orthonormal, because it is coded before it is averaged. (Other forms code P afterwards: then it is no longer orthonormal.)
    Neither unbiased nor a contraction; pair with 'residual' or 'powersgd'. More bits reduce the error, and so does, for values of
    similar size, an alpha nearer to 0 (even spacing); a larger alpha spends its codes on small values. Zero factors, and values that
    overflow, decode to zeros.
    Source: Li et al. 2025 (LQ-SGD); the normalization by the factor's maximum, and the defaults, are ours.
    """

    shared_state: ClassVar[tuple[str, ...]] = ("lqsgd_q",)
    rounds: ClassVar[tuple[str, ...]] = ("allgather", "broadcast", "reduce_scatter")
    rank: int = knob(1, "rank of the approximation: columns of P and Q", low=1, high=4096, headline=True)
    bits: int = knob(8, "bits per code, sign included", low=2, high=16)
    alpha: float = knob(10.0, "curvature of the logarithmic scale", above=0, high=1e6)

    @property
    def caution(self):
        if self.bits >= 4:
            return None
        return (
            f"codes each factor with {self.levels} level{'s' if self.levels > 1 else ''} per sign, and the residual feeds back an error as "
            "large as what is sent: training diverges, or stalls at two to three times the loss. Use bits=4 or more (and a lower rank, if "
            "bytes matter)"
        )

    @property
    def levels(self) -> int:
        """The number of levels per sign."""
        return 2 ** (self.bits - 1) - 1

    def fields(self, spec):
        return tuple(field for name, count in self.coded(spec).items() for field in self.code_fields(name, count))

    def coded(self, spec):
        a, b, r = self._shape(spec)
        return {"P": a * r, "Q": b * r}

    def code_fields(self, name: str, count: int):
        return Field(f"{name} scale", "float32", 1), Field(f"{name} codes", "uint8", (count * self.bits + 7) // 8)

    def init(self, ops, spec, info):
        return {"lqsgd_q": self._draw(ops, spec, info, 0)}

    # --- the codec: factors are small, and coded on the host ---------------------------------------------------------
    def encode(self, ops, x: np.ndarray):
        x = np.where(np.isfinite(x), x, 0.0)
        scale = np.float32(min(float(np.abs(x).max()), FLOAT32_MAX))
        ratio = np.minimum(np.abs(x) / float(scale), 1.0) if scale else np.zeros_like(x)
        levels = np.rint(np.log1p(self.alpha * ratio) / math.log1p(self.alpha) * self.levels)
        codes = (np.where(x < 0, -levels, levels) + self.levels).astype(np.int64)
        return ops.to_bytes(ops.upload(np.array([scale], np.float32)), "float32"), ops.pack(ops.upload(codes), self.bits)

    def decode(self, ops, payload, count: int) -> np.ndarray:
        scale = float(ops.host(ops.from_bytes(payload[0], "float32"))[0])
        if not math.isfinite(scale) or scale < 0:
            raise PayloadError("has a scale that is negative or not finite")
        codes = ops.host(ops.unpack(payload[1], self.bits, count))
        if int(codes.max()) > 2 * self.levels:
            raise PayloadError(f"has a code above {2 * self.levels}")
        return values(self.alpha, self.levels)[codes] * scale

    def _sum(self, ops, name: str, factor, spec, info, communicator):
        """Makes one factor's round. Returns (this rank's factor, decoded; the sum of all ranks' decoded factors), float64 on the host."""
        own, total = yield from communicator.sum_of_codes(ops, self, name, _flat(ops, factor), spec, info)
        return own.reshape(factor.shape), total.reshape(factor.shape)

    # --- the exchange --------------------------------------------------------------------------------------------------
    def exchange(self, ops, x, spec, info, state, communicator):
        a, b, r = self._shape(spec)
        m, before = x.reshape(a, b), state["lqsgd_q"].reshape(r, b)
        _, p_sum = yield from self._sum(ops, "P", ops.multiply(m, before.T), spec, info, communicator)
        p_host = orthonormalize(p_sum)
        p = ops.upload(p_host)
        q_own, q_sum = yield from self._sum(ops, "Q", ops.project(p, x), spec, info, communicator)
        q, q_own = _float32(ops, q_sum / info.divisor), _float32(ops, q_own)
        return Exchanged(
            ops.product(p, q),
            lambda: ops.product(p, q_own),
            {"lqsgd_q": kept_subspace(ops, q, before, p_host)},
            remove=lambda x: ops.subtract_product(x, p, q_own),
        )

    def compress(self, ops, x, spec, info, state):
        """Returns the payload of a rank at world size 1: P, then Q. Training runs `exchange` instead."""
        a, b, r = self._shape(spec)
        m = x.reshape(a, b)
        first = self.encode(ops, _flat(ops, ops.multiply(m, state["lqsgd_q"].reshape(r, b).T)))
        p = orthonormalize(self.decode(ops, first, a * r).reshape(a, r))
        return (*first, *self.encode(ops, _flat(ops, ops.multiply(ops.upload(p).T, m)))), state

    def _start(self, ops, spec, info, state):
        return state["lqsgd_q"]

    def _received(self, ops, payload, spec):
        a, b, r = self._shape(spec)
        p, q = self.decode(ops, payload[:2], a * r), self.decode(ops, payload[2:], b * r)
        return p.reshape(a, r), _float32(ops, q.reshape(r, b))

    def decompress(self, ops, payload, spec, info):
        a, b, r = self._shape(spec)
        p = orthonormalize(self.decode(ops, payload[:2], a * r).reshape(a, r))
        return ops.product(ops.upload(p), _float32(ops, self.decode(ops, payload[2:], b * r).reshape(r, b)))


def _flat(ops, factor) -> np.ndarray:
    return ops.host(factor).astype(np.float64).reshape(-1)


def _float32(ops, x: np.ndarray):
    """Rounds to float32, saturates, and uploads to the array library."""
    return ops.upload(np.clip(x, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32))
