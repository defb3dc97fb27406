"""Short names of base models, from ``recipes/bases.yaml``."""

from dataclasses import dataclass
from pathlib import Path

from finetune.recipe import yaml_file
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError, nearest, one_of

BASES = PROJECT / "recipes" / "bases.yaml"


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: its hub id or folder, its size in words, and what a user has to know."""

    id: str
    parameters: str
    note: str = ""


def bases() -> dict[str, Base]:
    """Return the table of short names."""
    content, _ = yaml_file.read(BASES)
    return {name: Base(**entry) for name, entry in content.items()}


def resolve_base(base: str) -> str:
    """Return the folder or the hub id that ``model.base`` stands for.

    Raises:
        UserError: it is neither a short name, nor a folder with a config.json, nor of the form ``owner/name``.
    """
    table = bases()
    name = table[base].id if base in table else base
    for folder in (Path(name), PROJECT / name):
        if folder.is_dir():
            return str(_checked_folder(folder))
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        found = f"'{base}' is no folder" if "/" in base else f"'{base}' is no short name and no folder"
        expected = f"{one_of(table)}; a hub id (owner/name); or a folder that holds config.json"
        raise UserError(Problem("model.base", found, expected, nearest(base, table)))
    return name


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        found = f"folder '{folder}' has no config.json"
        raise UserError(Problem("model.base", found, "a folder written by save_pretrained (config.json, weights, tokenizer)"))
    return folder
