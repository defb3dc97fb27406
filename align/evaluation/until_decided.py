"""``eval --until-decided``: both models answer a few prompts at a time, until one is shown to be better."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.evaluation.evaluate import (
    EvaluationPlan,
    EvaluationResult,
    Progress,
    evaluation_folder,
    open_model,
)
from align.evaluation.held_out import SuiteItems
from align.evaluation.pages import publish_evaluation
from finetune.evaluation.figures import format_value
from finetune.evaluation.items import EvalItem
from finetune.evaluation.metrics import Mean, Metric
from finetune.evaluation.results import Evaluation, SuiteResult
from finetune.evaluation.run_suite import run_suite
from finetune.evaluation.sequential import Look, SequentialComparison, cluster_differences, random_order
from finetune.recipe.errors import Problem, UserError

CLUSTERS_PER_LOOK = 16
"""Prompts between two looks: about a batch of generation."""
ALPHA = 0.05
Pair = tuple[SuiteResult, SuiteResult]
"""Results of the other model, and of the model."""


@dataclass(frozen=True)
class SequentialResult:
    """A suite's comparison that stopped as soon as it was decided.

    Attributes:
        suite: its name.
        metric: the headline.
        look: the last look: prompts, difference, interval.
        total: prompts of the suite.
    """

    suite: str
    metric: Metric
    look: Look
    total: int

    @property
    def sentence(self) -> str:
        """Return what was decided, and after how many prompts."""
        value, low, high = (
            format_value(figure, percent=self.metric.percent)
            for figure in (self.look.value, self.look.low, self.look.high)
        )
        improved = (self.look.value > 0) == (self.metric.better == "higher")
        decided = ("better" if improved else "worse") if self.look.decided else "not decided"
        return (
            f"{self.suite}: {decided} after {self.look.count:,} of {self.total:,} prompts: "
            f"{self.metric.name} changes by {value} ({low} to {high}, valid at every look)"
        )


def run_until_decided(
    plan: EvaluationPlan, *, cache: Path | None = None, progress: Progress = lambda suite, done, total: None
) -> tuple[EvaluationResult, list[SequentialResult]]:
    """Evaluate both models on growing parts of the suites; stop each suite as soon as it is decided.

    The intervals are valid at every look, and share 5 % of error among the suites. A suite whose headline is
    no mean between 0 and 1, such as bits per byte, is evaluated on all items.

    Args:
        plan: from ``plan_evaluation``, with a model to compare with.
        cache: folder of the caches of answers; None: in the user's cache.
        progress: called after each window of items.

    Raises:
        UserError: there is no other model.
    """
    if plan.against is None:
        actual = "nothing to compare with"
        raise UserError(Problem("--until-decided", actual, "two models", "--against MODEL"))
    bounded = [entry for entry in plan.suites if _is_bounded(entry)]
    after, before = (open_model(source, cache) for source in (plan.model, plan.against))
    results: dict[str, Pair] = {}
    sequential = []
    for entry in plan.suites:
        comparison = SequentialComparison(alpha=ALPHA / max(1, len(bounded)))
        ordered, ends = _in_looks(entry)
        for end in ends if entry in bounded else ends[-1:]:
            items = ordered[:end]
            pair = tuple(
                run_suite(entry.suite, items, model, answers, progress=progress)
                for model, answers in (before, after)
            )
            results[entry.suite.name] = (pair[0], pair[1])
            if entry not in bounded:
                continue
            differences = cluster_differences(pair[0].items, pair[1].items, _headline_value(entry))
            counted = comparison.looks[-1].count if comparison.looks else 0
            if comparison.update(list(differences.values())[counted:]).decided:
                break
        if entry in bounded:
            name, metric = entry.suite.name, entry.suite.metrics[0]
            total = count_clusters(entry.items)
            sequential.append(SequentialResult(name, metric, comparison.looks[-1], total))
    evaluations = [
        Evaluation(source.label, model.identity, {name: pair[index] for name, pair in results.items()})
        for index, (source, (model, _)) in enumerate(((plan.against, before), (plan.model, after)))
    ]
    folder = evaluation_folder(plan.model)
    looks = {entry.suite: entry.look for entry in sequential}
    verdict = publish_evaluation(folder, evaluations[1], evaluations[0], run=plan.model.run, looks=looks)
    return EvaluationResult(evaluations[1], evaluations[0], folder, plan.notes, verdict), sequential


def _is_bounded(entry: SuiteItems) -> bool:
    """Return whether the headline is a mean between 0 and 1, whose differences can be bet on."""
    metric = entry.suite.metrics[0]
    return isinstance(metric.function, Mean) and metric.percent and metric.better != "neither"


def _headline_value(entry: SuiteItems) -> str:
    function = entry.suite.metrics[0].function
    assert isinstance(function, Mean), "checked"
    return function.value


def count_clusters(items: Sequence[EvalItem]) -> int:
    """Return the number of independent clusters of items."""
    return len({item.cluster or item.id for item in items})


def _in_looks(entry: SuiteItems) -> tuple[list[EvalItem], list[int]]:
    """Return the items with their clusters in random order, and the number of items at each look."""
    by_cluster: dict[str, list[EvalItem]] = {}
    for item in entry.items:
        by_cluster.setdefault(item.cluster or item.id, []).append(item)
    order = random_order(list(by_cluster), entry.suite.settings.seed)
    ordered = [item for cluster in order for item in by_cluster[cluster]]
    ends, end = [], 0
    for number, cluster in enumerate(order, 1):
        end += len(by_cluster[cluster])
        if number % CLUSTERS_PER_LOOK == 0 or number == len(order):
            ends.append(end)
    return ordered, ends
