"""The folder is the registry: plug-ins and recipes are found by the names of their files."""

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from finetune.recipe.errors import Problem, UserError, nearest, one_of

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that holds recipes/: the checkout, or site-packages when installed from a wheel."""


def plugin_names(package: str) -> list[str]:
    """Return the public modules of a package's folder, in alphabetical order; nothing is imported but the package."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load_plugin(package: str, name: str, *, where: str) -> ModuleType:
    """Import ``package/name.py``.

    Args:
        package: the folder that serves as the registry, as a package name.
        name: the plug-in that the user asked for.
        where: the recipe key that named it, for the message.

    Raises:
        UserError: there is no such file. An error inside an existing file is left as it is.
    """
    names = plugin_names(package)
    if name not in names:
        folder = package.replace(".", "/")
        raise UserError(Problem(where, f"'{name}' is unknown", one_of(names) + f" ({folder}/)", nearest(name, names)))
    return importlib.import_module(f"{package}.{name}")


def recipe_folders() -> list[Path]:
    """Return the folders that hold recipes: the user's own ``./recipes`` first, then the shipped ones."""
    own = Path.cwd() / "recipes"
    shipped = PROJECT / "recipes"
    return [folder for folder in dict.fromkeys([own, shipped]) if folder.is_dir()]


def recipe_names(stage: str) -> dict[str, Path]:
    """Return the recipes of a stage by name, from ``recipes/<stage>/*.yaml``."""
    files = [file for folder in reversed(recipe_folders()) for file in sorted((folder / stage).glob("*.yaml"))]
    return {file.stem: file for file in files}


def find_recipe(stage: str, name: str) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        UserError: there is none; the message lists those that exist.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if path.is_file():
            return path
        raise UserError(Problem(name, "no such file", "a recipe's YAML file", _relative_hint(path)))
    known = recipe_names(stage)
    if name in known:
        return known[name]
    hint = nearest(name, known) or f"`llm-align list` shows all; a path to a .yaml file works too (recipes/{stage}/)"
    raise UserError(Problem(f"recipe '{name}'", f"stage {stage} has no such recipe", one_of(sorted(known)), hint))


def _relative_hint(path: Path) -> str:
    siblings = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    if siblings:
        return nearest(path.name, [file.name for file in siblings]) or f"{path.parent} holds {siblings[0].name}"
    return f"folder {path.parent} {'holds no .yaml file' if path.parent.is_dir() else 'does not exist'}"
