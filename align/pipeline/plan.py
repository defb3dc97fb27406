"""Load a pipeline: all recipes are loaded and checked against each other before the first stage runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data_check import data_problems
from align.pipeline.entries import BASE_KEY, StageEntry, parse_entries
from align.pipeline.file import find_pipeline, read_pipeline
from finetune.data.files import data_fingerprint
from finetune.recipe import yaml_file
from finetune.recipe.bases import EMBEDDED_BASE, resolve_base
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.discovery import ADAPTERS, adapter_settings, adapter_traits, plugin_names
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.parent_run import SCORING_STAGES
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RUNS_FOLDER

REFERENCED_SECTIONS = ("model", "adapter", "rewards")
"""Sections whose values come from the stages that `from` and `reward` name."""


@dataclass(frozen=True)
class Pipeline:
    """A validated pipeline with its stages in execution order.

    Attributes:
        name: stem of its file.
        description: one-line description.
        entries: the stages.
        recipes: the recipe of each stage; runs of earlier stages are given by stage name.
        digest: 8 hex digits over all settings and data.
        notes: notes for the user.
        out: output folder in place of ``runs/<name>-<digest>``.
    """

    name: str
    description: str
    entries: Sequence[StageEntry]
    recipes: Mapping[str, Recipe]
    digest: str
    notes: Sequence[str] = ()
    out: Path | None = None

    @property
    def path(self) -> Path:
        """Return the pipeline's folder, which is separate from the stages' run folders."""
        return self.out or RUNS_FOLDER / f"{self.name}-{self.digest}"

    def to_yaml(self) -> str:
        """Return the pipeline with its overrides as YAML for `llm-align run`."""
        stages = {entry.name: _as_mapping(entry) for entry in self.entries}
        return yaml_file.dump_yaml({"description": self.description, "stages": stages}, {})


def resolve_pipeline(
    name: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> Pipeline:
    """Load a pipeline and all of its recipes; nothing runs and nothing is written.

    Args:
        name: name of a pipeline, or path of a YAML file.
        base: base model of the stages that start from one.
        out: output folder of the pipeline.
        overrides: overrides of the recipes' settings, ``{"sft.train.epochs": 3}``.
        arguments: the same as command-line arguments, ``sft.train.epochs=3``.

    Raises:
        UserError: all problems found.
    """
    path = find_pipeline(name)
    file_settings, line_numbers = read_pipeline(path)
    all_overrides, problems = _parse_overrides(overrides or {}, arguments)
    stages, notes = file_settings.stages, []
    section = "stages"
    if base not in (None, EMBEDDED_BASE) and file_settings.public is not None:
        stages, section = file_settings.public, "public"
        notes = [f"base {base}: using the stages of `public`; those of `stages` are for '{EMBEDDED_BASE}'"]
    entries, entry_problems = parse_entries(
        section, stages, file=path.name, line_numbers=line_numbers, overrides=all_overrides
    )
    entries = [_with_base(entry, base) for entry in entries]
    recipes, recipe_problems = _load_recipes(entries)
    # A generator is read once: the stages are loaded again before they run.
    entries = [entry.with_rows_of(recipes.get(entry.name)) for entry in entries]
    problems += [*entry_problems, *recipe_problems]
    if not problems:
        # Needs every recipe, so it waits until all are loaded.
        problems += _base_mismatches(entries, recipes)
    digest, unreadable = _pipeline_digest(entries, recipes)
    if problems and not unreadable:
        # All at once: the rows of the valid stages too.
        unreadable = row_problems(entries, recipes, dry_run=True)
    if problems or unreadable:
        raise UserError([*problems, *unreadable])
    description = " ".join(file_settings.description.split())
    return Pipeline(path.stem, description, entries, recipes, digest, notes, out)


def _parse_overrides(
    overrides: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    pairs = [argument.partition("=") for argument in arguments]
    expected = "STAGE.section.key=value, as in sft.train.epochs=3"
    problems = [
        Problem(f"'{key}' ({COMMAND_LINE})", "invalid override", expected)
        for key, equals, _ in pairs
        if not equals
    ]
    return {
        **overrides,
        **{key: yaml_file.parse_scalar(text) for key, equals, text in pairs if equals},
    }, problems


def _with_base(entry: StageEntry, base: str | None) -> StageEntry:
    """Return a stage with the user's base model, if it starts from a base."""
    if base is None or entry.init_from is not None or entry.origins.get(BASE_KEY) == COMMAND_LINE:
        return entry
    overrides, origins = {**entry.overrides, BASE_KEY: base}, {**entry.origins, BASE_KEY: COMMAND_LINE}
    return StageEntry(entry.name, entry.stage, entry.recipe, None, entry.rewards, overrides, origins)


def _load_recipes(entries: Sequence[StageEntry]) -> tuple[dict[str, Recipe], list[Problem]]:
    """Load each stage's recipe on top of the earlier ones, and collect the problems."""
    recipes: dict[str, Recipe] = {}
    problems: list[Problem] = []
    for entry in entries:
        # A stage whose reference is invalid is loaded without it, so that its own problems are found too.
        init_from = entry.init_from if entry.init_from in recipes else None
        rewards = {
            name: name for name in entry.rewards if name in recipes and recipes[name].stage in SCORING_STAGES
        }
        try:
            recipes[entry.name] = entry.load(init_from=init_from, rewards=rewards, pending=recipes)
        except UserError as error:
            is_complete = init_from == entry.init_from and len(rewards) == len(entry.rewards)
            problems += [
                problem for problem in error.problems if is_complete or not _may_follow(problem, entry)
            ]
    return recipes, problems


def _may_follow(problem: Problem, entry: StageEntry) -> bool:
    """Return True for a problem that a stage may have only because it was loaded without a reference."""
    key = problem.where.removeprefix(f"stage {entry.name}: ").partition(" ")[0].strip("'")
    section, _, name = key.partition(".")
    if section not in REFERENCED_SECTIONS:
        return False
    # Its own overrides are judged, but for keys of an adapter that may be the parent's.
    return key not in entry.overrides or (section == "adapter" and name in _adapter_keys())


def _adapter_keys() -> set[str]:
    """Return the keys of all adapters."""
    return {key for method in plugin_names(ADAPTERS) for key in adapter_settings(method).model_fields}


def row_problems(
    entries: Sequence[StageEntry], recipes: Mapping[str, Recipe], *, dry_run: bool = False
) -> list[Problem]:
    """Read the rows of all stages as their runs do, and return the problems, each with its stage's name.

    Args:
        entries: the stages whose rows are read.
        recipes: the recipe of each stage; stages without one are skipped.
        dry_run: read no more than the first rows of large files, and nothing of the Hub.
    """
    return [
        entry.with_stage_name(problem)
        for entry in entries
        if entry.name in recipes
        for problem in data_problems(recipes[entry.name], dry_run=dry_run)
    ]


def _base_mismatches(entries: Sequence[StageEntry], recipes: Mapping[str, Recipe]) -> list[Problem]:
    """Return a problem for each reward model on another base than the policy it scores."""
    problems: list[Problem] = []
    bases: dict[str, str] = {}
    for entry in entries:
        bases[entry.name] = _base_under_adapter(entry, recipes, bases)
        for name in entry.rewards:
            if bases[name] != bases[entry.name] and not _is_full_finetuning(recipes[name]):
                actual = f"'{name}' is based on {bases[name]}, this stage on {bases[entry.name]}"
                origin = entry.origins["rewards.sources"]
                where = f"stage {entry.name}: reward ({origin})"
                repair = "use the same base, or the same stage in `from`, for both"
                problems.append(Problem(where, actual, "the same base for policy and reward model", repair))
    return problems


def _base_under_adapter(entry: StageEntry, recipes: Mapping[str, Recipe], bases: Mapping[str, str]) -> str:
    """Return the base under a stage's adapter: a base model, or an earlier fully fine-tuned stage."""
    if entry.init_from is None:
        return resolve_base(recipes[entry.name].settings.model.base)
    return (
        f"stage {entry.init_from}"
        if _is_full_finetuning(recipes[entry.init_from])
        else bases[entry.init_from]
    )


def _is_full_finetuning(recipe: Recipe) -> bool:
    return adapter_traits(recipe.settings.adapter.method).full_finetuning


def _pipeline_digest(
    entries: Sequence[StageEntry], recipes: Mapping[str, Recipe]
) -> tuple[str, list[Problem]]:
    """Return 8 hex digits over the settings and data of all stages, and problems with unreadable data."""
    content: list[Any] = []
    problems: list[Problem] = []
    for entry in entries:
        if entry.name not in recipes:
            continue
        recipe = recipes[entry.name]
        try:
            data = data_fingerprint(recipe.settings.data)
        except UserError as error:
            problems += [entry.with_stage_name(problem) for problem in error.problems]
            continue
        # The resolved values and not the files: comments and the order of keys do not matter.
        content.append([entry.name, entry.stage, entry.rewards, recipe.values(), data])
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8], problems


def _as_mapping(entry: StageEntry) -> dict[str, Any]:
    """Return a stage as the mapping in a pipeline file."""
    is_path = "/" in entry.recipe or entry.recipe.endswith((".yaml", ".yml"))
    mapping: dict[str, Any] = {"recipe": entry.recipe if is_path else f"{entry.stage}/{entry.recipe}"}
    if entry.init_from is not None:
        mapping["from"] = entry.init_from
    if entry.rewards:
        mapping["reward"] = list(entry.rewards)
    return mapping | ({"set": dict(entry.overrides)} if entry.overrides else {})
