"""The lengths that CONTRIBUTING.md allows."""

from __future__ import annotations

import ast
from pathlib import Path

import maskformer

PACKAGE = Path(maskformer.__file__).parent
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def test_functions_and_files_are_short() -> None:
    too_long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        name = path.relative_to(PACKAGE)
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            too_long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    too_long.append(f"{name}: {node.name} has {length} lines")
    assert too_long == []
