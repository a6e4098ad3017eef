"""Cases of Triton kernels that are compiled for GPUs, on a machine without one. Nothing is run: the cases look at the machine code."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grace_ext.frameworks.torch.triton import kernels
from grace_ext.frameworks.torch.triton.ops import BLOCK, LANES, OPTIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
#: Fused multiply-adds of floats, which round once, and operations that flush subnormal numbers, in each kind of assembly.
WRONG = {"ptx": r"\bfma\.\S*f(?:32|64)|\S+\.ftz\S*", "amdgcn": r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_?\w*f(?:32|64)\w*"}

F32, F64, I32, I64, U8 = "*fp32", "*fp64", "*i32", "*i64", "*u8"
PIECES = {"SQUARE": True, "PIECE": 2048, "SIZE": 2048, "STEPS": 11}
#: By kernel: the types of its arguments and its constants; every kernel of the module must be here.
KERNELS = {
    "add_scaled": ({"residual": F32, "grad": F32, "total": F32, "beta": "fp32", "gamma": "fp32"}, {"BLOCK": BLOCK}),
    "random_words": ({"out": I64, "key0": "i64", "key1": "i32"}, {"BLOCK": BLOCK}),
    "round_randomly": (
        {"x": F32, "scale": F32, "codes": I64, "levels": "i32", "key0": "i32", "key1": "i64"}, {"BLOCK": BLOCK}
    ),
    "piece_sums": ({"x": F32, "sums": F64, "block": "i32", "pieces": "i32", "width": "i32"}, PIECES),
    "add_pieces": ({"sums": F64, "totals": F64, "number": "i32", "pieces": "i32"}, {"LANES": LANES}),
    "histogram": ({"x": F32, "counts": I32, "kth": I32}, {"SHIFT": 10, "BITS": 10, "FIRST": False, "BLOCK": BLOCK}),
    "pick_digit": ({"counts": I32, "kth": I32, "need": I32}, {"BITS": 11, "FIRST": True}),
    "count_chosen": ({"x": F32, "kth": I32, "above": I32, "equal": I32}, {"NANS": False, "BLOCK": BLOCK}),
    "write_chosen": (
        {"x": F32, "kth": I32, "need": I32, "above": I64, "equal": I64, "positions": I64}, {"NANS": True, "BLOCK": BLOCK}
    ),
    "pack_signs": ({"x": F32, "out": U8}, {"BLOCK": BLOCK}),
    "unpack_signs": ({"data": U8, "out": F32}, {"BLOCK": BLOCK}),
    "set_bits": ({"positions": I64, "out": I32, "k": "i32"}, {"BLOCK": BLOCK}),
    "count_bits": ({"data": U8, "counts": I32}, {"BLOCK": BLOCK}),
    "write_bits": ({"data": U8, "counts": I64, "positions": I64, "most": "i32"}, {"BLOCK": BLOCK}),
    "pack_codes": ({"codes": I64, "out": U8}, {"WIDTH": 7, "BLOCK": BLOCK}),
    "unpack_codes": ({"data": U8, "codes": I64, "nbytes": "i32"}, {"WIDTH": 7, "BLOCK": BLOCK}),
}  # fmt: skip


@lru_cache
def compiled(name: str, target: str, n: str = "i32", **options):
    """Returns the kernel, compiled with the options of a launch unless others are given."""
    kernel, (types, constants) = getattr(kernels, name), KERNELS[name]
    types = {**types, **({"n": n} if "n" in kernel.arg_names else {})}
    if n == "one":  # an argument that is 1 becomes a constant
        types, constants = {key: kind for key, kind in types.items() if kind != "one"}, {**constants, **({"n": 1} if "n" in types else {})}
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature=signature, constexprs=places), target=TARGETS[target], options=options or OPTIONS)


def wrong_in(code) -> list[str]:
    """Returns the instructions that would give other bits than the plain form."""
    kind = "ptx" if "ptx" in code.asm else "amdgcn"
    return re.findall(WRONG[kind], code.asm[kind])


def holds(target: str) -> None:
    for name in KERNELS:
        code = compiled(name, target)
        assert code.asm.get("cubin") or code.asm.get("hsaco"), name
        assert not wrong_in(code), (name, wrong_in(code))


def case_every_kernel_is_here():
    launched = set(re.findall(r"kernels\.(\w+)", Path(kernels.__file__).with_name("ops.py").read_text()))
    assert launched == set(KERNELS)


def case_sm_80():
    holds("sm_80")


def case_sm_90():
    holds("sm_90")


def case_gfx942():
    holds("gfx942")


def case_sizes_of_one_and_above_2_to_31():
    for name in KERNELS:
        for size in ("one", "i64"):
            assert compiled(name, "sm_90", size).asm["cubin"], name


def case_a_fused_multiply_add_is_found():
    """If launches did not forbid it, these kernels would fuse, and this check would say so."""
    for target in TARGETS:
        for name in ("add_scaled", "piece_sums"):
            assert wrong_in(compiled(name, target, enable_fp_fusion=True)), (name, target)


run_cases(SimpleNamespace(size=lambda: 1, rank=lambda: 0, allgather_object=lambda held: [held]), globals())
