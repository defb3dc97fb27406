"""``llm-align eval``: a model's results on suites, next to those of another model, and the verdict."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.evaluation.held_out import (
    PREFIX,
    SuiteItems,
    held_out_suites,
    load_run_recipe,
    prompt_key,
    read_run_rows,
)
from align.evaluation.load_judge import JudgeSettings, load_judge, parse_judge, read_judge
from align.evaluation.pages import publish_evaluation
from align.evaluation.preference import judge_suite
from align.evaluation.verdict import Verdict
from align.generation.model_source import ModelSource
from finetune.distributed.hardware import detect_hardware
from finetune.evaluation.answer_cache import AnswerCache
from finetune.evaluation.answers import CompletionAnswer
from finetune.evaluation.results import Evaluation, SuiteResult
from finetune.evaluation.rows import read_items, sample_items
from finetune.evaluation.suites import load_suite, suite_names
from finetune.recipe.bases import RUNS_FOLDER
from finetune.recipe.compatibility import caught
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import read_run_record

if TYPE_CHECKING:
    from finetune.evaluation.local_model import LocalModel

EVALUATION_FOLDER = "evaluation"
"""Folder of a run with its evaluation."""
UNSAFE = re.compile(r"[^\w.-]+")
TINY, TINY_PREFIX = "tiny", "tiny-"
Progress = Callable[[str, int, int], None]
Completions = dict[str, Sequence[CompletionAnswer]]
"""Completions to the items of each suite that a judge scores."""


@dataclass(frozen=True)
class EvaluationResult:
    """Results of a model on suites.

    Attributes:
        evaluation: of the model.
        against: of the model that it is compared with, on the same items; None without one.
        folder: where the evaluation is stored.
        notes: lines on what was found in the rows, such as contamination.
        verdict: what the two show; None without another model.
    """

    evaluation: Evaluation
    against: Evaluation | None
    folder: Path
    notes: Sequence[str]
    verdict: Verdict | None = None

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return both models' results, the evaluated model first."""
        return [self.evaluation, *([self.against] if self.against is not None else [])]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated: models and suites with their items; nothing is loaded yet.

    Attributes:
        model: the model of the question.
        against: the model that it is compared with, None without one.
        suites: with their items.
        notes: lines on what was found in the rows, such as contamination.
        judges: of the suites of task ``preference``, by name.
    """

    model: ModelSource
    against: ModelSource | None
    suites: Sequence[SuiteItems]
    notes: Sequence[str]
    judges: Mapping[str, JudgeSettings] = field(default_factory=dict)


def plan_evaluation(
    model: str,
    *,
    suites: Sequence[str] = (),
    against: str | None = None,
    alone: bool = False,
    limit: int | None = None,
    template: str | None = None,
    judge: str | None = None,
) -> EvaluationPlan:
    """Read models' records, suites and rows; raises UserError with all their problems.

    Args:
        model: run or base.
        suites: names or files; (): the run's held-out rows, and for the base ``tiny`` its own suites.
        against: run or base to compare with; None: the run's base or parent run.
        alone: compare with nothing.
        limit: items of each suite at most, in place of the suite's own limit.
        template: template of bases without a chat template of their own.
        judge: of suites of task ``preference``, in place of their own: ``run=NAME``, for example.
    """
    source = ModelSource.of(model, template=template if not _is_run(model) else None)
    other = None
    if not alone:
        other_name = against or _start_of(source)
        if other_name is not None:
            inherited = template if against else _template_of(source)
            other = ModelSource.of(other_name, template=None if _is_run(other_name) else inherited)
    names, held_out = list(suites), not suites
    if not suites and _base_name(source) == TINY:
        names = [name for name in suite_names() if name.startswith(TINY_PREFIX)]
    chosen: list[SuiteItems] = []
    problems: list[Problem] = []
    for name in names:
        if name == PREFIX:
            held_out = True
            continue
        problems += caught(lambda name=name: chosen.append(_load(name, limit)))
    notes: list[str] = []
    if source.run is not None and (source.run / "recipe.yaml").is_file():
        recipe = load_run_recipe(source.run)
        rows = read_run_rows(recipe)
        if held_out:
            own = held_out_suites(source.run, recipe, rows)
            chosen = [
                replace(entry, items=sample_items(entry.items, limit, seed=0)) for entry in own
            ] + chosen
        notes = _contamination(chosen, rows.trained_prompts)
    judges: dict[str, JudgeSettings] = {}
    for entry in chosen:
        if entry.suite.settings.task == "preference":
            problems += caught(_add_judge, judges, entry, judge)
    if problems:
        raise UserError(problems)
    if not chosen:
        expected = "--suite NAME; `llm-align list suites` lists them"
        raise UserError(Problem("--suite", f"no suite for {source.label}", expected))
    return EvaluationPlan(source, other, chosen, notes, judges)


def run_plan(
    plan: EvaluationPlan, *, cache: Path | None = None, progress: Progress = lambda suite, done, total: None
) -> EvaluationResult:
    """Evaluate the model, and the one that it is compared with; results are stored.

    Args:
        plan: from ``plan_evaluation``.
        cache: folder of the caches of answers; None: in the user's cache.
        progress: called after each window of items.

    Raises:
        UserError: a model cannot be loaded, or an item fits neither template nor task.
    """
    # One after the other: the second model needs the memory of the first.
    evaluation, completions = _evaluate(plan.model, plan.suites, cache, progress)
    against, others = None, Completions()
    if plan.against is not None:
        against, others = _evaluate(plan.against, plan.suites, cache, progress)
        publish_evaluation(evaluation_folder(plan.against), against, None, run=None)
    evaluation, against = _with_preferences(plan, (evaluation, against), (completions, others))
    folder = evaluation_folder(plan.model)
    verdict = publish_evaluation(folder, evaluation, against, run=plan.model.run)
    return EvaluationResult(evaluation, against, folder, plan.notes, verdict)


def _evaluate(
    source: ModelSource, suites: Sequence[SuiteItems], cache: Path | None, progress: Progress
) -> tuple[Evaluation, Completions]:
    """Return a model's results, and its completions to the suites that a judge will score."""
    from finetune.evaluation.run_suite import answer_items, run_suite

    model, answers = open_model(source, cache)
    results: dict[str, SuiteResult] = {}
    completions: Completions = {}
    for entry in suites:
        name, suite, items = entry.suite.name, entry.suite, entry.items
        if suite.settings.task == "preference":
            completions[name] = answer_items(suite, items, model, answers, progress)
        else:
            results[name] = run_suite(suite, items, model, answers, progress=progress)
    return Evaluation(source.label, model.identity, results), completions


def _with_preferences(
    plan: EvaluationPlan,
    evaluations: tuple[Evaluation, Evaluation | None],
    completions: tuple[Completions, Completions],
) -> tuple[Evaluation, Evaluation | None]:
    """Return both evaluations with the results of the suites that a judge scores."""
    first, second = (dict(other.suites) if other is not None else {} for other in evaluations)
    for entry in plan.suites:
        name = entry.suite.name
        if name in plan.judges:
            judge = load_judge(plan.judges[name])
            scored = judge_suite(entry, judge, completions[0][name], completions[1].get(name))
            first[name] = scored.result
            if scored.against is not None:
                second[name] = scored.against
    evaluation, against = evaluations
    return replace(evaluation, suites=first), None if against is None else replace(against, suites=second)


def _add_judge(judges: dict[str, JudgeSettings], entry: SuiteItems, option: str | None) -> None:
    """Add the judge of a suite; raises UserError if there is none."""
    if option is not None:
        judges[entry.suite.name] = parse_judge(option)
    elif entry.suite.settings.judge is not None:
        where = f"{entry.suite.path.name}.judge"
        judges[entry.suite.name] = read_judge(entry.suite.settings.judge, where=where)
    else:
        expected = "a judge: a reward run, an endpoint's model, or your function"
        raise UserError(
            Problem(f"{entry.suite.path.name}: judge", "none", expected, "--judge run=REWARD_RUN")
        )


def open_model(source: ModelSource, cache: Path | None) -> "tuple[LocalModel, AnswerCache]":
    """Return a model, which is loaded when it is asked, and its cache of answers."""
    from finetune.evaluation.local_model import LocalModel

    model = LocalModel(source.load, source.label, {**source.identity, "device": detect_hardware().name})
    return model, AnswerCache(model.identity, cache)


def evaluation_folder(source: ModelSource) -> Path:
    """Return the folder of a model's evaluation: inside of its run, or in ./runs."""
    if source.run is not None:
        return source.run / EVALUATION_FOLDER
    return RUNS_FOLDER / f"eval-{UNSAFE.sub('-', source.label)}"


def _load(name: str, limit: int | None) -> SuiteItems:
    suite = load_suite(name)
    if limit is not None:
        own = suite.settings.limit
        smaller = limit if own is None else min(own, limit)
        suite = replace(suite, settings=suite.settings.model_copy(update={"limit": smaller}))
    return SuiteItems(suite, read_items(suite))


def _contamination(suites: Sequence[SuiteItems], trained: frozenset[str]) -> list[str]:
    """Return a line for each suite with prompts that the run was trained on."""
    notes = []
    for entry in suites:
        seen = [item for item in entry.items if item.prompt and prompt_key(item.prompt) in trained]
        if seen:
            share = len(seen) / len(entry.items)
            notes.append(
                f"{entry.suite.name}: {len(seen):,} of {len(entry.items):,} prompts ({share:.0%}) are in the "
                f"run's training rows (first: {seen[0].id}): its result says nothing about new prompts"
            )
    return notes


def _is_run(name: str) -> bool:
    return ModelSource.of(name).run is not None


def _start_of(source: ModelSource) -> str | None:
    """Return what a run started from: its parent run, or its base; None for a base."""
    if source.run is None:
        return None
    record = read_run_record(source.run)
    parent = record.get("init_from", {}).get("folder")
    if parent:
        return str(parent)
    return str(record["reload"]["model"]["base"])


def _base_name(source: ModelSource) -> str:
    if source.run is None:
        return source.name
    return str(read_run_record(source.run)["reload"]["model"]["base"])


def _template_of(source: ModelSource) -> str | None:
    """Return the template of a run, with which its base is asked too: the prompts are the same."""
    if source.run is None:
        return None
    template = read_run_record(source.run)["reload"]["template"]
    return None if template == "tokenizer" else str(template)
