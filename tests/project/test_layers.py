"""Tests the layers: which folder of the package may import which, over all imports, also type-only and function-local ones."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import grace_ext

ROOT = Path(grace_ext.__file__).parent
#: The folders and files ("rooms") from the lowest layer up. Each may import those before it in this list, and itself.
ROOMS = (
    "_version", "errors",                                            # basics
    "parts", "arrays", "privacy",
    "compressors", "memories", "communicators",                      # parts
    "composition", "exchange", "policies", "driver",                 # from parts to a step
    "checkpoints", "planning", "metrics",                            # services
    "local", "frameworks", "cluster", "integrations",                # ways to run
    "studies", "attacks",                                            # whole trainings, and attacks on them
    "papers", "cli", "testing", "resize", "__init__", "__main__",    # entry points, and claims of papers
)  # fmt: skip
#: Rooms that may import less than the order allows.
NARROWER = {
    "parts": {"errors"},
    "arrays": {"errors", "parts"},
    "privacy": {"errors", "parts", "arrays"},
    "compressors": {"errors", "parts", "arrays"},
    "memories": {"errors", "parts", "arrays", "compressors"},
    "exchange": {"errors", "parts", "arrays", "compressors", "memories", "communicators"},
    "integrations": {"errors", "composition", "checkpoints", "frameworks"},
}
#: The modules of the parts' rooms that these rooms may import: bases and forms, but no single part.
BASES = {"exchange": ("base", "fast_path", "forms"), "memories": ("base", "fast_path")}
#: Allowed exceptions: (module, module that it imports): reason.
EXCEPTIONS = {
    ("frameworks.selfcheck", "cli.selfcheck"): "the former name of the command, which job scripts use",
    ("cli.selfcheck", "__init__"): "the command runs a job that uses the package as users do",
    **{
        (f"testing.{name}", "__init__"): "plug-in authors test the package as users see it"
        for name in ("checks", "compressors", "memories", "communicators", "policies", "worlds")
    },
}
#: Modules that are imported by name: the importing module. A test imports each once.
BY_NAME = {
    "frameworks.torch.adapter": "composition.grace: Grace.bind",
    "frameworks.tensorflow.adapter": "composition.grace: Grace.bind",
    "frameworks.torch.ops": "arrays.libraries",
    "frameworks.tensorflow.ops": "arrays.libraries",
    "arrays.numpy": "arrays.libraries",
    "planning.auto": "parts.registry: policies that live in other rooms",
}
#: The modules that call importlib.import_module: this test cannot see other imports by name.
CALLERS = {"composition.grace", "arrays.libraries", "arrays.kernels", "parts.registry", "planning.models", "testing"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """Returns the modules of the package that this one imports, anywhere in its code."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            own = [name.name for name in node.names if name.name.startswith("grace_ext")]
            found |= {name.removeprefix("grace_ext").lstrip(".") or "__init__" for name in own}
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
    assert len(ROOMS) <= 27
    for narrow, wide in NARROWER.items():
        assert wide < set(ROOMS[: ROOMS.index(narrow)]) | {"_version"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_imported_from_above(module):
    mine = room(module)
    below = NARROWER.get(mine, set(ROOMS[: ROOMS.index(mine)]) - {"__init__"}) | {mine}
    for other in imports(module):
        if (module, other) not in EXCEPTIONS:
            assert room(other) in below, f"{module} imports {other}, but {mine} is a lower layer than {room(other)}: see ROOMS in this file"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) in BASES))
def test_what_carries_parts_knows_no_single_one(module):
    for other in imports(module):
        if room(other) in ("compressors", "memories", "communicators") and room(other) != room(module):
            assert other.split(".")[1:2] and other.split(".")[1] in BASES[room(module)], f"{module} imports the part {other}"


def test_exceptions_and_names_are_in_use():
    """Unused exceptions and names would hide the next mistake."""
    for module, other in EXCEPTIONS:
        assert other in imports(module), f"{module} does not import {other} any more: take it out of EXCEPTIONS"
    callers = {m for m, path in MODULES.items() if "import_module(" in path.read_text()}
    assert callers == CALLERS


def test_no_file_is_in_a_circle():
    """No modules import each other in a cycle (Tarjan's algorithm over all imports, also type-only and function-local ones)."""
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
    """A file holds one idea in at most 400 lines, except the driver, whose algorithm is in one place."""
    long = {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 400 and m != "driver.driver"}
    assert long == {}
