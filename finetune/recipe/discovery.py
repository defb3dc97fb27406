"""Plug-ins, recipes and files: the folder is the registry, a file's name is the plug-in's name."""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from finetune.adapters.traits import Traits
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.renamed import renamed_stage
from finetune.recipe.settings import AdapterSettings
from finetune.recipe.terminal import command_line

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "shipped"
PROJECT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent
"""The folder with recipes/: the checkout, or a folder inside the package that a wheel installed."""

INSTALLED = _PACKAGE.parent
"""The folder with the packages: the checkout, or site-packages."""

STAGES = ("finetune.stages", "align.stages")
ADAPTERS = "finetune.adapters"
TEMPLATES = "data_templates"
ALIASES = {"coh": "chain_of_hindsight"}
"""Short names of stages on the command line."""

COMPRESSIONS = ("", ".gz", ".zst")
DATA_SUFFIXES = (
    *(name + end for name in (".json", ".jsonl", ".ndjson", ".csv", ".tsv") for end in COMPRESSIONS),
    ".parquet",
)
TEXT_SUFFIXES = tuple(name + end for name in (".txt", ".md") for end in COMPRESSIONS)


def plugin_names(package: str) -> list[str]:
    """Return the plug-ins of a package's folder in alphabetical order, without importing them.

    All modules are plug-ins but private ones and those that the package lists in ``SHARED``.
    """
    registry = importlib.import_module(package)
    shared = getattr(registry, "SHARED", ())
    names = (module.name for module in pkgutil.iter_modules(registry.__path__))
    return sorted(name for name in names if not name.startswith("_") and name not in shared)


def plugin_summary(package: str, name: str) -> str:
    """Return the first paragraph of a plug-in's docstring, parsed from its file without importing it."""
    # Parsed, not imported: `llm-align list` is fast, and one broken plug-in does not break it.
    spec = importlib.util.find_spec(f"{package}.{name}")
    assert spec is not None and spec.origin is not None, f"{package}.{name} is listed but has no file"
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def load_plugin(package: str, name: str, *, where: str) -> ModuleType:
    """Import ``package/name.py``.

    Args:
        package: the registry folder, as a package name.
        name: the requested plug-in.
        where: the recipe's key, for the message.

    Raises:
        UserError: there is no such file. Errors raised by an existing file are not caught.
    """
    # Listed names only: import_module would accept shared and private modules too.
    names = plugin_names(package)
    if name not in names:
        folder = package.replace(".", "/")
        raise UserError(
            Problem(where, f"'{name}' is unknown", f"{one_of(names)} ({folder}/)", did_you_mean(name, names))
        )
    return importlib.import_module(f"{package}.{name}")


def stage_names() -> dict[str, str]:
    """Return each stage's package, by stage name."""
    return {name: package for package in STAGES for name in plugin_names(package)}


def verb_of(stage: str) -> str:
    """Return a stage's command, its name with dashes."""
    return stage.replace("_", "-")


def stage_of_verb(verb: str) -> str:
    """Return the stage that a command or an alias names."""
    return ALIASES.get(verb, verb.replace("-", "_"))


def load_stage(name: str) -> ModuleType:
    """Import a stage's module.

    Raises:
        UserError: there is no such stage; the message lists those that exist.
    """
    known = stage_names()
    if name not in known:
        actual = renamed_stage(name) or f"'{name}' is unknown"
        raise UserError(Problem("stage", actual, one_of(known), did_you_mean(name, known)))
    return load_plugin(known[name], name, where="stage")


def adapter_traits(method: str) -> Traits:
    """Return an adapter's declared traits."""
    traits: Traits = load_plugin(ADAPTERS, method, where="adapter.method").TRAITS
    return traits


def adapter_settings(method: str) -> type[AdapterSettings]:
    """Return the settings that an adapter declares in its own file.

    Raises:
        UserError: there is no such adapter.
    """
    schema: type[AdapterSettings] = load_plugin(ADAPTERS, method, where="adapter.method").Settings
    return schema


def recipe_folders() -> list[Path]:
    """Return the folders with recipes: the user's ``./recipes`` first, then the shipped ones."""
    user_folder = Path.cwd() / "recipes"
    shipped = PROJECT / "recipes"
    return [folder for folder in dict.fromkeys([user_folder, shipped]) if folder.is_dir()]


def recipe_names(stage: str) -> dict[str, Path]:
    """Return a stage's recipes by name, from ``recipes/<stage>/*.yaml``; the user's take precedence."""
    # Reversed: of equal names the last one wins in the dict below, and that must be the user's.
    files = {
        file.stem: file for folder in reversed(recipe_folders()) for file in (folder / stage).glob("*.yaml")
    }
    # By name, not by file: "alpaca-prefix.yaml" sorts before "alpaca.yaml".
    return dict(sorted(files.items()))


def find_recipe(stage: str, name: str) -> Path:
    """Return a recipe's file, by name or path.

    Raises:
        UserError: there is none; the message lists the existing ones.
    """
    # A .json file may be a recipe: JSON is YAML.
    if name.endswith(DATA_SUFFIXES) and not name.endswith(".json"):
        raise UserError(Problem(name, "a data file", "a recipe's name or YAML file", f"--data {name}"))
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(Problem(name, "no such file", "a recipe's YAML file", _suggest_sibling(path)))
    known = recipe_names(stage)
    if name in known:
        return known[name]
    expected = one_of(sorted(known)) if known else f"a file of recipes/{stage}/ (empty), or a path"
    raise UserError(
        Problem(
            f"recipe '{name}'", f"stage {stage} has no such recipe", expected, _suggest_recipe(name, known)
        )
    )


def _suggest_recipe(name: str, known: dict[str, Path]) -> str:
    stages = [stage for stage in stage_names() if name in recipe_names(stage)]
    if stages:
        return f"stage {stages[0]} has one: {command_line(verb_of(stages[0]), name)}"
    return did_you_mean(name, known) or "see `llm-align list`, or give the path of a .yaml file"


def _suggest_sibling(path: Path) -> str:
    siblings = {file.stem: file for file in sorted(path.parent.glob("*.y*ml"))}
    if siblings:
        names = ", ".join(file.name for file in siblings.values())
        close = difflib.get_close_matches(path.stem, siblings, n=1)
        return f"did you mean '{siblings[close[0]]}'?" if close else f"{path.parent} contains {names}"
    return f"folder {path.parent} {'contains no .yaml file' if path.parent.is_dir() else 'does not exist'}"


def local_path(text: str) -> Path | None:
    """Return the existing path of ``text``, in the working directory or the project folder, or None."""
    for path in (Path(text).expanduser(), PROJECT / text):
        if path.exists():
            return path
    return None


def looks_local(text: str) -> bool:
    """Return True if ``text`` can only be a file or folder, and not a Hub id ``owner/name``."""
    known = (*DATA_SUFFIXES, *TEXT_SUFFIXES)
    return text.lower().endswith(known) or text.startswith((".", "/", "~")) or text.count("/") != 1
