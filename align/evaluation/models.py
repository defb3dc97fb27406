"""The models of ``llm-align compare``: runs, finished or not, and evaluations of bases."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from align.evaluation.answers import held_out_results
from finetune.evaluation.results import EVALUATION_FILE, Evaluation, SuiteResult, load_evaluation
from finetune.recipe import yaml_file
from finetune.recipe.differences import differing_settings, flat_settings
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import (
    RECIPE_FILE,
    RUNS_FOLDER,
    find_run,
    list_runs,
    read_run_record,
    refuse_outdated,
)
from finetune.training.atomic_files import read_jsonl
from finetune.training.run_directory import EVALUATION, METRICS

SEED = "train.seed"
NOTHING = "–"
"""Cell of a model without the figure or the setting."""
EXPECTED = "two or more runs, or folders that `llm-align eval` has written"


@dataclass(frozen=True)
class ComparedModel:
    """A run or an evaluation of a base.

    Attributes:
        letter: its name in tables: A, B, ...
        name: the folder's name, or the base's.
        folder: the run directory, or the folder of the evaluation.
        record: run.json; {} of a base.
        recipe: the resolved recipe; {} of a base.
        logged: metrics.jsonl.
        suites: results of its evaluation.
        held_out: grades of held-out prompts after training, as results of suites.
    """

    letter: str
    name: str
    folder: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    logged: Sequence[Mapping[str, Any]] = ()
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)
    held_out: Mapping[str, SuiteResult] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Return the run's status, ``base`` of a base."""
        return str(self.record.get("status", "base"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the recipe's settings by ``section.key``."""
        return flat_settings(self.recipe)

    def setting_text(self, key: str) -> str:
        """Return a setting as a text, a dash where the model has no such setting."""
        value = self.settings.get(key, NOTHING)
        return value if isinstance(value, str) else yaml_file.format_value(value)

    @property
    def seed(self) -> int | None:
        """Return the training seed, None of a base."""
        seed: int | None = self.settings.get(SEED)
        return seed

    @property
    def steps(self) -> int:
        """Return the last logged step."""
        return max((int(entry["step"]) for entry in self.logged), default=0)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of a logged metric."""
        return [(int(entry["step"]), float(entry[metric])) for entry in self.logged if metric in entry]


def load_models(names: Sequence[str]) -> tuple[list[ComparedModel], list[str]]:
    """Return the models of some names, and notes on names that match several runs.

    Raises:
        UserError: fewer than two, no such run, a damaged one, or the same one twice; all of them at once.
    """
    problems: list[Problem] = []
    models: list[ComparedModel] = []
    notes: list[str] = []
    for name in names:
        try:
            folder, note = _find_folder(name)
            letter = ascii_uppercase[len(models) % len(ascii_uppercase)]
            models.append(_load(letter, folder))
            notes += [note] if note else []
        except UserError as error:
            problems += error.problems
    folders = [model.folder.resolve() for model in models]
    for index, model in enumerate(models):
        if folders.index(folders[index]) < index:
            problems.append(Problem("RUN", f"{model.name} is named twice", "different runs"))
    if len(names) < 2:
        actual = f"only {names[0]}" if names else "none"
        problems.append(Problem("RUN", actual, EXPECTED, "`llm-align list runs` shows their names"))
    if len(names) > len(ascii_uppercase):
        problems.append(Problem("RUN", f"{len(names)} runs", f"at most {len(ascii_uppercase)}"))
    if problems:
        raise UserError(problems)
    return models, notes


def _find_folder(name: str) -> tuple[Path, str]:
    """Return the folder of a run of any status, or of an evaluation, and a note if several runs match."""
    for path in (Path(name).expanduser(), RUNS_FOLDER / name, RUNS_FOLDER / f"eval-{name}"):
        if (path / "run.json").is_file() or (path / EVALUATION_FILE).is_file():
            return path, ""
    prefix = name.removeprefix(f"{RUNS_FOLDER}/")
    matches = [run for run in list_runs() if run.path.name.startswith(prefix) and not run.damage]
    if not matches:
        return find_run(name, where="RUN", recipes=False)  # its message names similar runs
    newest = max(matches, key=lambda run: str(run.record.get("started", "")))
    note = f"'{name}' matches {len(matches)} runs; using the newest: {newest.path}"
    return newest.path, note if len(matches) > 1 else ""


def _load(letter: str, folder: Path) -> ComparedModel:
    record = read_run_record(folder)
    refuse_outdated(str(folder), record)
    if not record:
        evaluation = load_evaluation(folder)
        return ComparedModel(letter, evaluation.model, folder, suites=evaluation.suites)
    evaluated = folder / EVALUATION
    evaluation = (
        load_evaluation(evaluated) if (evaluated / EVALUATION_FILE).is_file() else Evaluation("", {}, {})
    )
    recipe = yaml_file.read_yaml(folder / RECIPE_FILE)[0] if (folder / RECIPE_FILE).is_file() else {}
    return ComparedModel(
        letter,
        folder.resolve().name,
        folder,
        record,
        recipe,
        read_jsonl(folder / METRICS),
        evaluation.suites,
        held_out_results(folder),
    )


def settings_that_differ(models: Sequence[ComparedModel]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: key -> value of each model, None where it has none."""
    keys = differing_settings([model.recipe for model in models if model.recipe])
    return {key: [model.settings.get(key) for model in models] for key in keys}


def same_recipe(models: Iterable[ComparedModel]) -> list[list[ComparedModel]]:
    """Return the groups of two or more runs whose recipes differ in the seed alone, or not at all."""
    groups: list[list[ComparedModel]] = []
    for model in models:
        group = next((group for group in groups if _is_same_recipe(group[0], model)), None)
        if group is None:
            groups.append([model])
        else:
            group.append(model)
    return [group for group in groups if len(group) > 1]


def _is_same_recipe(first: ComparedModel, second: ComparedModel) -> bool:
    # A setting that one of them lacks was added between the two runs.
    common = first.settings.keys() & second.settings.keys() - {SEED}
    is_one_stage = first.recipe.get("stage") == second.recipe.get("stage")
    return (
        is_one_stage and bool(common) and all(first.settings[key] == second.settings[key] for key in common)
    )
