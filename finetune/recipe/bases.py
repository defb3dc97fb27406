"""Short names of base models, from ``recipes/bases.yaml``."""

import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.recipe import yaml_file
from finetune.recipe.checkpoint_folder import (
    ADAPTER_CONFIG,
    MERGED,
    RUN_FILE,
    is_checkpoint,
    last_checkpoint,
    model_folder,
    outdated_merge,
)
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.peft_folder import is_peft_folder
from finetune.recipe.terminal import command_line

EMBEDDED_BASE = "tiny"
"""The base that comes with llm-align."""
BASES = PROJECT / "recipes" / "bases.yaml"


@dataclass(frozen=True, slots=True)
class Base:
    """A base model: its Hub id or folder, its parameter count as text, and a note."""

    id: str
    parameters: str
    note: str = ""


@cache  # a run asks five times, and the file comes with the package
def load_bases() -> dict[str, Base]:
    """Return the table of short names."""
    content, _ = yaml_file.read_yaml(BASES)
    return {name: Base(**entry) for name, entry in content.items()}


def resolve_base(base: str) -> str:
    """Resolve ``model.base`` to a folder or a Hub id.

    A run's folder resolves to its model: ``model/`` after full tuning, or ``merged/``.

    Raises:
        UserError: it is neither a short name, nor a folder with a config.json, nor a run with a model, nor
            ``owner/name``.
    """
    table = load_bases()
    name = table[base].id if base in table else base
    # A folder wins over a Hub id of the same form (owner/name).
    for folder in (Path(name).expanduser(), PROJECT / name):
        if folder.is_dir():
            return str(_check_model_folder(folder))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(_unknown_base_problem(base, table))
    return name


RUNS_FOLDER = Path("runs")


def _unknown_base_problem(base: str, table: dict[str, Base]) -> Problem:
    if base in table:
        actual = f"'{base}' is the folder {table[base].id}, which does not exist"
        return Problem("model.base", actual, "the folder shipped with llm-align", "reinstall llm-align")
    if (RUNS_FOLDER / base / RUN_FILE).is_file():
        folder = RUNS_FOLDER / base
        further = f"--from {shlex.quote(base)} continues from it"
        expected = f"a model; {folder} works as one if it has model/ or merged/"
        return Problem("model.base", f"'{base}' is a run", expected, further)
    actual = f"'{base}' is not a folder" if "/" in base else f"'{base}' is neither a short name nor a folder"
    examples = ", ".join(list(table)[:3])
    expected = f"a short name ({examples}, ...), a Hub id (owner/name), or a folder with config.json"
    repair = did_you_mean(base, table) or f"`llm-align list bases` lists all {len(table)} short names"
    return Problem("model.base", actual, expected, repair)


def _check_model_folder(folder: Path) -> Path:
    if (folder / RUN_FILE).is_file():
        return _model_of_run(folder)
    if not (folder / "config.json").is_file():
        actual = f"folder '{folder}' has no config.json"
        expected = "a folder written by save_pretrained (config.json, weights, tokenizer)"
        raise UserError(Problem("model.base", actual, expected, _adapter_hint(folder)))
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(foreign_adapter(str(folder), folder / ADAPTER_CONFIG))
    return folder


def foreign_adapter(base: str, config: Path) -> Problem:
    """Return the problem of a base that comes with an adapter, which transformers would load silently."""
    try:
        name = str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):  # damaged, or without the key
        name = "unknown"
    actual = f"'{base}' has an adapter ({ADAPTER_CONFIG}) next to its config.json"
    repair = f"the adapter's own base is '{name}': use that, or merge the adapter into it and use the result"
    return Problem(
        "model.base", actual, "a model without an adapter: transformers would add it silently", repair
    )


def _model_of_run(run: Path) -> Path:
    models = [run / name for name in ("model", MERGED) if (run / name / "config.json").is_file()]
    if models and models[0].name == MERGED and (difference := outdated_merge(run)):
        as_it_is = f"--base {shlex.quote(str(models[0]))} takes it as it is"
        repair = f"`{command_line('merge', run)}` renews it; {as_it_is}"
        raise UserError(Problem("model.base", f"run '{run}': {difference}", "the weights of the run", repair))
    if models:
        return models[0]
    expected = "a run with a model: model/ (after full tuning) or merged/"
    if (run / "adapter").is_dir():
        actual = f"run '{run}' has an adapter, but no merged model"
        further = f"`--from {shlex.quote(str(run))}` trains its adapter further"
        repair = f"{further}; `{command_line('merge', run)}` makes a base of it"
        raise UserError(Problem("model.base", actual, expected, repair))
    repair = f"`--from {shlex.quote(str(run))}` continues from its last checkpoint"
    last = last_checkpoint(run)
    if last is not None and model_folder(last) is not None:
        repair += f"; --base {shlex.quote(str(last))} takes that as the base"
    raise UserError(Problem("model.base", f"run '{run}' has no model yet", expected, repair))


def _adapter_hint(folder: Path) -> str:
    if is_peft_folder(folder) or is_checkpoint(folder):
        further = f"--from {shlex.quote(str(folder))} trains it further"
        return f"it is an adapter: {further}, `{command_line('merge', folder)}` makes a model"
    if (folder / ADAPTER_CONFIG).is_file():
        return f"it is an adapter: merge it first ({command_line('merge', folder.parent)})"
    children = sorted(child.parent.name for child in folder.glob("*/config.json"))
    return f"did you mean '{folder / children[0]}'?" if children else ""
