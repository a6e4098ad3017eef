"""Converts floats of 16 bits: IEEE half precision by the processor's own conversions, bfloat16 in integers.

This module is loaded only if the processor has those conversions (compile.converts_halves): elsewhere they would become calls of functions
that may not exist.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import bits_of, f32, flag, float_of, inlined, kernel, read, u16, write
from .elementwise import INFINITY, L1_PIECE, MAGNITUDE, magnitude

SIGN, LARGEST_HALF, LARGEST_BRAIN = np.uint32(0x8000), np.uint32(0x477FE000), np.uint32(0x7F7F0000)
S16 = np.uint32(16)


@intrinsic
def rounded(context, x):
    """Returns uint16: the bits of a float32 as float16, rounded to nearest even."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def widened(context, bits):
    """Inverts `rounded`: returns float32."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@inlined
def half(bits):
    """Returns uint16: the float32 of these bits as float16; finite ones saturate."""
    absolute = np.uint32(bits & MAGNITUDE)
    if absolute < INFINITY:
        absolute = min(absolute, LARGEST_HALF)
    return np.uint16(rounded(float_of(absolute)) | ((bits >> S16) & SIGN))


@inlined
def brain(bits):
    """Returns uint16: the float32 of these bits as bfloat16; finite ones saturate, every NaN becomes the same."""
    absolute = np.uint32(bits & MAGNITUDE)
    up = np.uint32(np.uint32(0x7FFF) + ((absolute >> S16) & np.uint32(1)))
    nearest = np.uint32(np.uint32(min(absolute, LARGEST_BRAIN) + up) >> S16)
    if absolute == INFINITY:
        nearest = np.uint32(INFINITY >> S16)
    code = np.uint32(nearest | ((bits >> S16) & SIGN))
    return np.uint16(code if absolute <= INFINITY else np.uint32(0x7FC0))


@inlined
def wide(bits, brains):
    """Returns float32: the value of 16 bits, of bfloat16 or else of float16."""
    return float_of(np.uint32(bits) << S16) if brains else widened(bits)


@kernel(read(f32), flag, write(u16))
def narrow(x, brains, out):
    """Writes the bits of x as bfloat16, or else float16, to `out`. Returns whether all of x is finite."""
    most = np.uint32(0)
    for j in range(len(x)):
        most = max(most, magnitude(x[j]))
        out[j] = brain(bits_of(x[j])) if brains else half(bits_of(x[j]))
    return most < INFINITY


@kernel(read(f32), read(f32), f32, f32, flag, write(u16), write(f32))
def narrow_sum(residual, grad, beta, gamma, brains, out, left):
    """Writes p_j = beta residual_j + gamma grad_j as 16 bits to `out`, and what these lose of p_j to `left`. Returns whether all of p is
    finite."""
    most = np.uint32(0)
    for j in range(len(left)):
        p = beta * residual[j] + gamma * grad[j]
        most = max(most, magnitude(p))
        bits = brain(bits_of(p)) if brains else half(bits_of(p))
        out[j] = bits
        left[j] = p - wide(bits, brains)
    return most < INFINITY


@kernel(write(f32), read(u16), flag)
def widen(out, data, brains):
    """Computes out_j = the value of these 16 bits."""
    for j in range(len(out)):
        out[j] = wide(data[j], brains)


@kernel(write(f32), read(u16), flag, flag, f32)
def add_halves(total, data, brains, first, divisor):
    """Adds to total_j the value of these 16 bits (with `first`, 0 + that), and divides in the end. Returns whether all are finite."""
    most = np.uint32(0)
    for start in range(0, len(total), L1_PIECE):
        piece, bits = total[start : start + L1_PIECE], data[start : start + L1_PIECE]
        for j in range(len(piece)):
            value = wide(bits[j], brains)
            most = max(most, magnitude(value))
            piece[j] = (np.float32(0) if first else piece[j]) + value
        if divisor != 1:
            for j in range(len(piece)):
                piece[j] /= divisor
    return most < INFINITY
