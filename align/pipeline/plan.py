"""Load a pipeline: all recipes are loaded and checked against each other before the first stage runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.default_recipe import EMBEDDED
from align.pipeline.entries import entries_of
from align.pipeline.entry import BASE, Entry
from align.pipeline.file import find_pipeline, read_pipeline
from finetune.data.files import data_fingerprint
from finetune.recipe import yaml_file
from finetune.recipe.bases import resolve_base
from finetune.recipe.checks import adapter_traits
from finetune.recipe.command_line import COMMAND_LINE
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import RUNS
from finetune.recipe.start import SCORERS


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
    entries: Sequence[Entry]
    recipes: Mapping[str, Recipe]
    digest: str
    notes: Sequence[str] = ()
    out: Path | None = None

    @property
    def path(self) -> Path:
        """Return the pipeline's folder, which is separate from the stages' run folders."""
        return self.out or RUNS / f"{self.name}-{self.digest}"

    def to_yaml(self) -> str:
        """Return the pipeline with its overrides as YAML for `llm-align run`."""
        stages = {entry.name: _plain(entry) for entry in self.entries}
        return yaml_file.write({"description": self.description, "stages": stages}, {})


def load_pipeline(
    name: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    words: Sequence[str] = (),
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
    found, lines = read_pipeline(path)
    given, problems = _given(changes or {}, words)
    chosen, notes = found.stages, []
    section = "stages"
    if base not in (None, EMBEDDED) and found.public is not None:
        chosen, section = found.public, "public"
        notes = [f"base {base}: using the stages of `public`; those of `stages` are for '{EMBEDDED}'"]
    entries, mistakes = entries_of(section, chosen, file=path.name, lines=lines, changes=given)
    entries = [_on_base(entry, base) for entry in entries]
    recipes, unfit = _recipes(entries)
    problems += [*mistakes, *unfit]
    if not problems:
        problems += _foundations(entries, recipes)
    digest, lost = _digest(entries, recipes)
    if problems or lost:
        raise UserError([*problems, *lost])
    description = " ".join(found.description.split())
    return Pipeline(path.stem, description, entries, recipes, digest, notes, out)


def _given(changes: Mapping[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    pairs = [word.partition("=") for word in words]
    expected = "STAGE.section.key=value, as in sft.train.epochs=3"
    problems = [
        Problem(f"'{key}' ({COMMAND_LINE})", "invalid override", expected)
        for key, equals, _ in pairs
        if not equals
    ]
    return {**changes, **{key: yaml_file.scalar(text) for key, equals, text in pairs if equals}}, problems


def _on_base(entry: Entry, base: str | None) -> Entry:
    """Return a stage with the user's base model, if it starts from a base."""
    if base is None or entry.start is not None or entry.origins.get(BASE) == COMMAND_LINE:
        return entry
    given, origins = {**entry.given, BASE: base}, {**entry.origins, BASE: COMMAND_LINE}
    return Entry(entry.name, entry.stage, entry.recipe, None, entry.rewards, given, origins)


def _recipes(entries: Sequence[Entry]) -> tuple[dict[str, Recipe], list[Problem]]:
    """Load each stage's recipe on top of the earlier ones, and collect the problems."""
    recipes: dict[str, Recipe] = {}
    problems: list[Problem] = []
    for entry in entries:
        # A stage whose reference is invalid is loaded without it, so that its own problems are found too.
        start = entry.start if entry.start in recipes else None
        rewards = {name: name for name in entry.rewards if name in recipes and recipes[name].stage in SCORERS}
        try:
            recipes[entry.name] = entry.load(start=start, rewards=rewards, pending=recipes)
        except UserError as error:
            problems += error.problems
    return recipes, problems


def _foundations(entries: Sequence[Entry], recipes: Mapping[str, Recipe]) -> list[Problem]:
    """Return a problem for each reward model on another base than the policy it scores."""
    problems: list[Problem] = []
    ground: dict[str, str] = {}
    for entry in entries:
        ground[entry.name] = _ground(entry, recipes, ground)
        for name in entry.rewards:
            if ground[name] != ground[entry.name] and not _whole(recipes[name]):
                found = f"'{name}' is based on {ground[name]}, this stage on {ground[entry.name]}"
                place = entry.origins["reward.sources"]
                where = f"stage {entry.name}: reward ({place})"
                repair = "use the same base, or the same stage in `from`, for both"
                problems.append(Problem(where, found, "the same base for policy and reward model", repair))
    return problems


def _ground(entry: Entry, recipes: Mapping[str, Recipe], ground: Mapping[str, str]) -> str:
    """Return the base under a stage's adapter: a base model, or an earlier fully fine-tuned stage."""
    if entry.start is None:
        return resolve_base(recipes[entry.name].settings.model.base)
    return f"stage {entry.start}" if _whole(recipes[entry.start]) else ground[entry.start]


def _whole(recipe: Recipe) -> bool:
    return adapter_traits(recipe.settings.adapter.method).whole_model


def _digest(entries: Sequence[Entry], recipes: Mapping[str, Recipe]) -> tuple[str, list[Problem]]:
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
            problems += [entry.placed(problem) for problem in error.problems]
            continue
        content.append([entry.name, entry.stage, entry.rewards, recipe.values(), data])
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8], problems


def _plain(entry: Entry) -> dict[str, Any]:
    """Return a stage as the mapping in a pipeline file."""
    path = "/" in entry.recipe or entry.recipe.endswith((".yaml", ".yml"))
    said: dict[str, Any] = {"recipe": entry.recipe if path else f"{entry.stage}/{entry.recipe}"}
    if entry.start is not None:
        said["from"] = entry.start
    if entry.rewards:
        said["reward"] = list(entry.rewards)
    return said | ({"set": dict(entry.given)} if entry.given else {})
