"""Imports point one way: each room may import those before it, never those after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import maskformer

PACKAGE = Path(maskformer.__file__).parent

# What each room may import besides itself.
BASIS = {"errors", "structures", "config", "device", "timing", "pickles", "writing"}
EVALUATION = {"evaluation", "visualization"}
BELOW_ENGINE = BASIS | {"distributed", "data", "modeling", "checkpoint", "build"} | EVALUATION
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "device": {"errors"},
    "timing": set(),
    "pickles": set(),
    "writing": {"errors"},
    "distributed": {"errors"},
    "structures": {"errors"},
    "config": {"errors"},
    "data": BASIS | {"distributed"},
    "modeling": BASIS,
    "checkpoint": BASIS | {"data", "modeling"},
    "build": BASIS | {"distributed", "data", "modeling", "checkpoint"},
    "visualization": BASIS | {"data", "modeling", "checkpoint", "build"},
    "evaluation": BASIS | {"distributed", "data", "modeling", "checkpoint", "build", "visualization"},
    "engine": BELOW_ENGINE,
    "predictor": BELOW_ENGINE,
    "preflight": BELOW_ENGINE,
    "export": BELOW_ENGINE,
    "analysis": BELOW_ENGINE | {"engine"},
}
# Commands and integrations may import every room; nothing imports them, but commands each other and integrations.
TOP = {"analyze", "cli", "convert", "demo", "score", "integrations", "model_zoo"}
# The package itself only names its version and looks its public names up when they are asked for.
PACKAGE_ROOM = ""


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, str]:
    """Dotted module name below the package -> source text."""
    return {_module(path, root): path.read_text() for path in sorted(root.rglob("*.py"))}


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(node: ast.AST, deferred: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether each runs only later, inside a function; those for types alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, deferred
        elif _for_types_only(child):
            for branch in child.orelse:  # type: ignore[attr-defined]
                yield from _statements(branch, deferred)
        else:
            inner = deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _statements(child, inner)


def _targets(node: ast.Import | ast.ImportFrom, module: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        is_package = any(other.startswith(f"{module}.") for other in modules)
        parts = ["maskformer", *module.split(".")]
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, node.module] if node.module else parts)
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        if name == "maskformer" or name.startswith("maskformer."):
            target = name.removeprefix("maskformer").removeprefix(".")
            # "from maskformer.errors import UserError" names a thing inside a module.
            while target and target not in modules:
                target = target.rpartition(".")[0]
            yield target


def edges(modules: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(importing module, imported module, only inside a function)."""
    for module, text in modules.items():
        for node, deferred in _statements(ast.parse(text), False):
            for target in _targets(node, module, modules):
                yield module, target, deferred


def wrong_directions(modules: Mapping[str, str]) -> list[str]:
    """Imports against the order of the rooms, also those inside functions."""
    wrong = []
    for module, target, _ in edges(modules):
        room, other = module.split(".")[0], target.split(".")[0]
        if room == other or other == PACKAGE_ROOM or room in TOP | {PACKAGE_ROOM}:
            allowed = other != "integrations" or room in TOP
        elif room not in ALLOWED:
            allowed = False
        else:
            allowed = other in ALLOWED[room]
        if not allowed:
            wrong.append(f"{module or 'maskformer'} imports {target}")
    return wrong


def cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import each other while being imported, first one repeated at the end; empty if there are none."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, target, deferred in edges(modules):
        # A package's own __init__ is always imported before its modules: no edge to a module's ancestors.
        if not deferred and target != module and not module.startswith(f"{target}.") and target:
            graph[module].add(target)
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            found = search(target, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    for module in graph:
        found = search(module, [])
        if found:
            return found
    return []


def test_rooms_import_only_what_comes_before_them() -> None:
    assert wrong_directions(sources(PACKAGE)) == []


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(sources(PACKAGE)) == []


def test_every_room_has_its_place() -> None:
    rooms = {module.split(".")[0] for module in sources(PACKAGE)} - {PACKAGE_ROOM}
    assert rooms - ALLOWED.keys() - TOP == set()


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


GOOD = {
    "": "",
    "errors": "",
    "structures": "from maskformer.errors import UserError",
    "data": "",
    "data.io": "from maskformer.structures import SegmentMap",
    "modeling": "",
    "modeling.net": "import maskformer.structures\nfrom . import parts",
    "modeling.parts": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from maskformer.data.io import Sample",
    "integrations": "from maskformer.engine import main",
    "convert": "from maskformer.integrations import x",
    "engine": "",
    "engine.main": "",
}


def test_a_good_package_passes() -> None:
    assert wrong_directions(GOOD) == []
    assert cycle(GOOD) == []


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("modeling.net", "from maskformer.data.io import read", "modeling.net imports data.io"),
        ("modeling.net", "def f():\n    import maskformer.data", "modeling.net imports data"),
        ("data.io", "from maskformer import modeling", "data.io imports modeling"),
        ("data.io", "from ..engine.main import run", "data.io imports engine.main"),
        ("engine.main", "from maskformer.integrations import x", "engine.main imports integrations"),
        ("structures", "import maskformer.modeling.net as net", "structures imports modeling.net"),
        ("new_room", "import maskformer.errors", "new_room imports errors"),
    ],
)
def test_a_planted_wrong_direction_is_found(module: str, text: str, message: str) -> None:
    assert wrong_directions({**GOOD, module: text}) == [message]


def test_a_planted_cycle_is_found() -> None:
    planted = {**GOOD, "modeling.parts": "from maskformer.modeling.net import Net"}
    assert set(cycle(planted)) == {"modeling.net", "modeling.parts"}
    # Inside a function the import runs later, when both modules are there.
    assert cycle({**GOOD, "modeling.parts": "def f():\n    from maskformer.modeling.net import Net"}) == []
