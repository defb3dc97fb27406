"""Generation evals before and after training: samples, Python graders, exact match on a retention set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_templates.segments import Message
from finetune.data.conversation import Conversation, render_reply
from finetune.data.conversation_rows import load_conversations
from finetune.data.load import SourceSpec
from finetune.data.report import DataReport
from finetune.data.row_columns import RowColumns
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import EvaluateSettings, StageSettings
from finetune.recipe.user_arguments import (
    ColumnsByLocation,
    CompletionRow,
    RowFunction,
    column_problems,
    completion_row,
    default_notes,
    load_graders,
    missing_value_problems,
)
from finetune.recipe.user_function import call_for_grades, call_user_function
from finetune.training.generation import Completion
from finetune.training.held_out_file import graded_entry, write_graded
from finetune.training.metric_specs import When
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.run_directory import RunDirectory
from finetune.training.samples import GenerateFn, Samples, evenly_spaced

Grades = list[float | None]
"""The grades of some completions; None where the grader does not apply."""


@dataclass(frozen=True)
class Graders:
    """Python functions that grade completions, and the columns of the rows that they may take."""

    functions: Mapping[str, RowFunction]
    columns: ColumnsByLocation = field(default_factory=dict)

    def row(
        self, prompt: Sequence[Message], completion: str, location: str, reference: str | None
    ) -> CompletionRow:
        """Return a completion of a prompt as the graders take it."""
        turns = [*prompt, Message("assistant", completion)]
        return completion_row(turns, location, reference=reference, columns=self.columns)

    def grade(self, rows: Sequence[CompletionRow]) -> dict[str, Grades]:
        """Return the grades of completions, by grader.

        Raises:
            UserError: a grader raised, or returned neither a number nor None.
        """
        return {name: _grade(name, function, rows) for name, function in self.functions.items()}

    def notes(self, names: Sequence[str]) -> list[str]:
        """Return a line for each parameter that nothing fills, given the names of the columns."""
        return [
            note
            for name, function in self.functions.items()
            for note in default_notes(function, names, what=f"grader '{name}'")
        ]

    def problems(self, prompts: Sequence[Conversation], names: Sequence[str]) -> list[Problem]:
        """Return the problems of parameters that nothing fills, in any row or in some.

        Args:
            prompts: conversations that end with the expected reply.
            names: the names of the columns.
        """
        rows = [self.row(row.messages[:-1], "", row.location, _reference(row)) for row in prompts]
        problems: list[Problem] = []
        for name, function in self.functions.items():
            where = f"evaluate.graders.{name}"
            unknown = column_problems(function, names, where=where)
            problems += unknown or missing_value_problems(function, rows, where=where)
        return problems


def graded_entries(
    rows: Sequence[CompletionRow], completions: Sequence[Completion], grades: Mapping[str, Grades]
) -> list[dict[str, Any]]:
    """Return the entries of held_out.jsonl of graded completions."""
    return [
        graded_entry(
            row,
            ended_with_eos=completion.ended_with_eos,
            grades={name: values[index] for name, values in grades.items()},
        )
        for index, (row, completion) in enumerate(zip(rows, completions, strict=True))
    ]


def _grade(name: str, function: RowFunction, rows: Sequence[CompletionRow]) -> Grades:
    where = f"evaluate.graders.{name}"
    if function.is_batch:
        return call_for_grades(lambda: function.call_batch(rows), len(rows), where=where)

    def grade_one(row: CompletionRow) -> float | None:
        return call_user_function(lambda *_: function.call(row), row.prompt, row.completion, where=where)

    return [grade_one(row) for row in rows]


def _reference(row: Conversation) -> str | None:
    return row.messages[-1].content or None


@dataclass(frozen=True)
class GenerationEval:
    """Graders of greedy completions to ``prompts``, and exact match of those to the ``retention`` set.

    Both hold conversations that end with the expected reply.
    """

    graders: Graders
    prompts: Sequence[Conversation]
    retention: Sequence[Conversation]

    def evaluate(self, run: RunDirectory, generate: GenerateFn, when: When) -> None:
        """Record each grader's mean and the retention set's exact-match rate, ``before`` or ``after``.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        # A resumed run keeps the metrics that its first start recorded for the untrained model.
        metric_names = [f"{EVAL_PREFIX}graders/{name}_{when}" for name in self.graders.functions] + [
            f"{EVAL_PREFIX}retention_{when}"
        ] * bool(self.retention)
        if when == "before" and set(metric_names) <= run.record.get("metrics", {}).keys():
            return
        metrics: dict[str, float] = {}
        cases: dict[str, int] = {}
        if self.graders.functions:
            rows, completions, grades = self._grade_completions(generate)
            metrics |= {f"{name}_{when}": value for name, value in _mean_grades(grades).items()}
            cases |= {
                f"{EVAL_PREFIX}graders/{name}": sum(grade is not None for grade in values)
                for name, values in grades.items()
            }
            write_graded(run, "graders", when, graded_entries(rows, completions, grades))
        if self.retention:
            completions = generate([row.messages[:-1] for row in self.retention])
            # Both sides are stripped: the expected reply was rendered, and the completion decoded.
            correct = [
                completion.text == row.messages[-1].content
                for completion, row in zip(completions, self.retention, strict=True)
            ]
            metrics[f"{EVAL_PREFIX}retention_{when}"] = sum(correct) / len(correct)
            entries = [
                graded_entry(
                    self.graders.row(row.messages[:-1], completion.text, row.location, _reference(row)),
                    ended_with_eos=completion.ended_with_eos,
                    correct=is_correct,
                )
                for row, completion, is_correct in zip(self.retention, completions, correct, strict=True)
            ]
            cases[f"{EVAL_PREFIX}retention"] = len(correct)
            write_graded(run, "retention", when, entries)
        run.update(metrics=metrics, cases=cases)

    def grade(self, generate: GenerateFn) -> dict[str, float]:
        """Return each grader's mean over new completions, by metric; {} without graders.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        return _mean_grades(self._grade_completions(generate)[2]) if self.graders.functions else {}

    def _grade_completions(
        self, generate: GenerateFn
    ) -> tuple[list[CompletionRow], list[Completion], dict[str, Grades]]:
        completions = generate([row.messages[:-1] for row in self.prompts])
        rows = [
            self.graders.row(prompt.messages[:-1], completion.text, prompt.location, _reference(prompt))
            for prompt, completion in zip(self.prompts, completions, strict=True)
        ]
        return rows, completions, self.graders.grade(rows)

    @property
    def curves(self) -> dict[str, str]:
        """Return the graders' metrics of metrics.jsonl with the titles of their curves."""
        return {f"{EVAL_PREFIX}graders/{name}": f"grader: {name}" for name in self.graders.functions}

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        grades = {
            f"{EVAL_PREFIX}graders/{name}": (f"grader: {name}", ".1%") for name in self.graders.functions
        }
        return grades | {f"{EVAL_PREFIX}retention": ("retention: exact match", ".1%")}


@dataclass(frozen=True)
class GenerationEvals:
    """All that a run generates before and after training: samples.jsonl, and the graders' completions.

    ``notes`` are messages for the log.
    """

    samples: Samples
    graded: GenerationEval
    notes: Sequence[str] = ()

    @classmethod
    def load(
        cls, settings: StageSettings, encoder: Encoder, conversations: Sequence[Conversation]
    ) -> "GenerationEvals":
        """Load the graders and the retention set, and select the prompts.

        Args:
            settings: the recipe's settings.
            encoder: renders the expected replies with the template.
            conversations: held-out conversations that end with the expected reply.

        Raises:
            UserError: a grader or the retention set cannot be loaded.
        """
        graded = load_generation_eval(settings, conversations, encoder)
        columns = graded.graders.columns
        notes = graded.graders.notes(columns.names) if isinstance(columns, RowColumns) else []
        return cls(_select_samples(settings.evaluate, conversations, encoder), graded, notes)

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        return self.graded.summary

    def run(self, run: RunDirectory, generate: GenerateFn, when: When) -> None:
        """Generate and record samples and grades, ``before`` or ``after`` training.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        record = {"before": self.samples.record_before, "after": self.samples.record_after}[when]
        record(run, generate)
        self.graded.evaluate(run, generate, when)


def _select_samples(evaluate: EvaluateSettings, rows: Sequence[Conversation], encoder: Encoder) -> Samples:
    """Return the prompts of samples.jsonl, evenly spaced over the held-out conversations."""
    shown = evenly_spaced(len(rows), evaluate.samples)
    others = [index for index in range(len(rows)) if index not in shown]
    # The shown prompts come first; exact match may score more of them.
    count = max(evaluate.samples, evaluate.exact_match)
    indices = [*shown, *others][:count]
    selected = [render_reply(rows[index].messages, encoder) for index in indices]
    locations = [rows[index].location for index in indices]
    return Samples(selected, evaluate.samples, scored=evaluate.exact_match > 0, locations=locations)


def _mean_grades(grades: Mapping[str, Grades]) -> dict[str, float]:
    return {f"{EVAL_PREFIX}graders/{name}": mean_grade(name, values) for name, values in grades.items()}


def mean_grade(name: str, grades: Grades) -> float:
    """Return the mean of a grader's grades.

    Raises:
        UserError: the grader skipped every prompt.
    """
    where = f"evaluate.graders.{name}"
    scored = [value for value in grades if value is not None]
    if not scored:
        actual = f"None for each of {len(grades)} prompts"
        repair = "it grades other data: evaluate.graders={} omits the recipe's graders"
        raise UserError(Problem(where, actual, "a number for some of the held-out prompts", repair))
    return sum(scored) / len(scored)


def load_generation_eval(
    settings: StageSettings, conversations: Sequence[Conversation], encoder: Encoder
) -> GenerationEval:
    """Load a recipe's graders and retention set.

    Args:
        settings: the recipe's settings.
        conversations: held-out conversations; graders see ``grader_rows`` of them, evenly spaced.
        encoder: renders the expected replies with the template.

    Raises:
        UserError: a grader or the retention set cannot be loaded, or nothing fills a grader's parameter.
    """
    evaluate = settings.evaluate
    graded = [conversations[index] for index in evenly_spaced(len(conversations), evaluate.grader_rows)]
    retention: list[Conversation] = []
    if evaluate.retention is not None:
        source = SourceSpec(
            "evaluate.retention", evaluate.retention, "train", None, None, evaluate.retention_rows
        )
        source = replace(source, ignore_columns=tuple(settings.data.ignore_columns))
        rows = load_conversations(source, 0, settings.train.seed, DataReport()).rows
        retention = [replace(row, messages=render_reply(row.messages, encoder)) for row in rows]
    prompts = [replace(row, messages=render_reply(row.messages, encoder)) for row in graded]
    functions = load_graders(evaluate.graders)
    if not functions:
        return GenerationEval(Graders({}), prompts, retention)
    columns = RowColumns(settings.data, [[row.location for row in prompts]])
    graders = Graders(functions, columns)
    if problems := graders.problems(prompts, columns.names):
        raise UserError(problems)
    return GenerationEval(graders, prompts, retention)
