"""Every key has a reader: the package's sources are searched for ``cfg.A.B``, through local names and arguments too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import maskformer
from maskformer.config.compat import UNREAD
from maskformer.config.defaults import DEFAULTS
from maskformer.config.tree import flatten

PACKAGE = Path(maskformer.__file__).parent
READ = [key for key, _ in flatten(DEFAULTS)]
KEYS = frozenset([*READ, *UNREAD])
SECTIONS = frozenset(".".join(key.split(".")[:depth]) for key in KEYS for depth in range(len(key.split("."))))
ROOT = ""  # the section that holds all others

# (function or class, parameter) -> sections that calls pass to it
Bindings = dict[tuple[str, str], set[str]]


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _parameters(tree: ast.AST) -> dict[str, list[str]]:
    """Positional parameters of every function, and of a class's ``__init__`` under the name of the class."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                    found[node.name] = [argument.arg for argument in child.args.args[1:]]
    return found


class Reader(ast.NodeVisitor):
    """Collects the keys that one module reads, and the sections that it passes on."""

    def __init__(self, tree: ast.Module, parameters: Mapping[str, list[str]], bindings: Bindings) -> None:
        self.parameters = parameters
        self.bindings = bindings
        self.constants = _constants(tree)
        self.names: dict[str, set[str]] = {"cfg": {ROOT}}
        self.owner = ""
        self.keys: set[str] = set()
        self.visit(tree)

    def sections(self, node: ast.AST | None) -> set[str]:
        """Dotted names that an expression may stand for, sections and keys alike; empty if it is no config."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            if node.attr == "cfg" or ast.unparse(node) in self.names:
                return self.names.get(ast.unparse(node), {ROOT})
            return self._below(node.value, [node.attr])
        if isinstance(node, ast.Subscript):
            known = isinstance(node.slice, ast.Constant)
            return self._below(node.value, [node.slice.value] if known else self.constants)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            known = isinstance(node.args[1], ast.Constant)
            return self._below(node.args[0], [node.args[1].value] if known else self.constants)
        if isinstance(node, ast.IfExp):
            return self.sections(node.body) | self.sections(node.orelse)
        return set()

    def _below(self, node: ast.AST, names: Iterable[object]) -> set[str]:
        below = {_join(section, str(name)) for section in self.sections(node) for name in names}
        return below & (KEYS | SECTIONS)

    def visit(self, node: ast.AST) -> None:
        """Note what the node reads, then look inside."""
        if not isinstance(getattr(node, "ctx", None), ast.Store):
            self.keys |= self.sections(node) & KEYS
        super().visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, (ast.Name, ast.Attribute)) and self.sections(value) & SECTIONS:
                    self.names[ast.unparse(name)] = self.sections(value) & SECTIONS

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if self.sections(node.value) & SECTIONS:
            self.names[ast.unparse(node.target)] = self.sections(node.value) & SECTIONS

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.owner, outer = node.name, self.owner
        self.generic_visit(node)
        self.owner = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.names)
        called = self.owner if node.name == "__init__" else node.name
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            given = self.bindings.get((called, argument.arg), set())
            self.names[argument.arg] = given | ({ROOT} if argument.arg == "cfg" else set())
        self.generic_visit(node)
        # self.solver = cfg.SOLVER in one method is read in others.
        self.names = {**outer, **{name: value for name, value in self.names.items() if name.startswith("self.")}}

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        parameters = self.parameters.get(called, [])
        offset = 1 if parameters[:1] == ["self"] else 0
        passed = [
            *zip(parameters[offset:], node.args, strict=False),
            *((word.arg, word.value) for word in node.keywords),
        ]
        for parameter, value in passed:
            if parameter and self.sections(value) & SECTIONS:
                self.bindings[called, parameter] |= self.sections(value) & SECTIONS
        self.generic_visit(node)


def keys_read(sources: Iterable[str]) -> set[str]:
    """Keys that the sources read; repeated until no call passes a new section on."""
    trees = [ast.parse(source) for source in sources]
    parameters = {name: names for tree in trees for name, names in _parameters(tree).items()}
    bindings: Bindings = defaultdict(set)
    while True:
        before = sum(map(len, bindings.values()))
        keys = {key for tree in trees for key in Reader(tree, parameters, bindings).keys}
        if sum(map(len, bindings.values())) == before:
            return keys


def package_sources() -> list[str]:
    """All modules but the config's own, which name every key without using it."""
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "config")
    return [path.read_text() for path in files]


def test_every_key_is_read() -> None:
    unread = sorted(set(READ) - keys_read(package_sources()))
    assert unread == [], "read them, or list them in maskformer/config/compat.py"


def test_keys_without_effect_are_not_read() -> None:
    read = sorted(set(UNREAD) & keys_read(package_sources()))
    assert read == [], "they have an effect now: move them from compat.py to defaults.py"


def test_the_search_finds_reads() -> None:
    assert keys_read(["def f(cfg): return cfg.SEED"]) == {"SEED"}
    assert keys_read(["def f(cfg):\n a = cfg.SOLVER\n b, c = a.AMP, a\n return b.ENABLED, c.GAMMA"]) == {
        "SOLVER.AMP.ENABLED",
        "SOLVER.GAMMA",
    }
    assert keys_read(
        ["class A:\n def __init__(self, cfg): self.s = cfg.SOLVER\n def f(self): return self.s.STEPS"]
    ) == {"SOLVER.STEPS"}
    assert keys_read(["class A:\n def f(self): return self.cfg.TEST.AUG.FLIP"]) == {"TEST.AUG.FLIP"}
    assert keys_read(["def f(cfg):\n for name in ('TRAIN',): print(cfg.DATASETS[name], cfg['SEED'])"]) == {
        "DATASETS.TRAIN",
        "SEED",
    }
    # Through an argument of a function in another module, whatever its name there.
    assert keys_read(["def g(part): return part.CROP.TYPE", "def f(cfg): return g(cfg.INPUT)"]) == {"INPUT.CROP.TYPE"}
    assert keys_read(["class G:\n def __init__(self, s): s.GAMMA", "def f(cfg): G(s=cfg.SOLVER)"]) == {"SOLVER.GAMMA"}


def test_the_search_takes_nothing_else_for_a_read() -> None:
    assert (
        keys_read(["'SEED'", "def f(cfg):\n cfg.SEED = 1\n cfg.SOLVER\n cfg.NOTHING", "def f(other): other.SEED"])
        == set()
    )
    assert keys_read(["def f(cfg): s = cfg.SOLVER", "def g(s): s.GAMMA"]) == set()
