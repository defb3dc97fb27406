"""Files that a user's Python file imports from its own folder, modules without executing them."""

import ast
import sys
from pathlib import Path

OWN_PACKAGES = ("data_templates", "finetune", "align")


def imported_modules(file: Path) -> set[str]:
    """Return the names of the top-level modules that a file imports, also inside functions."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError):  # reported by its import
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def local_modules(file: Path) -> list[Path]:
    """Return the files of a file's folder that it imports, directly or not, sorted; packages in full."""
    folder, modules, pending = file.parent, set[Path](), [file]
    while pending:
        for name in imported_modules(pending.pop()) - sys.stdlib_module_names - set(OWN_PACKAGES):
            package = folder / name
            files = [package.with_suffix(".py")] if package.with_suffix(".py").is_file() else []
            if (package / "__init__.py").is_file():
                files = list(package.rglob("*.py"))
            new = [path for path in files if path not in modules and path != file]
            modules |= set(new)
            pending += new
    return sorted(modules)
