"""Verdict on a model against another one: better or worse at the task, what was forgotten, what to do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from align.evaluation.advice import TrainedRun, next_action
from align.evaluation.changes import MOST_DESCRIBED, SuiteChange, bar_scales, describe_all, suite_changes
from finetune.evaluation.results import Evaluation
from finetune.evaluation.sequential import Look
from finetune.recipe.errors import CheckFailedError, Problem

Status = Literal["better", "mixed", "not shown", "worse", "not compared"]
Color = Literal["green", "amber", "gray", "red"]
Requirement = Literal["better", "not-worse"]
REQUIREMENTS: Mapping[Requirement, str] = {
    "better": "better on a suite of the task, worse on none of them",
    "not-worse": "worse on no suite of task, retention or safety",
}
"""Values of ``eval --require``, and what each asks for."""


@dataclass(frozen=True)
class Verdict:
    """What two evaluations on the same items show.

    Attributes:
        model: name of the evaluated model.
        against: name of the model that it is compared with, such as its base.
        changes: a change for each suite, those of the task first.
        only_one: suites that only one of the two evaluations has.
        action: what to do next.
    """

    model: str
    against: str
    changes: Sequence[SuiteChange]
    only_one: Sequence[str] = ()
    action: str = ""

    @property
    def task(self) -> list[SuiteChange]:
        """Return the changes on the suites of the task that can be compared."""
        return [change for change in self.changes if change.purpose == "task" and change.decision]

    @property
    def others(self) -> list[SuiteChange]:
        """Return the changes on the suites of retention and safety that can be compared."""
        return [change for change in self.changes if change.purpose != "task" and change.decision]

    @property
    def losses(self) -> list[SuiteChange]:
        """Return the suites of retention and safety on which something is lost."""
        return [change for change in self.others if change.is_loss]

    @property
    def status(self) -> Status:
        """Return the verdict on the task."""
        if not self.task:
            return "not compared"
        shown = {change.status for change in self.task}
        if {"better", "worse"} <= shown:
            return "mixed"
        return "better" if "better" in shown else "worse" if "worse" in shown else "not shown"

    @property
    def label(self) -> str:
        """Return the verdict in a word or two."""
        return f"{self.status}, with losses" if self.losses and self.status != "worse" else self.status

    @property
    def color(self) -> Color:
        """Return the verdict's color, in which a loss on the other suites counts too."""
        if self.losses:
            return "amber" if self.status in ("better", "mixed") else "red"
        colors: Mapping[Status, Color] = {"better": "green", "mixed": "amber", "worse": "red"}
        return colors.get(self.status, "gray")

    @property
    def sentence(self) -> str:
        """Return the verdict in one sentence."""
        by_status = {
            status: [change for change in self.task if change.status == status]
            for status in ("better", "worse", "not shown")
        }
        if not self.task:
            reasons = {change.reason for change in self.changes if change.purpose == "task"}
            reason = ", ".join(sorted(reasons)) or "the evaluations have no suite of the task in common"
            text = f"Not compared at the task: {reason}"
        elif self.status == "not shown":
            text = f"No difference shown at {describe_all(self.task)}"
        else:
            first = "better" if by_status["better"] else "worse"
            text = f"{first.capitalize()} at {describe_all(by_status[first])}"
            if self.status == "mixed":
                text += f", worse at {describe_all(by_status['worse'], is_first=False)}"
        if self.losses:
            word = "and" if self.status == "worse" else "but"
            text += f", {word} worse at {describe_all(self.losses, is_first=not self.task)}"
        return f"{text}."

    @property
    def forgotten(self) -> str:
        """Return in one sentence what was forgotten, from the suites of retention and safety."""
        if not self.others:
            return "Not measured: no suite of retention or safety was evaluated for both models."
        count = f"{len(self.others)} suite{'s' if len(self.others) > 1 else ''} of retention and safety"
        if self.losses:
            return f"Worse on {len(self.losses)} of {count}: {', '.join(c.suite for c in self.losses)}."
        unsure = [change for change in self.others if change.status != "better"]
        if not unsure:
            return f"Nothing: better on {count}."
        largest = sorted(unsure, key=lambda change: -change.relative_loss)[:MOST_DESCRIBED]
        limits = ", ".join(f"{change.amount(change.possible_loss)} on {change.suite}" for change in largest)
        return f"No loss shown on {count}; the intervals include losses up to {limits}."

    def meets(self, requirement: Requirement) -> bool:
        """Return whether the verdict is what ``--require`` asks for."""
        if requirement == "better":
            return self.status == "better"
        return bool(self.task) and self.status not in ("worse", "mixed") and not self.losses

    def record(self) -> dict[str, Any]:
        """Return the verdict as JSON values, for eval.json, run.json and the pages."""
        scales = bar_scales(self.changes)
        return {
            "model": self.model,
            "against": self.against,
            "status": self.status,
            "label": self.label,
            "color": self.color,
            "sentence": self.sentence,
            "forgotten": self.forgotten,
            "action": self.action,
            "only_one": list(self.only_one),
            "suites": [change.record(scales.get(change.unit, 1.0)) for change in self.changes],
        }


def make_verdict(
    before: Evaluation,
    after: Evaluation,
    *,
    run: TrainedRun | None = None,
    looks: Mapping[str, Look] | None = None,
) -> Verdict:
    """Return the verdict on a model (``after``) against another one (``before``).

    At most 5 % of comparisons of equal models say "better" or "worse" at the task, however many suites there
    are; the same holds for all suites of retention and safety together (``suite_changes``).

    Args:
        before: results of the base, or of another run.
        after: results of the model.
        run: settings and findings of the model's run, for advice.
        looks: last look at each suite that ``--until-decided`` has stopped (``suite_changes``).
    """
    changes, only_one = suite_changes(before, after, looks)
    verdict = Verdict(after.model, before.model, changes, only_one)
    return replace(verdict, action=next_action(changes, verdict.status, run))


def check_required(verdict: Verdict, requirements: Iterable[Requirement]) -> None:
    """Raise CheckFailedError, whose exit status is 4, if the verdict is not what ``--require`` asks for."""
    problems = [
        Problem(f"--require {requirement}", verdict.sentence, REQUIREMENTS[requirement], verdict.action)
        for requirement in requirements
        if not verdict.meets(requirement)
    ]
    if problems:
        raise CheckFailedError(problems)
