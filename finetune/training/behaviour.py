"""Generation evals before and after training: Python graders, and exact match on a retention set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_templates._segments import Message
from finetune.data.gather import Place, read_conversations
from finetune.data.replies import worded
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.python_function import call_problems, load_function, opinion_of
from finetune.recipe.settings import EvaluateSettings
from finetune.training.run_directory import RunDirectory
from finetune.training.samples import Answer, question_of, spread

ARGUMENTS = ("prompt", "reply")


class Judge(Protocol):
    """A user's function: the grade of a reply, or None to skip the prompt."""

    def __call__(self, prompt: str, reply: str, /) -> float | bool | None:
        """Return true or 1 for a good reply, false or 0 for a bad one."""
        ...


@dataclass(frozen=True)
class Behaviour:
    """Graders of greedy completions to ``prompts``, and exact match of those to the ``retention`` set.

    Both hold conversations that end with the expected reply.
    """

    judges: Mapping[str, Judge]
    prompts: Sequence[Sequence[Message]]
    skill: Sequence[Sequence[Message]]

    def measure(self, run: RunDirectory, answer: Answer, when: str) -> None:
        """Record each grader's mean and the retention set's exact-match rate, ``before`` or ``after``.

        Raises:
            UserError: a grader raised, returned no number, or skipped every prompt.
        """
        # A resumed run keeps the metrics that its first start recorded for the untrained model.
        names = [f"judged_{name}_{when}" for name in self.judges] + [f"skill_{when}"] * bool(self.skill)
        if when == "before" and set(names) <= run.record.get("metrics", {}).keys():
            return
        metrics = {}
        if self.judges:
            questions = [question_of(talk) for talk in self.prompts]
            replies = [reply.text for reply in answer([talk[:-1] for talk in self.prompts])]
            for name, judge in self.judges.items():
                metrics[f"judged_{name}_{when}"] = mean_judgement(name, judge, questions, replies)
        if self.skill:
            replies = [reply.text for reply in answer([talk[:-1] for talk in self.skill])]
            right = [reply == talk[-1].content for reply, talk in zip(replies, self.skill, strict=True)]
            metrics[f"skill_{when}"] = sum(right) / len(right)
        run.update(metrics=metrics)

    @property
    def numbers(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        judged = {f"judged_{name}": (f"grader: {name}", ".1%") for name in self.judges}
        return judged | {"skill": ("retention: exact match", ".1%")}


def mean_judgement(name: str, judge: Judge, prompts: Sequence[str], replies: Sequence[str]) -> float:
    """Return a grader's mean over the completions that it does not skip.

    Raises:
        UserError: the grader raised, returned no number, or skipped every prompt.
    """
    where = f"evaluate.judges.{name}"
    said = [opinion_of(judge, *pair, where=where) for pair in zip(prompts, replies, strict=True)]
    numbers = [value for value in said if value is not None]
    if not numbers:
        found = f"None for each of {len(said)} prompts"
        raise UserError(Problem(where, found, "a number for some of the held-out prompts"))
    return sum(numbers) / len(numbers)


def load_judges(judges: Mapping[str, str]) -> dict[str, Judge]:
    """Return the grader functions that a recipe names; their files are executed.

    Raises:
        UserError: a file or function is missing, or does not take a prompt and a reply.
    """
    found: dict[str, Judge] = {}
    problems: list[Problem] = []
    for name, text in judges.items():
        where = f"evaluate.judges.{name}"
        try:
            found[name] = load_function(text, where=where)
            problems += call_problems(found[name], ARGUMENTS, where=where)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def load_behaviour(
    settings: EvaluateSettings, prompts: Sequence[Sequence[Message]], encoder: Encoder, *, seed: int
) -> Behaviour:
    """Load a recipe's graders and retention set.

    Args:
        settings: the recipe's ``evaluate`` section.
        prompts: held-out conversations; graders see ``judge_rows`` of them, evenly spaced.
        encoder: renders the expected replies with the template.
        seed: selects the rows of the retention set.

    Raises:
        UserError: a grader or the retention set cannot be loaded.
    """
    judged = [prompts[index] for index in spread(len(prompts), settings.judge_rows)]
    skill: list[list[Message]] = []
    if settings.skill is not None:
        place = Place("evaluate.skill", settings.skill, "train", None, None, settings.skill_rows)
        rows = read_conversations(place, DataReport(), seed=seed)
        skill = [worded(row.messages, encoder) for row in rows]
    return Behaviour(load_judges(settings.judges), [worded(talk, encoder) for talk in judged], skill)
