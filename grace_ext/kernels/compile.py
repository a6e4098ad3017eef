"""How a kernel is compiled: for one signature, without Python's lock, into our own cache folder."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import config, njit, types
from numba.core.dispatcher import Dispatcher as Kernel  # noqa: F401  (what `kernel` makes)
from numba.extending import intrinsic

from . import folder

# Arguments. Arrays that a kernel only reads may be read-only ones: what a transport or TensorFlow owns.
f32, f64, flag = types.float32, types.float64, types.boolean
i32, i64, u8, u16, u32 = types.int32, types.int64, types.uint8, types.uint16, types.uint32


def read(dtype: Any) -> Any:
    """A contiguous 1-D array that is only read."""
    return types.Array(dtype, 1, "C", readonly=True)


def write(dtype: Any) -> Any:
    """A contiguous 1-D array that is written to."""
    return types.Array(dtype, 1, "C")


def kernel(*arguments: Any, **options: Any) -> Callable[[Callable], Any]:
    """Compiles a function for these argument types, or loads what was compiled before."""

    def compiled(function: Callable) -> Any:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder())
        try:
            return njit(tuple(arguments), cache=True, nogil=True, error_model="numpy", **options)(function)
        finally:
            config.CACHE_DIR = before

    return compiled


def converts_halves() -> bool:
    """Whether this processor converts half precision in vector instructions."""
    return platform.machine().lower() in ("arm64", "aarch64") or bool(binding.get_host_cpu_features().get("f16c"))


#: For small functions that kernels call.
inlined = njit(inline="always", error_model="numpy")


@intrinsic
def bits_of(context, x):
    """uint32: the bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def float_of(context, x):
    """The inverse of bits_of."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate
