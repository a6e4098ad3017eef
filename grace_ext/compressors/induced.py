from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..errors import IncompatiblePartsError
from ..parts.spec import part_knob
from . import register
from .base import Compressor

#: Elements of the tensor for which `check` asks delta and omega; any number would do.
SOME = 4096


@register("induced")
@dataclass(frozen=True)
class Induced(Compressor):
    """Makes a biased compressor unbiased: also sends its error, the rest of the gradient, by an unbiased compressor.

    C(x) = B(x) + U(x - B(x));  B (`biased`) is a contraction, U (`rest`) is unbiased and drawn independently of B.
    x: float[d] -> the payload of B, then that of U. Wire: the sum of both; the defaults send 9.4 bits per element.
    Unbiased, with omega = omega_U (1 - delta_B), smaller than that of U alone: needs no memory, whereas B alone needs a residual.
    `biased`: topk, dgc, efsignsgd, randomk, ...; `rest`: randomk(scale=True), randblock(scale=True), qsgd, natural, ...; both without
    rounds or state of their own. A U of high variance (a low ratio) loses what B gained. A sum that float32 cannot hold saturates.
    Raises IncompatiblePartsError if B promises no contraction or U is not unbiased.
    Source: Horvath and Richtarik 2021.
    """

    unbiased: ClassVar[bool] = True
    biased: Compressor = part_knob("topk(ratio=0.01)", "a contraction, for the gradient")
    rest: Compressor = part_knob("natural", "an unbiased compressor, for the error of the other")

    @property
    def deterministic_bytes(self) -> bool:  # type: ignore[override]
        return self.biased.deterministic_bytes and self.rest.deterministic_bytes

    def check(self):
        for part in (self.biased, self.rest):
            part.check()
            if part.rounds or part.result != "mean" or part.whole_model or part.keeps_state:
                raise IncompatiblePartsError(
                    f"'{self}': both parts must compress one tensor by themselves, without rounds or state of their own, and their result "
                    f"must be a mean, which is not so for {part.name!r}; use for example biased=topk, rest=natural"
                )
        if self.biased.delta(SOME) is None:
            raise IncompatiblePartsError(
                f"'{self}': the first part must be a contraction (topk, dgc, efsignsgd, ... with values in fp32), and {self.biased} "
                "promises none"
            )
        if not self.rest.unbiased or self.rest.omega(SOME) is None:
            raise IncompatiblePartsError(
                f"'{self}': the second part must be unbiased, with a known variance (randomk(scale=True), qsgd, natural, ...), and "
                f"{self.rest} is not"
            )

    def omega(self, d):
        omega, delta = self.rest.omega(d), self.biased.delta(d)
        return None if omega is None or delta is None else omega * (1 - delta)

    def _second(self, spec):
        """Returns the spec of the rest, with a name of its own, so that its draws do not depend on those for the gradient."""
        return dataclasses.replace(spec, name=spec.name + " (rest)", dtype="float32")

    def _parts(self, spec):
        return (self.biased, spec), (self.rest, self._second(spec))

    def fields(self, spec):
        names = ("biased ", "rest ")
        return tuple(
            dataclasses.replace(field, name=name + field.name)
            for name, (part, its) in zip(names, self._parts(spec), strict=True)
            for field in part.fields(its)
        )

    def nbytes(self, spec):
        return sum(part.nbytes(its) for part, its in self._parts(spec))

    def mean_nbytes(self, spec):
        return sum(part.mean_nbytes(its) for part, its in self._parts(spec))

    def compress(self, ops, x, spec, info, state):
        first, _ = self.biased.compress(ops, x, spec, info, {})
        decoded = self.biased.decompress(ops, first, spec, info)
        rest = _float32(ops, ops.cast(x, "float64") - ops.cast(decoded, "float64"))
        second, _ = self.rest.compress(ops, rest, self._second(spec), info, {})
        return (*first, *second), state

    def decompress(self, ops, payload, spec, info):
        cut = len(self.biased.fields(spec))
        first = self.biased.decompress(ops, payload[:cut], spec, info)
        second = self.rest.decompress(ops, payload[cut:], self._second(spec), info)
        return _float32(ops, ops.cast(first, "float64") + ops.cast(second, "float64"))


def _float32(ops, x):
    """Rounds to float32; values that are too large saturate."""
    return ops.from_bytes(ops.to_bytes(x, "float32"), "float32")
