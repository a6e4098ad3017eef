"""A compressor in its own package. grace_ext finds it by its entry point and its name: `grace_ext.grace("blur(block=4) + residual")`."""

from dataclasses import dataclass
from typing import ClassVar

from grace_ext.arrays.sums import in_blocks
from grace_ext.compressors.base import Compressor
from grace_ext.parts import Field, knob


@dataclass(frozen=True)
class Blur(Compressor):
    """Sends the mean of every `block` neighbouring elements.

    C(x)_j = mean of the block that j is in.  x: float[d] -> float32[ceil(d / block)], 4 / block bytes per element. It is linear, so
    an all-reduce can carry it; it is biased, so pair it with 'residual'. The last block is padded with zeros.
    """

    summable: ClassVar[bool] = True
    wants_memory: ClassVar[bool] = True
    block: int = knob(4, "elements that share a mean", low=1, high=2**20, headline=True)

    def fields(self, spec):
        return (Field("means", "float32", -(-spec.size // self.block)),)

    def compress(self, ops, x, spec, info, state):
        sums = ops.sums_of_rows(in_blocks(ops, x, self.block))  # in the order that all libraries share
        return (ops.to_bytes(sums / ops.number(self.block), "float32"),), state

    def decompress(self, ops, payload, spec, info):
        return ops.spread(ops.from_bytes(payload[0], "float32"), self.block, spec.size)
