"""Reads spec strings and configurations into parts.

A spec string is `compressor [> compressor of the values] [+ memory] [@ communicator]`, each a name with optional knobs, in Python's own
expression syntax: `topk(ratio=0.01) > qsgd(bits=4) + residual @ allgather`. Or it is a policy, whose knobs may be specs, quoted or not:
`by_size(large=topk(ratio=0.01) + residual)`. A mechanism of privacy may stand in front of either: `gaussian(clip=1) | topk + residual`.
The string is parsed with `ast` and never evaluated.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import ParameterError, SpecSyntaxError, UnknownPartError, shown
from .part import Part, made_knob
from .registry import Registry, communicators, compressors, mechanisms, memories, policies


def parse(text: str) -> dict[str, Part]:
    """Returns the parts of a spec string by kind: 'compressor', and 'memory' and 'communicator' if they are given; or 'policy'. Also
    'privacy', if a mechanism stands in front."""
    mechanism, node = _split_off_mechanism(_expression(text))
    front = {} if mechanism is None else {"privacy": _part(mechanisms, mechanism, text)}
    if _means_a_policy(node):
        return {**front, "policy": _part(policies, node, text)}
    stages: list[ast.expr] = []
    # 'a > b + m @ c' arrives as the comparison of a with (b + (m @ c)).
    if _is_pipeline(node):
        *stages, node = [node.left, *node.comparators]
    nodes: dict[str, ast.expr] = {}
    # '@' binds tighter than '+' in Python, so 'a + b @ c' arrives as a + (b @ c) and 'a @ c' as itself.
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        last, node = node.left, node.right
        nodes["memory"] = node
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            nodes["memory"], nodes["communicator"] = node.left, node.right
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        last, nodes["communicator"] = node.left, node.right
    else:
        last = node
    if _means_a_policy(last):
        raise SpecSyntaxError(
            f"{shown(ast.unparse(last))} in {shown(text)} is a policy, which is a spec by itself: give memory and communicator in its "
            "knobs, as in 'by_size(large=topk(ratio=0.01) + residual)'"
        )
    parts = {"compressor": _pipeline([*stages, last], text)}
    kinds = {"memory": memories, "communicator": communicators}
    return {**front, **parts, **{kind: _part(kinds[kind], part, text) for kind, part in nodes.items()}}


def _split_off_mechanism(node: ast.expr) -> tuple[ast.expr | None, ast.expr]:
    """Returns what stands before '|', or None, and the rest. 'a | b > c' arrives as the comparison of (a | b) with c."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return node.left, node.right
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.BitOr):
        return node.left.left, ast.Compare(node.left.right, node.ops, node.comparators)
    return None, node


def named_by(text: str) -> list[Part]:
    """Returns the parts that a text names: those of every kind that have this name ('efsignsgd' is a compressor and a memory) and these
    knobs, if it gives any; or else the parts of a spec. Raises UnknownPartError, ParameterError or SpecSyntaxError."""
    registries = (compressors, memories, communicators, policies, mechanisms)
    node = _expression(text) if not any(text in registry.names() for registry in registries) else ast.Name(text)
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        return list(parse(text).values())
    known = [registry for registry in registries if name.id in registry.names()]
    if not known:
        every = sorted({known_name for registry in registries for known_name in registry.names()})
        raise UnknownPartError("part", name.id, difflib.get_close_matches(name.id.lower(), every, n=3), every)
    found, refused = [], []
    for registry in known:
        try:
            found.append(_part(registry, node, text))
        except ParameterError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def _means_a_policy(node: ast.expr) -> bool:
    """Whether this is a policy's name, or a misspelt name that is closer to a policy's than to any compressor's."""
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name) or name.id in compressors.names():
        return False
    likely = difflib.get_close_matches(name.id, [*compressors.names(), *policies.names()], n=1)
    return bool(likely) and likely[0] in policies.names()


def _is_pipeline(node: ast.expr) -> TypeGuard[ast.Compare]:
    return isinstance(node, ast.Compare) and all(isinstance(op, ast.Gt) for op in node.ops)


def _pipeline(stages: list[ast.expr], text: str) -> Part:
    """Returns one compressor, or the pipeline 'select > values'."""
    if len(stages) == 1:
        return _part(compressors, stages[0], text)
    if len(stages) > 2:
        raise SpecSyntaxError(f"{shown(text)} has {len(stages)} stages, but a pipeline has two: one selects, one encodes the values")
    name = stages[1].func if isinstance(stages[1], ast.Call) else stages[1]
    if isinstance(name, ast.Name) and name.id == "sign":
        name.id = "efsignsgd"  # the papers' name for signs with one scale
    select, values = (_part(compressors, stage, text) for stage in stages)
    return _made(compressors, "pipeline", (select, values))


def _expression(text: str) -> ast.expr:
    stripped = text.strip()
    lines = len(stripped.splitlines()) > 1
    try:
        # Inside of brackets, Python takes line breaks and indents (of a YAML block, for example) for blanks.
        return ast.parse(f"(\n{stripped}\n)" if lines else stripped, mode="eval").body
    except SyntaxError as error:
        where = f"line {(error.lineno or 2) - 1}, column {error.offset}" if lines else f"column {error.offset}"
        raise SpecSyntaxError(f"cannot read {shown(text)}: {error.msg} at {where}. {GRAMMAR}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # null bytes; nested too deeply
        raise SpecSyntaxError(f"cannot read {shown(text)}: {error or 'nested too deeply'}. {GRAMMAR}") from None


GRAMMAR = "Write it as 'compressor(knob=value) + memory @ communicator', e.g. 'topk(ratio=0.01) + residual @ allgather'."


def _part(registry: Registry, node: ast.expr, text: str) -> Part:
    if _is_pipeline(node) and registry.kind == "compressor":
        return _pipeline([node.left, *node.comparators], text)
    if isinstance(node, ast.Constant) and node.value is None:
        node = ast.Name("none")  # a user who writes None means the part called none
    if isinstance(node, ast.Name):
        return _made(registry, node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        value = _value if registry.kind != "policy" else _policy_value
        try:
            args = tuple(value(a, text) for a in node.args)
            knobs = {str(k.arg): value(k.value, text) for k in node.keywords}
        except SpecSyntaxError:
            raise
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise SpecSyntaxError(f"cannot read {shown(ast.unparse(node))}: knobs take plain values. {GRAMMAR}") from None
        if len(knobs) < len(node.keywords) or any(k.arg is None for k in node.keywords):
            raise SpecSyntaxError(f"cannot read {shown(ast.unparse(node))}: give each knob once, by its name. {GRAMMAR}")
        return _made(registry, node.func.id, args, knobs)
    raise SpecSyntaxError(f"cannot read {shown(ast.unparse(node))} in {shown(text)}. {GRAMMAR}")


def _made(registry: Registry, name: str, args: tuple[Any, ...] = (), knobs: dict[str, Any] | None = None) -> Part:
    part: Part = registry.get(name).create(args, knobs)
    return part


def _value(node: ast.expr, text: str) -> Any:
    """Returns a knob's value: a plain one, or a compressor or communicator."""
    first = node.left if _is_pipeline(node) else node
    name = first.func if isinstance(first, ast.Call) else first
    for registry in (compressors, communicators):
        if isinstance(name, ast.Name) and name.id in registry.names():
            return _part(registry, node, text)
    return ast.literal_eval(node)


def _policy_value(node: ast.expr, text: str) -> Any:
    """Returns the value of a policy's knob: a plain value, or a spec, which stays text."""
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise SpecSyntaxError(
                f"{shown(ast.unparse(node))} has {shown(twice[0])} twice: give each pattern once; the first that matches wins"
            )
        return {ast.literal_eval(key or node): _policy_value(value, text) for key, value in zip(node.keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def part_from(registry: Registry, value: Any) -> Part:
    """Returns a part, given an instance, a name with knobs ('topk(ratio=0.01)'), or a configuration ({'id': 'topk', 'ratio': 0.01})."""
    if isinstance(value, Part):
        expected = registry.kind
        if value.kind != expected:
            raise SpecSyntaxError(f"{value} is a {value.kind}, where a {expected} was expected")
        return value
    if value is None:
        return _made(registry, "none")
    if isinstance(value, str):
        return _part(registry, _expression(value), value)
    if isinstance(value, Mapping) and isinstance(value.get("id"), str):
        knobs = {k if isinstance(k, str) else shown(k): v for k, v in value.items() if k != "id"}
        return _made(registry, value["id"], (), knobs)
    raise SpecSyntaxError(
        f"a {registry.kind} must be a name, an instance or a dictionary with an 'id', got {shown(value)}{_no(registry, value)}"
    )


def _no(registry: Registry, value: Any) -> str:
    """Says what may be meant by a value that stands for nothing, such as YAML's `no`."""
    if not isinstance(value, (bool, int, float, list, tuple, Mapping)) or value:
        return ""
    return "; write 'none', or leave it out" if "none" in registry.names() else "; leave it out"


def part_knob(default: str, help: str) -> Any:
    """Declares a field that holds a compressor, given as an instance, a spec string or a configuration."""
    return made_knob(default, help, "a compressor", _compressor)


def communicator_knob(help: str) -> Any:
    """Declares a field that holds a communicator, given likewise, or None."""
    return made_knob(None, help, "a communicator or None", _communicator)


def _compressor(value: Any) -> Part:
    return part_from(compressors, value)


def _communicator(value: Any) -> Part | None:
    return None if value is None else part_from(communicators, value)
