"""Short names of base models, from ``recipes/bases.yaml``."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.recipe import yaml_file
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError, nearest

BASES = PROJECT / "recipes" / "bases.yaml"


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: its hub id or folder, its size in words, and what a user has to know."""

    id: str
    parameters: str
    note: str = ""


@cache  # a run asks five times, and the file comes with the package
def bases() -> dict[str, Base]:
    """Return the table of short names."""
    content, _ = yaml_file.read(BASES)
    return {name: Base(**entry) for name, entry in content.items()}


def resolve_base(base: str) -> str:
    """Return the folder or the hub id that ``model.base`` stands for.

    A run's folder stands for the model that it holds: ``model/`` after full tuning, or ``merged/``.

    Raises:
        UserError: it is neither a short name, nor a folder with a config.json, nor a run that holds a model,
            nor ``owner/name``.
    """
    table = bases()
    name = table[base].id if base in table else base
    for folder in (Path(name).expanduser(), PROJECT / name):
        if folder.is_dir():
            return str(_checked_folder(folder))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(_unknown(base, table))
    return name


def _unknown(base: str, table: dict[str, Base]) -> Problem:
    if base in table:
        found = f"'{base}' stands for the folder {table[base].id}, which does not exist"
        return Problem("model.base", found, "the folder that comes with llm-align", "install llm-align again")
    found = f"'{base}' is no folder" if "/" in base else f"'{base}' is neither a short name nor a folder"
    some = ", ".join(list(table)[:3])
    expected = f"a short name ({some}, ...), a hub id (owner/name), or a folder that holds config.json"
    repair = nearest(base, table) or f"`llm-align list bases` shows all {len(table)} short names"
    return Problem("model.base", found, expected, repair)


def _checked_folder(folder: Path) -> Path:
    if (folder / "run.json").is_file():
        return _model_of_run(folder)
    if not (folder / "config.json").is_file():
        found = f"folder '{folder}' has no config.json"
        expected = "a folder written by save_pretrained (config.json, weights, tokenizer)"
        raise UserError(Problem("model.base", found, expected, _adapter_hint(folder)))
    return folder


def _model_of_run(run: Path) -> Path:
    held = [run / name for name in ("model", "merged") if (run / name / "config.json").is_file()]
    if held:
        return held[0]
    expected = "a run that holds a model: model/ (after full tuning) or merged/"
    if (run / "adapter").is_dir():
        found = f"run '{run}' holds an adapter, and no model of its own yet"
        raise UserError(Problem("model.base", found, expected, f"llm-align merge {run}"))
    raise UserError(Problem("model.base", f"run '{run}' holds no model yet", expected, "finish it first"))


def _adapter_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"it holds an adapter: make a model of it first (llm-align merge {folder.parent})"
    children = sorted(child.parent.name for child in folder.glob("*/config.json"))
    return f"did you mean '{folder / children[0]}'?" if children else ""
