"""Load and validate a recipe: YAML and overrides to typed settings with the origin of each value."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.recipe import command_line, yaml_file
from finetune.recipe.checks import contradictions
from finetune.recipe.command_line import Origins, Values
from finetune.recipe.discovery import (
    ADAPTERS,
    find_recipe,
    load_plugin,
    load_stage,
    plugin_names,
    stage_names,
)
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.settings import AdapterSettings, Section, StageSettings
from finetune.recipe.start import Start, is_recipe, lay_over, start_of_recipe, start_of_run
from finetune.recipe.wording import problems_of

DEFAULT = "default"


@dataclass(frozen=True)
class Recipe:
    """A validated recipe: stage, typed settings, the origin of each value, and the output folder."""

    stage: str
    name: str
    description: str
    settings: StageSettings
    origins: Origins
    out: Path | None = None
    notes: list[str] = field(default_factory=list)

    def values(self) -> Values:
        """Return all settings as plain sections; rows passed from Python are summarized by a digest."""
        content = self.settings.model_dump(mode="json")
        rows = content["data"]["source"]
        if isinstance(rows, list):
            content["data"]["source"] = f"<{len(rows)} rows given in Python, {_sha(rows)[:16]}>"
        return content

    def digest(self, data_fingerprint: str) -> str:
        """Return the 8 hex digits of the run's name: same settings and same data, same name.

        Args:
            data_fingerprint: digest of the contents of the data, of the parent run and of other runs used;
                their paths and names are not part of it.
        """
        content = self.values()
        start = self.settings.model.start
        # After full tuning the parent run is the base; its content is in the fingerprint, not its path.
        if start is not None and content["model"]["base"] == start:
            content["model"]["base"] = None
        _forget_places(self.settings, content)
        return _sha([self.stage, content, data_fingerprint])[:8]

    def to_yaml(self, derived: dict[str, str] | None = None) -> str:
        """Return the resolved recipe with origins as comments; ``derived``: reasons of values set by auto."""
        keys = {key: origin for key, origin in self.origins.items() if "." in key}
        comments = {(key.split(".")[0], key.split(".", 1)[1]): origin for key, origin in keys.items()}
        for key, choice in (derived or {}).items():
            section, name = key.split(".", 1)
            comments[section, name] += f"; planner: {choice}"
        head = {"stage": self.stage, "description": self.description}
        return yaml_file.write({**head, **self.values()}, comments)


def load(
    stage: str,
    name: str,
    *,
    shortcuts: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    above: tuple[str, ...] = (),
    pending: Mapping[str, Recipe] | None = None,
) -> Recipe:
    """Load a recipe.

    Args:
        stage: the stage that will run it, a file of a ``stages/`` folder.
        name: a recipe's name, or the path of a YAML file.
        shortcuts: ``{"model.base": "tiny"}``: values of --base, --data and --adapter, or from Python.
        overrides: ``section.key=value`` arguments of the command line.
        out: the run directory, if not the default one.
        ancestors: the recipes whose ``model.start`` led to this one, each ``stage/recipe``.
        pending: recipes that are not run yet, by the name that ``model.start`` uses for them.

    Raises:
        UserError: with every error that was found.
    """
    schema = stage_settings(stage)
    path = find_recipe(stage, name)
    content, lines = yaml_file.read(path)
    origins = {".".join(key): f"{path.name}:{line}" for key, line in lines.items()}
    values, problems = _sections(content, schema, stage=stage, path=path)
    words, misunderstood = command_line.parse(shortcuts or {}, overrides, schema=schema)
    notes = command_line.override(values, origins, words=words)
    begun, unfit = _begin(values, origins, stage=stage, out=out, above=above, pending=pending or {})
    sections, mistakes = _validate(values, schema)
    # Defaults stand in for invalid sections, so that cross-field checks of the valid ones still run.
    settings = schema(**sections)
    problems += [*unfit, *mistakes, *contradictions(settings, sections)]
    if problems or misunderstood:
        raise UserError([*(problem.placed(origins) for problem in problems), *misunderstood])
    description = " ".join(str(content.get("description") or "").split())
    return Recipe(
        stage, path.stem, description, settings, _all_origins(settings, origins), out, notes + begun
    )


def stage_settings(stage: str) -> type[StageSettings]:
    """Return the schema of a stage's recipe, declared in the stage's own file.

    Raises:
        UserError: there is no such stage.
    """
    schema: type[StageSettings] = load_stage(stage).Settings
    return schema


def adapter_settings(method: str) -> type[AdapterSettings]:
    """Return the settings that an adapter declares in its own file.

    Raises:
        UserError: there is no such adapter.
    """
    schema: type[AdapterSettings] = load_plugin(ADAPTERS, method, where="adapter.method").Settings
    return schema


def _begin(
    values: Values,
    origins: Origins,
    *,
    stage: str,
    out: Path | None,
    above: tuple[str, ...],
    pending: Mapping[str, Recipe],
) -> tuple[list[str], list[Problem]]:
    """Inherit the settings of the parent run (``model.start``); return notes and problems."""
    text = values.get("model", {}).get("start")
    if not isinstance(text, str) or not text:
        return [], []
    try:
        start = _found_start(text, stage=stage, above=above, pending=pending)
    except UserError as error:
        return [], error.problems
    # The run would overwrite the weights that it starts from.
    if out is not None and Path(start.name).resolve() == out.resolve():
        found = f"{out}, the folder of the parent run (model.start)"
        return [], [Problem("--out", found, "another folder", "omit --out, or choose another folder")]
    return lay_over(values, origins, start)


def _found_start(text: str, *, stage: str, above: tuple[str, ...], pending: Mapping[str, Recipe]) -> Start:
    if text in pending:
        return start_of_recipe(text, pending[text].stage, pending[text].settings, stage=stage)
    if not is_recipe(text):
        return start_of_run(text, stage=stage)
    if text in above:
        way = " -> ".join([*above, text])
        raise UserError(
            Problem("model.start", f"circular: {way}", "a chain of parent runs that ends at a base model")
        )
    first, _, name = text.partition("/")
    recipe = load(first, name, above=(*above, text))
    return start_of_recipe(text, first, recipe.settings, stage=stage)


def _all_origins(settings: StageSettings, origins: Origins) -> Origins:
    keys = [f"{section}.{key}" for section, values in settings.model_dump().items() for key in values]
    return {key: origins.get(key, DEFAULT) for key in keys}


def _sections(
    content: dict[str, Any], schema: type[StageSettings], *, stage: str, path: Path
) -> tuple[Values, list[Problem]]:
    """Split a file's content into sections; report top-level keys that are no section."""
    problems, values = [], {}
    for key, value in content.items():
        if key in schema.model_fields and isinstance(value, dict):
            values[key] = dict(value)
        elif key == "stage":
            problems += _other_stage(value, stage, path=path)
        elif key != "description":
            problems.append(_no_section(key, value, schema=schema))
    return values, problems


def _other_stage(value: Any, stage: str, *, path: Path) -> list[Problem]:
    if value == stage:
        return []
    repair = (
        f"llm-align {value} {path}" if value in stage_names() else f"write stage: {stage}, or delete the line"
    )
    return [Problem("stage", f"the recipe is for stage {yaml_file.shown(value)}", f"stage '{stage}'", repair)]


def _no_section(key: str, value: Any, *, schema: type[StageSettings]) -> Problem:
    known = schema.model_fields
    if key not in known:
        return Problem(key, "unknown section", one_of(["stage", "description", *known]), nearest(key, known))
    if value is None:
        return Problem(key, "empty section", "indented keys", f"indent the lines below, or delete `{key}:`")
    names = ", ".join(known[key].annotation.model_fields)  # type: ignore[union-attr]  # every field is a section
    return Problem(key, f"found {yaml_file.shown(value)}", f"a section with the indented keys {names}")


def _validate(values: Values, schema: type[StageSettings]) -> tuple[dict[str, Any], list[Problem]]:
    """Validate the sections with pydantic; return the valid ones, and the problems of the others."""
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, field_info in schema.model_fields.items():
        given = values.get(name, {})
        model: Any = field_info.annotation
        try:
            # The schema of this section depends on its own key `method`.
            if name == "adapter":
                model = _adapter_model(given)
            sections[name] = model.model_validate(given)
        except UserError as error:
            problems += error.problems
        except ValidationError as error:
            problems += problems_of(name, error, model=model)
    return sections, problems


def _adapter_model(given: dict[str, Any]) -> type[AdapterSettings]:
    method = given.get("method", AdapterSettings().method)
    if not isinstance(method, str):
        found = f"found {yaml_file.shown(method)}"
        raise UserError(
            Problem(
                "adapter.method", found, f"{one_of(plugin_names(ADAPTERS))} ({ADAPTERS.replace('.', '/')}/)"
            )
        )
    return adapter_settings(method)


def _forget_places(settings: Section, content: dict[str, Any]) -> None:
    """Remove the keys that do not affect the run's name from a section and its nested sections."""
    for key, value in settings:
        if isinstance(value, Section):
            _forget_places(value, content[key])
        elif isinstance(value, list):
            for number, part in enumerate(value):
                if isinstance(part, Section):
                    _forget_places(part, content[key][number])
    for key in settings.PLACES:
        content.pop(key)


def _sha(content: Any) -> str:
    # sort_keys: the order of keys in a recipe is not part of a run's name.
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
