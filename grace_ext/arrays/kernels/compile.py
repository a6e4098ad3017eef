"""Compiles a kernel for one signature, or loads it from grace_ext's own cache; it runs without Python's lock. Gives kernels vector
instructions."""

from __future__ import annotations

import operator
import pickle
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher as Kernel  # noqa: F401  (what `kernel` makes)
from numba.core.serialize import dumps
from numba.extending import intrinsic, models, overload, register_model

from . import cache

# Types of arguments. Arrays that a kernel only reads may be read-only ones, such as those of a transport or TensorFlow.
f32, f64, flag = types.float32, types.float64, types.boolean
i32, i64, u8, u16, u32 = types.int32, types.int64, types.uint8, types.uint16, types.uint32


def read(dtype: Any) -> Any:
    """Returns the type of a contiguous 1-D array that is only read."""
    return types.Array(dtype, 1, "C", readonly=True)


def write(dtype: Any) -> Any:
    """Returns the type of a contiguous 1-D array that is written to."""
    return types.Array(dtype, 1, "C")


def kernel(*arguments: Any, **options: Any) -> Callable[[Callable], Any]:
    """Returns a decorator that compiles a function for these argument types, or loads what was compiled before."""

    def compiled(function: Callable) -> Any:
        made: Any = njit(nogil=True, error_model="numpy", **options)(function)
        made._cache = _Kept(f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}")
        made.compile(arguments)
        made.disable_compile()
        return made

    return compiled


class _Kept(NullCache):
    """Gives numba a kernel that was compiled before, and keeps one that it compiled. A kernel has one signature, and a name of its own."""

    def __init__(self, name: str):
        self._name = name

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()  # as numba's own cache does: from here on it knows the functions that kernels call
        data = cache.kept(self._name)
        if data is None:
            if cache.complete().exists():
                print(f"grace_ext: {cache.kernels_folder() / self._name} is missing or damaged: compiling it again", file=sys.stderr)
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig: Any, cres: Any) -> None:
        cache.keep(self._name, dumps(cres._reduce()))


def converts_halves() -> bool:
    """Whether the processor that is compiled for converts half precision in vector instructions."""
    return platform.machine().lower() in ("arm64", "aarch64") or _has("f16c")


def compresses() -> bool:
    """Whether the processor that is compiled for stores chosen elements of a vector in one instruction."""
    return _has("avx512f")


def _has(feature: str) -> bool:
    return f"+{feature}" in cache.target()[2].split(",")


#: Decorates small functions that kernels call.
inlined = njit(inline="always", error_model="numpy")


@intrinsic
def bits_of(context, x):
    """Returns uint32: the bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def float_of(context, x):
    """Inverts bits_of."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def lowest_one(context, word):
    """Returns int64: the position of the lowest one in a uint64 that is not zero."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


#: Elements that are processed together: one vector register of the widest processors, two or four of others.
LANES = 16


class Vector(types.Type):
    """Is the type of LANES float32, with + - *: for loops that the compiler would not turn into vector instructions, because it cannot know
    which arrays lie in the same memory, or would in more steps than one."""


vector = Vector("vector")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), LANES))


def _with_operator(symbol: Callable, instruction: str) -> None:
    @intrinsic
    def of_two(context, a, b):
        return vector(vector, vector), lambda context, builder, signature, arguments: getattr(builder, instruction)(*arguments)

    @overload(symbol)
    def chosen(a, b):
        return (lambda a, b: of_two(a, b)) if a is vector and b is vector else None


for _symbol, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _with_operator(_symbol, _instruction)


@intrinsic
def load(context, x, at):
    """Returns vector: x[at + i], for i < LANES. Here and below, the caller makes sure that there are so many elements."""

    def generate(context, builder, signature, arguments):
        return builder.load(_lanes(context, builder, signature, arguments, ir.FloatType()), align=4)

    return vector(x, types.int64), generate


@intrinsic
def store(context, x, at, values):
    """Stores x[at + i] = values_i."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _lanes(context, builder, signature, arguments, ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, vector), generate


@intrinsic
def every(context, value):
    """Returns vector: LANES times a float32."""
    return vector(types.float32), lambda context, builder, signature, arguments: _every(builder, arguments[0])


@intrinsic
def sum_of(context, values):
    """Returns float32: the sum of a vector's elements."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), arguments[0].type])
        reduce = builder.module.declare_intrinsic(f"llvm.vector.reduce.fadd.v{LANES}f32", (), kind)
        return builder.call(reduce, [ir.Constant(ir.FloatType(), 0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(vector), generate


@intrinsic
def larger(context, a, b):
    """Returns vector: the larger of |a_i| and |b_i|. Inf and NaN are above all numbers."""

    def generate(context, builder, signature, arguments):
        bits = ir.VectorType(ir.IntType(32), LANES)
        one, other = (builder.and_(builder.bitcast(v, bits), ir.Constant(bits, [0x7FFFFFFF] * LANES)) for v in arguments)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", one, other), one, other), arguments[0].type)

    return vector(vector, vector), generate


@intrinsic
def largest(context, magnitudes):
    """Returns uint32: the bits of the largest element of what `larger` returned."""

    def generate(context, builder, signature, arguments):
        bits = ir.VectorType(ir.IntType(32), LANES)
        kind = ir.FunctionType(ir.IntType(32), [bits])
        reduce = builder.module.declare_intrinsic(f"llvm.vector.reduce.umax.v{LANES}i32", (), kind)
        return builder.call(reduce, [builder.bitcast(arguments[0], bits)])

    return types.uint32(vector), generate


@intrinsic
def signs(context, x, at):
    """Returns uint64: bit i is set if x[at + i] >= 0, for i < LANES."""

    def generate(context, builder, signature, arguments):
        values = builder.load(_lanes(context, builder, signature, arguments, ir.FloatType()), align=4)
        zeros = ir.Constant(values.type, [0.0] * LANES)
        return _as_bits(builder, builder.fcmp_ordered(">=", values, zeros))

    return types.uint64(x, types.int64), generate


@intrinsic
def reach(context, x, at, threshold):
    """Returns uint64: bit i is set if |x[at + i]| >= threshold, given by its bits, for i < LANES."""

    def generate(context, builder, signature, arguments):
        return _as_bits(builder, _reaching(context, builder, signature, arguments)[1])

    return types.uint64(x, types.int64, types.uint32), generate


@intrinsic
def keep_at(context, x, at, threshold, places, found):
    """Returns int64: how many |x[at + i]| >= threshold there are, given by its bits, for i < LANES. Writes their at + i to `places`,
    int32[], from `found` on. Only for processors that have the instruction (see `compresses`)."""

    def generate(context, builder, signature, arguments):
        magnitudes, mask = _reaching(context, builder, signature, arguments)
        here = _every(builder, builder.trunc(arguments[1], ir.IntType(32)))
        here = builder.add(here, ir.Constant(magnitudes.type, list(range(LANES))))
        return _compress(context, builder, signature, arguments, here, mask)

    return types.int64(x, types.int64, types.uint32, places, types.int64), generate


@intrinsic
def keep_abs(context, x, at, threshold, out, found):
    """Returns what `keep_at` does, but writes the |x[at + i]| themselves to `out`, float32[]."""

    def generate(context, builder, signature, arguments):
        return _compress(context, builder, signature, arguments, *_reaching(context, builder, signature, arguments))

    return types.int64(x, types.int64, types.uint32, out, types.int64), generate


def _reaching(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, Any]:
    """Returns the bits of |x[at + i]|, and whether they reach the threshold, for arguments that begin with x, at, threshold."""
    values = builder.load(_lanes(context, builder, signature, arguments, ir.IntType(32)), align=4)
    magnitudes = builder.and_(values, ir.Constant(values.type, [0x7FFFFFFF] * LANES))
    return magnitudes, builder.icmp_unsigned(">=", magnitudes, _every(builder, arguments[2]))


def _compress(context: Any, builder: Any, signature: Any, arguments: Any, values: Any, mask: Any) -> Any:
    """Stores the 32-bit values that the mask chooses in arguments[3], from arguments[4] on. Returns how many there are."""
    into = builder.gep(context.make_array(signature.args[3])(context, builder, arguments[3]).data, [arguments[4]])
    into = builder.bitcast(into, ir.IntType(32).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [values.type, into.type, mask.type])
    builder.call(builder.module.declare_intrinsic(f"llvm.masked.compressstore.v{LANES}i32", (), kind), [values, into, mask])
    return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(LANES))), ir.IntType(64))


@intrinsic
def add_either(context, total, at, bits, above, below):
    """Adds to total[at + i] `above` if bit i is set, else `below`, for i < LANES."""

    def generate(context, builder, signature, arguments):
        here = _lanes(context, builder, signature, arguments, ir.FloatType())
        values, bits = builder.load(here, align=4), builder.trunc(arguments[2], ir.IntType(LANES))
        chosen = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        either = builder.select(chosen, _every(builder, arguments[3]), _every(builder, arguments[4]))
        builder.store(builder.fadd(values, either), here, align=4)
        return context.get_dummy_value()

    return types.void(total, types.int64, types.uint64, types.float32, types.float32), generate


@intrinsic
def copy_eight(context, into, at, values, start):
    """Copies into[at + i] = values[start + i], float32, for i < 8, in one load and one store."""

    def generate(context, builder, signature, arguments):
        there, here = (_lanes(context, builder, signature, arguments, ir.FloatType(), 8, argument) for argument in (0, 2))
        builder.store(builder.load(here, align=4), there, align=4)
        return context.get_dummy_value()

    return types.void(into, types.int64, values, types.int64), generate


def _lanes(context: Any, builder: Any, signature: Any, arguments: Any, element: Any, number: int = LANES, argument: int = 0) -> Any:
    """Returns a pointer to so many elements of the array in this argument, from the position in the next argument on."""
    data = context.make_array(signature.args[argument])(context, builder, arguments[argument]).data
    return builder.bitcast(builder.gep(data, [arguments[argument + 1]]), ir.VectorType(element, number).as_pointer())


def _every(builder: Any, value: Any) -> Any:
    """Returns LANES times a value, as a vector."""
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _as_bits(builder: Any, answers: Any) -> Any:
    """Returns LANES truth values as the low bits of a uint64."""
    return builder.zext(builder.bitcast(answers, ir.IntType(LANES)), ir.IntType(64))
