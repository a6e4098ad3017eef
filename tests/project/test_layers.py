"""The house: which room may import which, held against every import of the package, type-only and function-local ones included."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import grace_ext

ROOT = Path(grace_ext.__file__).parent
#: The rooms from the ground up. Each may import what stands above it in this list, and within itself.
ROOMS = (
    "_version", "errors",                                            # the ground
    "parts", "arrays",
    "compressors", "memories", "communicators",                      # the shelves
    "composition", "exchange", "policies", "driver",                 # the machine
    "checkpoints", "planning", "metrics",                            # services
    "local", "frameworks", "cluster",                                # worlds
    "cli", "testing", "resize", "__init__", "__main__",              # outside
)  # fmt: skip
#: Narrower than the order says.
NARROWER = {
    "parts": {"errors"},
    "arrays": {"errors", "parts"},
    "compressors": {"errors", "parts", "arrays"},
    "memories": {"errors", "parts", "arrays", "compressors"},
    "exchange": {"errors", "parts", "arrays", "compressors", "memories", "communicators"},
}
#: Of the rooms below, what those above may use is their bases and forms, not one part of them.
BASES = {"exchange": ("base", "fast_path", "forms"), "memories": ("base", "fast_path")}
#: (module, module that it imports): why.
EXCEPTIONS = {
    ("frameworks.selfcheck", "cli.selfcheck"): "the former name of the command, which job scripts use",
    ("cli.selfcheck", "__init__"): "a job that uses the package as its users do",
    ("testing.contract", "__init__"): "what a plugin's author tests is the package as its users see it",
    ("testing.worlds", "__init__"): "what a plugin's author tests is the package as its users see it",
}
#: Modules that are imported by name, and by what. Each is imported once below.
BY_NAME = {
    "frameworks.torch.adapter": "composition.grace: Grace.bind",
    "frameworks.tensorflow.adapter": "composition.grace: Grace.bind",
    "frameworks.torch.ops": "arrays.libraries",
    "frameworks.tensorflow.ops": "arrays.libraries",
    "arrays.numpy": "arrays.libraries",
    "planning.auto": "parts.registry: the policies of other rooms",
}
#: Where importlib.import_module is called: all else that is imported by name would be unseen here.
CALLERS = {"composition.grace", "arrays.libraries", "arrays.kernels", "parts.registry", "planning.models"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of the package that this one imports, anywhere in it."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.removeprefix("grace_ext").lstrip(".") or "__init__" for name in node.names if name.name.startswith("grace_ext")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif node.module and node.module.split(".")[0] == "grace_ext":
                base = []
            else:
                continue
            where = [*base, *(node.module or "").removeprefix("grace_ext").lstrip(".").split(".")] if node.module else base
            where = [name for name in where if name]
            for name in node.names:
                whole = ".".join([*where, name.name])
                found.add(whole if whole in MODULES else ".".join(where) or "__init__")
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_table_names_every_room_and_each_exists():
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert len(ROOMS) <= 25
    for narrow, wide in NARROWER.items():
        assert wide < set(ROOMS[: ROOMS.index(narrow)]) | {"_version"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_imported_from_above(module):
    mine = room(module)
    below = NARROWER.get(mine, set(ROOMS[: ROOMS.index(mine)]) - {"__init__"}) | {mine}
    for other in imports(module):
        if (module, other) not in EXCEPTIONS:
            assert room(other) in below, f"{module} imports {other}, and {mine} stands below {room(other)}: see ROOMS in this file"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) in BASES))
def test_what_carries_parts_knows_no_single_one(module):
    for other in imports(module):
        if room(other) in ("compressors", "memories", "communicators") and room(other) != room(module):
            assert other.split(".")[1:2] and other.split(".")[1] in BASES[room(module)], f"{module} imports the part {other}"


def test_exceptions_and_names_are_in_use():
    """What the tables allow and nobody needs would hide the next mistake."""
    for module, other in EXCEPTIONS:
        assert other in imports(module), f"{module} does not import {other} any more: take it out of EXCEPTIONS"
    callers = {m for m, path in MODULES.items() if "import_module(" in path.read_text()}
    assert callers == CALLERS


def test_no_file_is_in_a_circle():
    """Tarjan's algorithm over all imports, type-only and function-local ones included."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []
    edges = {module: {other for other in imports(module) if other in MODULES} for module in MODULES}

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            circle, stack[at:] = stack[at:], []
            if len(circle) > 1:
                circles.append(sorted(circle))

    for module in sorted(MODULES):
        if module not in index:
            visit(module)
    assert circles == []


@pytest.mark.parametrize("module", sorted(BY_NAME))
def test_what_is_imported_by_name_can_be(module):
    if "torch" in module:
        pytest.importorskip("torch")
    if "tensorflow" in module:
        pytest.importorskip("horovod.tensorflow")
    importlib.import_module(f"grace_ext.{module}")
    where = BY_NAME[module].partition(":")[0]
    assert f'"grace_ext.{module}"' in MODULES[where].read_text(), f"{where} does not name {module}"


def test_no_file_is_long():
    """One idea a file; the driver's argument is in one place."""
    long = {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400 and m != "driver.driver"}
    assert long == {}
