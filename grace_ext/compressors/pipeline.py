from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..errors import IncompatiblePartsError, PayloadError
from ..parts.field import Field
from ..parts.part import knob
from ..parts.spec import part_knob
from ..parts.tensor import TensorSpec
from . import register
from .base import Compressor
from .forms.positions import decode_indices, encode_indices
from .forms.sparse import AtPositions, Selecting, count_field, finite, get_count, index_field, put_count


@register("pipeline")
@dataclass(frozen=True)
class Pipeline(AtPositions):
    """Selects elements with one compressor and encodes the selected values with another: 'topk(ratio=0.01) > qsgd(bits=4)'.

    C(x) = Q(x_S) / (1 + omega) at the positions S that `select` picks, else 0; omega is the variance of Q if Q is unbiased (qsgd,
    natural, terngrad, ...) and 0 if it is not. The division makes the whole a contraction whatever Q's variance is, so that error
    feedback converges: delta = k / (d (1 + omega)); scale=False leaves the division out.
    x: float[d] -> the positions of `select`, coded as it codes them, and Q's payload of float[k].
    Wire: k positions and what Q sends for k values. 'sign' means 'efsignsgd': (||x_S||_1 / k) sign(x_S).
    `select` is an index-sparse compressor that sends positions (topk, threshold, dgc, sidco, global_topk); `codec` is one
    that encodes every element (qsgd, efsignsgd, natural, fp16, ...). Biased: pair with 'residual'.
    Source: Basu et al. 2019 (Qsparse-local-SGD), whose released code uses omega = k/s^2 only.
    """

    wants_memory: ClassVar[bool] = True
    select: Compressor = part_knob("topk(ratio=0.01)", "compressor that chooses which elements are sent")
    codec: Compressor = part_knob("qsgd(bits=4)", "compressor that encodes their values")
    scale: bool = knob(True, "divide by 1 + omega of an unbiased codec, so that error feedback converges")

    def __str__(self):
        return f"{self.select} > {self.codec}" if self.scale else super().__str__()

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        return self.select.whole_model

    @property
    def keeps_state(self) -> bool:
        return self.select.keeps_state

    @property
    def deterministic_bytes(self) -> bool:  # type: ignore[override]
        return self.select.deterministic_bytes and self.codec.deterministic_bytes

    def check(self):
        if not isinstance(self.select, Selecting):
            raise IncompatiblePartsError(
                f"'{self.select} > {self.codec}': the first stage must pick positions and send them (topk, threshold, dgc, sidco, ...), "
                f"which {self.select.name!r} does not"
            )
        if self.codec.selects or self.codec.rounds or self.codec.result == "vote" or self.codec.keeps_state:
            raise IncompatiblePartsError(
                f"'{self.select} > {self.codec}': the second stage must encode every value it is given, by itself (qsgd, sign, natural, "
                f"fp16, terngrad, ...), which {self.codec.name!r} does not"
            )
        if "signs" in (self.codec.result, self.select.result):
            raise IncompatiblePartsError(
                f"'{self.select} > {self.codec}': the result of a stage must be a mean of the ranks; leave out sign=True"
            )
        if not self.select.exactly and not self.codec.grows:
            raise IncompatiblePartsError(
                f"'{self.select} > {self.codec}': the number of values that {self.select.name!r} picks varies, and fewer values may take "
                f"more bytes with {self.codec.name!r}, so that payloads have no bound; use it after 'topk', or another second stage"
            )
        self.select.check()
        self.codec.check()

    def _inner(self, spec, count):
        return TensorSpec(spec.name, (count,), "float32")

    def delta(self, d):
        whole = self.select.delta(d)
        if whole is None or not self.codec.unbiased or not self.scale:
            return None
        omega = self.codec.omega(self.select.most(d))
        return None if omega is None else whole / (1 + omega)

    def fields(self, spec):
        d, most = spec.size, self.select.most(spec.size)
        exactly = self.select.exactly
        inner = self.codec.fields(self._inner(spec, most))
        head = () if exactly else (count_field(),)
        return (
            *head,
            index_field(most, d, self.select.index, exactly=exactly),
            *(Field("value " + f.name, f.dtype, f.count, f.variable or not exactly) for f in inner),
        )

    def sends_dense(self, spec):
        return self.select.exactly and super().sends_dense(spec)

    def init(self, ops, spec, info):
        return self.select.init(ops, spec, info)

    def prepare(self, ops, x, spec, info):
        select = yield from self.select.prepare(ops, x, spec, info)
        return self if select is self.select else dataclasses.replace(self, select=select)

    def compress(self, ops, x, spec, info, state):
        positions, state = self.select.select(ops, x, spec, info, state)
        return self._payload(ops, x, positions, spec, info), state

    def _payload(self, ops, x, positions, spec, info):
        count = len(positions)
        if count:
            inner, _ = self.codec.compress(ops, x[positions], self._inner(spec, count), info, {})
        else:
            inner = [ops.set_bits(positions, 0) for _ in self.codec.fields(self._inner(spec, 1))]
        head = () if self.select.exactly else (put_count(ops, count),)
        return *head, encode_indices(ops, positions, spec.size, self.select.index), *inner

    def decoded(self, ops, payload, spec, info):
        if self.select.exactly:
            count, rest = self.select.most(spec.size), payload
        else:
            count, rest = get_count(ops, payload[0], self.select.most(spec.size), spec.size), payload[1:]
        positions = decode_indices(ops, rest[0], count, spec.size, self.select.index)
        if not count:
            return positions, ops.zeros(0)
        inner = self._inner(spec, count)
        for field, piece in zip(self.codec.fields(inner), rest[1:], strict=True):
            if not field.variable and len(piece) != field.max_bytes or len(piece) > field.max_bytes:
                raise PayloadError(f"has {len(piece)} bytes of {field.name!r} for {count} values, expected {field.max_bytes}")
        values = finite(ops, self.codec.decompress(ops, rest[1:], inner, info))
        omega = self.codec.omega(count) if self.scale and self.codec.unbiased else None
        return positions, values / (1 + omega) if omega else values
