"""Evaluation suites: one YAML file each, ``recipes/eval/NAME.yaml`` or the user's own file; without torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, ValidationError

from finetune.evaluation.items import EvalItem
from finetune.evaluation.metrics import ACCURACY, GRADE, Metric, mean_of
from finetune.recipe import yaml_file
from finetune.recipe.discovery import PROJECT, load_plugin, plugin_names
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.settings import Section

SUITES = PROJECT / "recipes" / "eval"
LAYOUTS = "finetune.evaluation.layouts"
"""A layout reads the rows of a published benchmark: ``read_row(row) -> list[EvalItem]``; optionally METRICS,
the headline first, and ``item_values(item, answer)``, the values that these metrics are functions of."""

Task = Literal["choice", "completion", "perplexity", "preference"]
Purpose = Literal["task", "retention", "safety"]


class SuiteData(Section):
    """The rows of a suite."""

    source: str = Field(description="file, folder or Hub id; relative paths start at the suite's folder")
    split: str = Field("test", description="split of a Hub dataset, or of a folder")
    revision: str | None = Field(None, description="revision of a Hub dataset")
    layout: str | None = Field(
        None, description="layout of a published benchmark; null: prompt and reply, or question and choices"
    )
    columns: dict[str, str] | None = Field(None, description="our column name: the file's")
    where: dict[str, str | int | bool | list[str | int]] = Field(
        {}, description="rows to use: column: value, or a list of values"
    )


class Suite(Section):
    """One task of an evaluation: rows, how a model answers them, and how answers are scored."""

    description: str = Field(description="one line for `llm-align list suites`")
    task: Task = Field(
        description="choice: by likelihood; completion: generated and graded; perplexity: of texts; "
        "preference: a judge compares completions with those of another model, or with the rows' replies"
    )
    purpose: Purpose = Field(
        "task", description="what a verdict uses it for: the task that was trained, retention, or safety"
    )
    data: SuiteData
    prompt: str | None = Field(None, description="text of the prompt, with {columns} of the row")
    style: Literal["chat", "text"] = Field(
        "chat", description="chat: the model's template; text: continuation of the prompt without a template"
    )
    system_prompt: str | None = Field(None, description="system prompt of chats")
    grader: str | None = Field(None, description="a grader's name, or file.py:function")
    grader_options: dict[str, Any] = Field({}, description="options of the grader")
    judge: dict[str, Any] | None = Field(None, description="endpoint, run or function that compares")
    max_new_tokens: int = Field(256, ge=1, description="maximum tokens of a completion")
    temperature: float = Field(0.0, ge=0, description="0: greedy decoding")
    limit: int | None = Field(None, ge=1, description="items to use, drawn with the seed; null: all")
    seed: int = Field(0, ge=0, description="seed of the drawn items and of sampled completions")


@dataclass(frozen=True)
class NamedSuite:
    """A suite with its name and the file that it comes from."""

    name: str
    path: Path
    settings: Suite

    @property
    def layout(self) -> ModuleType | None:
        """Return the module of its layout."""
        return _load_layout(self.settings.data.layout, where=str(self.path))

    @property
    def metrics(self) -> Sequence[Metric]:
        """Return its metrics, the headline first."""
        return _metrics(self.layout, self.settings.task)

    @property
    def item_values(self) -> Callable[[EvalItem, Any], Mapping[str, float]] | None:
        """Return the layout's function of an item and its answer, None without one."""
        function: Callable[[EvalItem, Any], Mapping[str, float]] | None = getattr(
            self.layout, "item_values", None
        )
        return function


TASK_METRICS: Mapping[Task, Sequence[Metric]] = {
    "choice": (ACCURACY, Metric("accuracy per byte", mean_of("score_per_byte"))),
    "completion": (GRADE,),
    "perplexity": (
        Metric(
            "bits per byte",
            lambda totals: -totals["logp"] / totals["bytes"] / LN_2,
            better="lower",
            percent=False,
        ),
    ),
    "preference": (Metric("win rate", mean_of("score"), best=0.5),),
}
LN_2 = 0.6931471805599453


def metrics_of(settings: Mapping[str, Any]) -> Sequence[Metric]:
    """Return a suite's metrics, the headline first, from settings as plain values (``SuiteResult``)."""
    layout = settings.get("data", {}).get("layout")
    return _metrics(_load_layout(layout, where="suite"), settings["task"])


def _load_layout(name: str | None, *, where: str) -> ModuleType | None:
    return load_plugin(LAYOUTS, name, where=f"{where}: data.layout") if name else None


def _metrics(layout: ModuleType | None, task: Task) -> Sequence[Metric]:
    own: Sequence[Metric] | None = getattr(layout, "METRICS", None)
    return own or TASK_METRICS[task]


def suite_names() -> dict[str, Path]:
    """Return the shipped suites, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def suite_descriptions() -> dict[str, str]:
    """Return each shipped suite's description, or its error if the file cannot be read."""
    descriptions = {}
    for name, path in suite_names().items():
        try:
            descriptions[name] = str(yaml_file.read_yaml(path)[0].get("description") or "")
        except UserError as error:
            descriptions[name] = f"cannot be read: {error.problems[0].actual}"
    return descriptions


def load_suite(name: str) -> NamedSuite:
    """Load a suite by its name, or from a file.

    Raises:
        UserError: there is no such suite, or its file has errors; all of them at once.
    """
    path = _find_suite(name)
    content, _ = yaml_file.read_yaml(path)
    try:
        settings = Suite(**content)
    except ValidationError as error:
        raise UserError(validation_problems(path.name, error, model=Suite)) from error
    suite = NamedSuite(path.stem, path, settings)
    if problems := _cross_field_problems(suite):
        raise UserError(problems)
    return suite


def _find_suite(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.is_file():
            return path
        raise UserError(Problem("--suite", f"no such file: {name}", "a suite's YAML file"))
    shipped = suite_names()
    if name not in shipped:
        expected = "a suite of `llm-align list suites`, or the path of a YAML file"
        raise UserError(Problem("--suite", f"unknown suite '{name}'", expected, did_you_mean(name, shipped)))
    return shipped[name]


def _cross_field_problems(suite: NamedSuite) -> list[Problem]:
    settings, where = suite.settings, str(suite.path)
    problems = []
    if settings.data.layout and settings.data.layout not in (names := plugin_names(LAYOUTS)):
        actual = f"unknown layout '{settings.data.layout}'"
        hint = did_you_mean(settings.data.layout, names)
        problems.append(Problem(f"{where}: data.layout", actual, f"one of {', '.join(names)}", hint))
    elif settings.task == "completion" and settings.grader is None and suite.item_values is None:
        expected = "a grader, such as `grader: exact`, or file.py:function"
        problems.append(Problem(f"{where}: grader", "a completion task without a grader", expected))
    return problems
