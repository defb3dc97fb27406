"""Load and validate a recipe: YAML and overrides to typed settings with the origin of each value."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from finetune.recipe import command_line, yaml_file
from finetune.recipe.command_line import COMMAND_LINE, Origins, SectionValues
from finetune.recipe.discovery import (
    ADAPTERS,
    PROJECT,
    adapter_settings,
    find_recipe,
    load_stage,
    plugin_names,
    stage_names,
    verb_of,
)
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.foreign_names import foreign_problem, foreign_stage
from finetune.recipe.limits import mark_limits
from finetune.recipe.parent_run import (
    ParentRun,
    inherit_settings,
    is_recipe_name,
    parent_from_recipe,
    parent_from_run,
)
from finetune.recipe.python_rows import PythonRows
from finetune.recipe.renamed import renamed_section, renamed_stage, section_problem
from finetune.recipe.rules import cross_field_problems
from finetune.recipe.runs import ROWS_FOLDER, is_stored_rows, read_run_record, run_of_recipe
from finetune.recipe.settings import AdapterSettings, Section, StageSettings

DEFAULT_ORIGIN = "default"
ROWS_MARK = "rows"
"""Stands for rows that were given in Python in the digest of a recipe: the fingerprint has their contents."""
SettingsT = TypeVar("SettingsT", bound=StageSettings, default=StageSettings, covariant=True)
"""The settings of a stage; a bare ``Recipe`` is a recipe of any stage."""


@dataclass(frozen=True)
class Recipe(Generic[SettingsT]):
    """A validated recipe: stage, typed settings, the origin of each value, and the output folder."""

    stage: str
    name: str
    description: str
    settings: SettingsT
    origins: Origins
    out: Path | None = None
    notes: list[str] = field(default_factory=list)
    run: Path | None = None
    """The run whose recipe.yaml this is."""

    def values(self) -> SectionValues:
        """Return all settings as plain sections; rows given in Python are summarized by a digest."""
        return self.settings.model_dump(mode="json")

    def digest(self, data_fingerprint: str) -> str:
        """Return the 8 hex digits of the run's name: same settings and same data, same name.

        Args:
            data_fingerprint: digest of the contents of all rows, of the parent run and of other runs used;
                their paths and names are not part of it.
        """
        content = self.values()
        init_from = self.settings.model.init_from
        # After full tuning the parent run is the base; its content is in the fingerprint, not its path.
        if init_from is not None and content["model"]["base"] == init_from:
            content["model"]["base"] = None
        _drop_undigested(self.settings, content)
        return _values_digest([self.stage, content, data_fingerprint])[:8]

    def to_yaml(self, derived: dict[str, str] | None = None) -> str:
        """Return the resolved recipe with origins as comments; ``derived``: reasons of values set by auto."""
        # Sections have an origin too, but comments go to the lines of keys.
        keys = {key: origin for key, origin in self.origins.items() if "." in key}
        comments = {(key.split(".")[0], key.split(".", 1)[1]): origin for key, origin in keys.items()}
        for key, choice in (derived or {}).items():
            section, name = key.split(".", 1)
            comments[section, name] += f"; planner: {choice}"
        head = {"stage": self.stage, "description": self.description}
        return yaml_file.dump_yaml({**head, **self.values()}, comments)


def read_recipe(
    stage: str,
    name: str,
    *,
    shortcuts: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    ancestors: tuple[str, ...] = (),
    pending: Mapping[str, Recipe] | None = None,
) -> Recipe:
    """Load a recipe.

    Args:
        stage: the stage that will run it, a file of a ``stages/`` folder.
        name: a recipe's name, or the path of a YAML file.
        shortcuts: ``{"model.base": "tiny"}``: values of --base, --data and --adapter, or from Python.
        overrides: ``section.key=value`` arguments of the command line.
        out: the run directory, if not the default one.
        ancestors: the recipes whose ``model.init_from`` led to this one, each ``stage/recipe``.
        pending: recipes that are not run yet, by the name that ``model.init_from`` uses for them.

    Raises:
        UserError: with every error that was found.
    """
    schema = stage_settings(stage)
    path = find_recipe(stage, name)
    content, lines = yaml_file.read_yaml(path)
    run = run_of_recipe(path)
    if run is not None:
        content = _with_run_files(content, run)
    origins = {".".join(key): f"{path.name}:{line}" for key, line in lines.items()}
    values, problems = _split_sections(content, schema, stage=stage, path=path)
    overridden, override_problems = command_line.parse_overrides(shortcuts or {}, overrides, schema=schema)
    notes = command_line.apply_overrides(values, origins, overrides=overridden, schema=schema)
    parent_notes, parent_problems = _inherit_from_parent(
        values, origins, stage=stage, out=out, ancestors=ancestors, pending=pending or {}
    )
    sections, section_problems = _validate_sections(values, schema)
    # Defaults stand in for invalid sections, so that cross-field checks of the valid ones still run.
    settings = schema(**sections)
    all_origins = _all_origins(settings, origins)
    settings = mark_limits(settings, partial(_is_limit, path=path, run=run, origins=all_origins))
    problems += [*parent_problems, *section_problems, *cross_field_problems(stage, settings, sections)]
    if problems or override_problems:
        raise UserError([*(problem.with_origin(origins) for problem in problems), *override_problems])
    description = " ".join(str(content.get("description") or "").split())
    name = str(read_run_record(run)["recipe"]) if run is not None else path.stem
    return Recipe(stage, name, description, settings, all_origins, out, notes + parent_notes, run)


def _is_limit(key: str, *, path: Path, run: Path | None, origins: Origins) -> bool:
    """Return whether nobody typed a number: it is a default, or that of a shipped recipe.

    Args:
        key: ``section.key``.
        path: the recipe's file.
        run: the run whose recipe this is; it has recorded which numbers were limits.
        origins: of all values.
    """
    origin = origins.get(key, DEFAULT_ORIGIN)
    if run is not None and origin != COMMAND_LINE:
        return key in read_run_record(run).get("limits", [])
    is_shipped = path.resolve().is_relative_to(PROJECT / "recipes")
    return origin == DEFAULT_ORIGIN or (is_shipped and origin.startswith(f"{path.name}:"))


def _with_run_files(content: Any, run: Path) -> Any:
    """Return a run's recipe with the paths of its own rows, which it names relative to its folder."""
    if isinstance(content, dict):
        return {key: _with_run_files(value, run) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_run_files(value, run) for value in content]
    is_rows = isinstance(content, str) and content.startswith(f"{ROWS_FOLDER}/")
    return str(run / content) if is_rows and (run / content).is_file() else content


def stage_settings(stage: str) -> type[StageSettings]:
    """Return the schema of a stage's recipe, declared in the stage's own file.

    Raises:
        UserError: there is no such stage.
    """
    schema: type[StageSettings] = load_stage(stage).Settings
    return schema


def _inherit_from_parent(
    values: SectionValues,
    origins: Origins,
    *,
    stage: str,
    out: Path | None,
    ancestors: tuple[str, ...],
    pending: Mapping[str, Recipe],
) -> tuple[list[str], list[Problem]]:
    """Inherit the settings of the parent run (``model.init_from``); return notes and problems."""
    text = values.get("model", {}).get("init_from")
    if not isinstance(text, str) or not text:
        return [], []
    try:
        parent = _resolve_parent(text, stage=stage, ancestors=ancestors, pending=pending)
    except UserError as error:
        return [], error.problems
    # The run would overwrite the weights that it starts from.
    if out is not None and Path(parent.name).resolve() == out.resolve():
        actual = f"{out}, the folder of the parent run (model.init_from)"
        return [], [Problem("--out", actual, "another folder", "omit --out, or choose another folder")]
    return inherit_settings(values, origins, parent)


def _resolve_parent(
    text: str, *, stage: str, ancestors: tuple[str, ...], pending: Mapping[str, Recipe]
) -> ParentRun:
    if text in pending:
        return parent_from_recipe(text, pending[text].stage, pending[text].settings, stage=stage)
    if not is_recipe_name(text):
        return parent_from_run(text, stage=stage)
    if text in ancestors:
        chain = " -> ".join([*ancestors, text])
        raise UserError(
            Problem(
                "model.init_from", f"circular: {chain}", "a chain of parent runs that ends at a base model"
            )
        )
    parent_stage, _, name = text.partition("/")
    recipe = read_recipe(parent_stage, name, ancestors=(*ancestors, text))
    return parent_from_recipe(text, parent_stage, recipe.settings, stage=stage)


def _all_origins(settings: StageSettings, origins: Origins) -> Origins:
    keys = [f"{section}.{key}" for section, values in settings.model_dump().items() for key in values]
    return {key: origins.get(key, DEFAULT_ORIGIN) for key in keys}


def _split_sections(
    content: dict[str, Any], schema: type[StageSettings], *, stage: str, path: Path
) -> tuple[SectionValues, list[Problem]]:
    """Split a file's content into sections; report top-level keys that are no section."""
    problems: list[Problem] = []
    values: SectionValues = {}
    for key, value in content.items():
        if key in schema.model_fields and isinstance(value, dict):
            # Merged: a section under its old name may have filled this one already.
            values[key] = {**values.get(key, {}), **value}
        elif new := renamed_section(key, schema.model_fields):
            problems.append(section_problem(key, key, "", new))
            values[new] = {**values.get(new, {}), **value} if isinstance(value, dict) else {}
        elif key == "stage":
            problems += _check_stage(value, stage, path=path)
        elif key != "description":
            problems.append(_unknown_section(key, value, schema=schema))
    return values, problems


def _check_stage(value: Any, stage: str, *, path: Path) -> list[Problem]:
    if value == stage:
        return []
    if renamed := renamed_stage(value):
        return [Problem("stage", renamed, f"stage: {stage}")]
    if foreign := foreign_stage(value):
        repair = f"write stage: {foreign}; llm-align {verb_of(foreign)} {path}"
        return [Problem("stage", f"`{value}` is `{foreign}` here", f"stage '{stage}'", repair)]
    repair = (
        f"llm-align {verb_of(value)} {path}"
        if value in stage_names()
        else f"write stage: {stage}, or delete the line"
    )
    return [
        Problem(
            "stage", f"the recipe is for stage {yaml_file.format_value(value)}", f"stage '{stage}'", repair
        )
    ]


def _unknown_section(key: str, value: Any, *, schema: type[StageSettings]) -> Problem:
    known = schema.model_fields
    sections = one_of(["stage", "description", *known])
    foreign = foreign_problem(key, key, value, expected=sections, schema=schema)
    # axolotl's `adapter: lora` is a key, with the name of a section.
    if foreign is not None and (key not in known or value is not None):
        return foreign
    if key not in known:
        return Problem(key, "unknown section", sections, did_you_mean(key, known))
    if value is None:
        return Problem(key, "empty section", "indented keys", f"indent the lines below, or delete `{key}:`")
    names = ", ".join(known[key].annotation.model_fields)  # type: ignore[union-attr]  # every field is a section
    return Problem(key, f"found {yaml_file.format_value(value)}", f"a section with the indented keys {names}")


def _validate_sections(
    values: SectionValues, schema: type[StageSettings]
) -> tuple[dict[str, Any], list[Problem]]:
    """Validate the sections with pydantic; return the valid ones, and the problems of the others."""
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, field_info in schema.model_fields.items():
        section = values.get(name, {})
        model: Any = field_info.annotation
        try:
            # The schema of this section depends on its own key `method`.
            if name == "adapter":
                model = _adapter_schema(section)
            sections[name] = model.model_validate(section)
        except UserError as error:
            problems += error.problems
        except ValidationError as error:
            problems += validation_problems(name, error, model=model, stage=schema)
    return sections, problems


def _adapter_schema(section: dict[str, Any]) -> type[AdapterSettings]:
    method = section.get("method", AdapterSettings().method)
    if not isinstance(method, str):
        actual = f"found {yaml_file.format_value(method)}"
        raise UserError(
            Problem(
                "adapter.method", actual, f"{one_of(plugin_names(ADAPTERS))} ({ADAPTERS.replace('.', '/')}/)"
            )
        )
    return adapter_settings(method)


def _drop_undigested(settings: Section, content: dict[str, Any]) -> None:
    """Remove what does not affect the run's name from a section and its nested sections."""
    for key, value in settings:
        if isinstance(value, Section):
            _drop_undigested(value, content[key])
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    _drop_undigested(item, content[key][index])
        elif key in settings.ROW_SOURCES and is_given_rows(value):
            content[key] = ROWS_MARK
    for key in settings.NOT_IN_DIGEST:
        content.pop(key)


def is_given_rows(source: Any) -> bool:
    """Return True for rows that were given in Python, also when they are read from the run's copy."""
    return isinstance(source, PythonRows) or (isinstance(source, str) and is_stored_rows(Path(source)))


def _values_digest(content: Any) -> str:
    # sort_keys: the order of keys in a recipe is not part of a run's name.
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
