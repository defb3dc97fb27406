"""The table of checks, read from the functions that make them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.docs.markdown import code, table

ROOT = Path(__file__).parents[2]
FILES = (
    *sorted((ROOT / "finetune/training/preflight").glob("*.py")),
    *sorted((ROOT / "align").rglob("*preflight*.py")),
    *(
        ROOT / "align" / name
        for name in ("rl/rewards/rewards.py", "rl/first_completions.py", "ppo/metrics.py")
    ),
    *(
        ROOT / "align" / name
        for name in ("preference/rows/row_checks.py", "engines/trl/dpo.py", "rejection/diagnostics.py")
    ),
    *(
        ROOT / "finetune/training" / name
        for name in ("stage.py", "fit.py", "save.py", "schedule.py", "merge.py")
    ),
)
RESULTS = ("CheckResult", "failed", "_check_agreement")
"""Calls whose first argument is the check's name on the terminal."""


def checks() -> str:
    """Return every check: its name on the terminal, what it verifies, and its code."""
    rows: dict[str, tuple[str, str, str]] = {}
    for file in FILES:
        for definition, names in _definitions(file):
            where = code(f"{file.relative_to(ROOT)}: {definition.name}")
            for name in names:
                # Several functions may report under one name; the one that verifies is the row.
                if name not in rows or definition.name.startswith("check_"):
                    rows[name] = (code(name), _sentence(definition), where)
    return table(("line", "verifies", "code"), rows.values())


def _definitions(file: Path) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, list[str]]]:
    """Yield the functions and classes that make results, with the names of these."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    for definition in _functions_and_checks(module.body):
        calls = (node for node in ast.walk(definition) if isinstance(node, ast.Call) and node.args)
        names = [
            constants.get(name.id) if isinstance(name, ast.Name) else getattr(name, "value", None)
            for name in (call.args[0] for call in calls if getattr(call.func, "id", "") in RESULTS)
        ]
        if any(names):
            yield definition, [str(name) for name in names if name]


def _functions_and_checks(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield functions, classes that are one check (``...Check``), and the methods of other classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.ClassDef) and node.name.endswith("Check")
        ):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions_and_checks(node.body)


def _sentence(definition: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the docstring's first sentence, as what holds: without `Check that`."""
    docstring = (ast.get_docstring(definition) or "").split("\n\n")[0].replace("``", "`")
    sentence = re.sub(r"^(Yield checks|Check(, [^,]*,)?)( that)? ", "", docstring)
    return sentence[0].upper() + sentence[1:]
