"""Names and configurations <-> parts, and the two small values that describe one tensor of one step.

A spec string is `compressor [+ memory] [@ communicator]`, each a name with optional knobs, in Python's own expression syntax:
`topk(ratio=0.01) + residual @ allgather`. It is read with `ast`, never evaluated.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SpecSyntaxError
from .parts import Part

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a gradient before it is seen: parameter name, shape and dtype (one of DTYPES)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense gradient in its own dtype."""
        return self.size * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True)
class StepInfo:
    """What a part may know of the step: `step` counts from 0, `divisor` is the world size for a mean and 1 for a sum, `lr` the
    current learning rate where an optimizer is bound. Equal on all ranks but for `rank`."""

    step: int
    rank: int
    size: int
    divisor: int
    seed: int = 0
    lr: float | None = None

    def shared_key(self, name: str, use: str, step: int | None = None) -> tuple[int, int]:
        """64 bits that every rank derives alike from (seed, parameter, use, step), as two 32-bit words; see rng.py."""
        return self._key(name, use, self.step if step is None else step, "shared")

    def private_key(self, name: str, use: str) -> tuple[int, int]:
        """64 bits of this rank alone, from (seed, parameter, use, step, rank)."""
        return self._key(name, use, self.step, str(self.rank))

    def _key(self, name: str, use: str, step: int, who: str) -> tuple[int, int]:
        text = "\0".join((str(self.seed), name, use, str(step), who))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def parse(text: str) -> dict[str, Part]:
    """The parts named by a spec string, by kind: always 'compressor', and 'memory' and 'communicator' where they are said."""
    from . import communicators, compressors, memories

    node = _expression(text)
    nodes: dict[str, ast.expr] = {}
    # '@' binds tighter than '+' in Python, so 'a + b @ c' arrives as a + (b @ c) and 'a @ c' as itself.
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        nodes["compressor"], node = node.left, node.right
        nodes["memory"] = node
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            nodes["memory"], nodes["communicator"] = node.left, node.right
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        nodes["compressor"], nodes["communicator"] = node.left, node.right
    else:
        nodes["compressor"] = node
    kinds = {"compressor": compressors, "memory": memories, "communicator": communicators}
    return {kind: _part(kinds[kind], part, text) for kind, part in nodes.items()}


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SpecSyntaxError(f"cannot read {text!r}: {error.msg} at column {error.offset}. {GRAMMAR}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # null bytes; nested too deeply
        raise SpecSyntaxError(f"cannot read {text[:80]!r}: {error or 'nested too deeply'}. {GRAMMAR}") from None


GRAMMAR = "Write it as 'compressor(knob=value) + memory @ communicator', e.g. 'topk(ratio=0.01) + residual @ allgather'."


def _part(kind: Any, node: ast.expr, text: str) -> Part:
    if isinstance(node, ast.Constant) and node.value is None:
        node = ast.Name("none")  # a user's None, where a part called none is meant
    if isinstance(node, ast.Name):
        return kind.get(node.id).create()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        try:
            args = tuple(ast.literal_eval(a) for a in node.args)
            knobs = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise SpecSyntaxError(f"cannot read {ast.unparse(node)!r}: knobs take plain values. {GRAMMAR}") from None
        if len(knobs) < len(node.keywords) or any(k.arg is None for k in node.keywords):
            raise SpecSyntaxError(f"cannot read {ast.unparse(node)!r}: give each knob once, by its name. {GRAMMAR}")
        return kind.get(node.func.id).create(args, knobs)
    raise SpecSyntaxError(f"cannot read {ast.unparse(node)!r} in {text!r}. {GRAMMAR}")


def part_from(kind: Any, value: Any) -> Part:
    """A part from an instance, a name with knobs ('topk(ratio=0.01)'), or a configuration ({'id': 'topk', 'ratio': 0.01})."""
    if isinstance(value, Part):
        expected = kind.registry.kind
        if value.kind != expected:
            raise SpecSyntaxError(f"{value} is a {value.kind}, where a {expected} was expected")
        return value
    if value is None:
        return kind.get("none").create()
    if isinstance(value, str):
        return _part(kind, _expression(value), value)
    if isinstance(value, Mapping) and isinstance(value.get("id"), str):
        knobs = {str(k): v for k, v in value.items() if k != "id"}
        return kind.get(value["id"]).create((), knobs)
    raise SpecSyntaxError(f"a {kind.registry.kind} is a name, an instance or a dictionary with an 'id', got {value!r}")
