"""The table of checks, read from the functions that make them."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tools.docs.markdown import code, table

ROOT = Path(__file__).parents[2]
FILES = (
    *sorted((ROOT / "finetune/training/preflight").glob("*.py")),
    *sorted((ROOT / "align").rglob("*preflight*.py")),
)


def checks() -> str:
    """Return every check: what it verifies, and the file with its code."""
    rows = [
        (code(function.name), _sentence(function), code(str(file.relative_to(ROOT))))
        for file in FILES
        for function in _check_functions(file)
    ]
    return table(("check", "verifies", "code"), rows)


def _check_functions(file: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
            yield node


def _sentence(function: ast.FunctionDef) -> str:
    docstring = (ast.get_docstring(function) or "").split("\n\n")[0]
    return docstring.replace("``", "`").removeprefix("Check that ").removeprefix("Check ")
