"""Every key has a reader: the package's sources are searched for ``cfg.A.B``, through local names and arguments too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pytest

import maskformer
from maskformer.config.compat import UNREAD
from maskformer.config.defaults import DEFAULTS
from maskformer.config.tree import flatten

PACKAGE = Path(maskformer.__file__).parent
READ = [key for key, _ in flatten(DEFAULTS)]
KEYS = frozenset([*READ, *UNREAD])
SECTIONS = frozenset(".".join(key.split(".")[:depth]) for key in KEYS for depth in range(len(key.split("."))))
ROOT = ""  # the section that holds all others

# (function or class, parameter) -> what calls pass to it
Passed = dict[tuple[str, str], set[str]]


class Bindings(NamedTuple):
    """What calls pass on: sections of the config, and texts that may name what is below one."""

    sections: Passed
    texts: Passed

    def __len__(self) -> int:
        return sum(map(len, (*self.sections.values(), *self.texts.values())))


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _texts(tree: ast.AST) -> dict[str, set[str]]:
    """Names that are assigned texts or tables of them, or loop over such a table, and those texts."""
    pairs = [(n.target, n.iter) for n in ast.walk(tree) if isinstance(n, (ast.For, ast.comprehension))]
    pairs += [(target, n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign) for target in n.targets]
    pairs += [(n.target, n.value) for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and n.value is not None]
    found: dict[str, set[str]] = defaultdict(set)
    for _ in range(2):  # first the tables, then the loops over a table that has a name
        for target, value in pairs:
            table = value.func.value if _is_items(value) else value
            if isinstance(table, ast.Name):
                texts = set(found[table.id])
            elif isinstance(table, (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict)):
                constants = [node.value for node in ast.walk(table) if isinstance(node, ast.Constant)]
                texts = {constant for constant in constants if isinstance(constant, str)}
            else:
                continue
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    found[name.id] |= texts
    return found


def _is_items(node: ast.AST) -> TypeGuard[Any]:
    """Whether a table's items, keys or values are taken."""
    method = node.func if isinstance(node, ast.Call) else None
    return isinstance(method, ast.Attribute) and method.attr in ("items", "keys", "values")


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
        self.texts = _texts(tree)
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
            return self._below(node.value, self._named(node.slice))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            return self._below(node.args[0], self._named(node.args[1]))
        if isinstance(node, ast.IfExp):
            return self.sections(node.body) | self.sections(node.orelse)
        return set()

    def _named(self, node: ast.AST) -> Iterable[object]:
        """Texts that an index may be."""
        if isinstance(node, ast.Constant):
            return [node.value]
        return self.texts.get(node.id, ()) if isinstance(node, ast.Name) else ()

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
        outer, outer_texts = dict(self.names), self.texts
        self.texts = dict(self.texts)
        called = self.owner if node.name == "__init__" else node.name
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            given = self.bindings.sections.get((called, argument.arg), set())
            texts = self.bindings.texts.get((called, argument.arg), set())
            self.texts[argument.arg] = self.texts.get(argument.arg, set()) | texts
            self.names[argument.arg] = given | ({ROOT} if argument.arg == "cfg" else set())
        self.generic_visit(node)
        self.texts = outer_texts
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
                self.bindings.sections[called, parameter] |= self.sections(value) & SECTIONS
            if parameter and isinstance(value, ast.Constant) and isinstance(value.value, str):
                self.bindings.texts[called, parameter].add(value.value)
        self.generic_visit(node)


def keys_read(sources: Iterable[str]) -> set[str]:
    """Keys that the sources read; repeated until no call passes a new section on."""
    trees = [ast.parse(source) for source in sources]
    parameters = {name: names for tree in trees for name, names in _parameters(tree).items()}
    bindings = Bindings(defaultdict(set), defaultdict(set))
    while True:
        before = len(bindings)
        keys = {key for tree in trees for key in Reader(tree, parameters, bindings).keys}
        if len(bindings) == before:
            return keys


def package_sources() -> list[str]:
    """All modules but the config's own, which name every key without using it, and those that Detectron2 calls.

    Detectron2 hands its config to what is registered in it; a key that is read there alone has no effect here.
    """
    others = (PACKAGE / "config", PACKAGE / "integrations" / "detectron2")
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.parent not in others)
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
    assert keys_read(["def f(cfg):\n return name(cfg, 'TEST')", "def name(cfg, k): return cfg.DATASETS[k]"]) == {
        "DATASETS.TEST"
    }
    table = "TABLE = {'GAMMA': 1}\ndef f(cfg):\n for key, least in TABLE.items(): print(cfg.SOLVER[key] < least)"
    assert keys_read([table]) == {"SOLVER.GAMMA"}
    # Through an argument of a function in another module, whatever its name there.
    assert keys_read(["def g(part): return part.CROP.TYPE", "def f(cfg): return g(cfg.INPUT)"]) == {"INPUT.CROP.TYPE"}
    assert keys_read(["class G:\n def __init__(self, s): s.GAMMA", "def f(cfg): G(s=cfg.SOLVER)"]) == {"SOLVER.GAMMA"}


def test_the_search_takes_nothing_else_for_a_read() -> None:
    assert (
        keys_read(["'SEED'", "def f(cfg):\n cfg.SEED = 1\n cfg.SOLVER\n cfg.NOTHING", "def f(other): other.SEED"])
        == set()
    )
    assert keys_read(["def f(cfg): s = cfg.SOLVER", "def g(s): s.GAMMA"]) == set()
    # A text anywhere in the module is not what an index stands for.
    assert keys_read(["print('GAMMA')\nOTHER = 'STEPS'\ndef f(cfg, key): return cfg.SOLVER[key]"]) == set()


def classes_with_a_config(sources: Iterable[str]) -> list[str]:
    """Classes that know a name ``cfg``, be it an argument, a variable or an attribute."""
    classes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [
        found.name
        for found in classes
        if any("cfg" in (getattr(node, field, None) for field in ("arg", "id", "attr")) for node in ast.walk(found))
    ]


def test_no_class_reads_a_config() -> None:
    # The predictor is a way in, as the commands are: it gets its config from the user.
    assert classes_with_a_config(package_sources()) == ["Predictor"], "let a build_* function read it"


@pytest.mark.parametrize("body", ["def __init__(self, cfg): pass", "def f(self): self.cfg.SEED", "size = cfg.SEED"])
def test_classes_with_a_config_are_found(body: str) -> None:
    assert classes_with_a_config([f"class A:\n {body}\nclass B:\n size = 1"]) == ["A"]
