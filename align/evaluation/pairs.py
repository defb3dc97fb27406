"""Differences of all pairs of models, or of recipes, and which is better than each of the others.

The unit of a model's difference is the prompt, that of a recipe's the training seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.stats import t

from align.evaluation.changes import SuiteChange, decided, has_direction, metric_label
from align.evaluation.models import ComparedModel, same_recipe
from finetune.evaluation.comparison import Difference, compare, more_items_needed
from finetune.evaluation.metrics import Better
from finetune.evaluation.results import Estimate, SuiteResult
from finetune.evaluation.seed_comparison import MIN_SEEDS, compare_recipes
from finetune.evaluation.suites import metrics_of

Quality = Mapping[str, Sequence[SuiteResult | None]]
"""Results on the same items, by suite: one per model, None of a model without the suite."""


@dataclass(frozen=True)
class PairChange:
    """The change from one model to another one on a suite.

    Attributes:
        first: letter of the first model.
        second: letter of the second one; the difference is its result minus that of the first.
        change: the change.
    """

    first: str
    second: str
    change: SuiteChange

    def turned(self) -> "PairChange":
        """Return the same pair in the other direction."""
        return PairChange(self.second, self.first, self.change.turned())


def with_direction(quality: Quality) -> Quality:
    """Return the suites of whose headline one value is better than another one."""
    settings = {
        suite: next(result.settings for result in results if result is not None)
        for suite, results in quality.items()
    }
    return {
        suite: results for suite, results in quality.items() if has_direction(metrics_of(settings[suite])[0])
    }


def pair_changes(letters: Sequence[str], quality: Quality) -> list[PairChange]:
    """Return the changes of all pairs on all suites.

    Decisions are corrected for the number of pairs and suites (``decided``).
    """
    pairs: list[PairChange] = []
    differences: list[Difference] = []
    for suite, results in quality.items():
        for (first, before), (second, after) in combinations(zip(letters, results, strict=True), 2):
            if before is None or after is None:
                continue
            metric = metrics_of(after.settings)[0]
            difference = compare(metric, before.items, after.items)
            if difference is not None:
                purpose, label = str(after.settings["purpose"]), metric_label(after, metric)
                change = SuiteChange(suite, purpose, label, after.headline[1], before.headline[1])
                pairs.append(PairChange(first, second, change))
                differences.append(difference)
    changes = decided([pair.change for pair in pairs], differences)
    return [replace(pair, change=change) for pair, change in zip(pairs, changes, strict=True)]


def recipe_groups(models: Sequence[ComparedModel]) -> list[list[ComparedModel]]:
    """Return the recipes of which there are enough runs with different seeds to compare them."""
    groups = [list({model.seed: model for model in group}.values()) for group in same_recipe(models)]
    return [group for group in groups if len(group) >= MIN_SEEDS]


def recipe_changes(models: Sequence[ComparedModel], quality: Quality) -> list[PairChange]:
    """Return the changes of all pairs of recipes with five seeds or more, on suites that their runs have."""
    groups = recipe_groups(models)
    position = {model.letter: index for index, model in enumerate(models)}
    pairs: list[PairChange] = []
    differences: list[Difference] = []
    for suite, results in quality.items():
        runs = [[results[position[model.letter]] for model in group] for group in groups]
        for (before, first), (after, second) in combinations(zip(runs, groups, strict=True), 2):
            own = [[result for result in side if result is not None] for side in (before, after)]
            if len(own[0]) < len(before) or len(own[1]) < len(after):
                continue
            change, difference = _change(suite, own[0], own[1])
            pairs.append(PairChange(recipe_label(first), recipe_label(second), change))
            differences.append(difference)
    changes = decided([pair.change for pair in pairs], differences)
    return [PairChange(pair.first, pair.second, change) for pair, change in zip(pairs, changes, strict=True)]


def recipe_label(group: Sequence[ComparedModel]) -> str:
    """Return the name of a recipe: the letters of its runs."""
    return "".join(model.letter for model in group)


def _change(
    suite: str, before: Sequence[SuiteResult], after: Sequence[SuiteResult]
) -> tuple[SuiteChange, Difference]:
    metric = metrics_of(after[0].settings)[0]
    values = [[result.headline[1].value for result in side] for side in (before, after)]
    name, estimate = after[0].headline
    better: Better = metric.better
    if better == "neither":
        assert metric.best is not None
        values = [[abs(value - metric.best) for value in side] for side in values]
        better = "lower"
    difference = compare_recipes(values[0], values[1], metric=name, better=better, percent=metric.percent)
    first, second = (_mean(side, percent=estimate.percent) for side in values)
    return SuiteChange(suite, str(after[0].settings["purpose"]), name, second, first), difference


def _mean(values: Sequence[float], *, percent: bool) -> Estimate:
    """Return the mean of runs with its t interval."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half_width = float(t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, mean - half_width, mean + half_width, len(values), len(values), percent)


def best_model(pairs: Sequence[PairChange], *, unit: str = "prompts") -> tuple[str, str]:
    """Return the letter of the model that is better than each of the others, "" if none is, and a sentence.

    A model is better than another one if it is better on a suite of the task, and worse on none.

    Args:
        pairs: of the suites of the task, of models or of recipes; not empty.
        unit: what a difference counts: prompts, or runs of a recipe.
    """
    both = [*pairs, *(pair.turned() for pair in pairs)]
    letters = sorted({pair.second for pair in both})
    beaten = {letter: _beaten_by(letter, both) for letter in letters}
    for letter in letters:
        others = [other for other in letters if other != letter]
        if beaten[letter] >= set(others):
            change = _first_better(both, letter, others[0])
            compared = f"than {others[0]}" if len(others) == 1 else f"than each of {', '.join(others)}"
            against = "" if len(others) == 1 else f"against {others[0]}: "
            return letter, f"{letter} is better {compared}: {against}{change.describe()}."
    return "", _undecided(both, beaten, unit)


def _beaten_by(letter: str, both: Sequence[PairChange]) -> set[str]:
    shown: dict[str, set[str]] = {}
    for pair in both:
        if pair.second == letter:
            shown.setdefault(pair.first, set()).add(pair.change.status)
    return {other for other, statuses in shown.items() if "better" in statuses and "worse" not in statuses}


def _first_better(both: Sequence[PairChange], letter: str, other: str) -> SuiteChange:
    return next(
        pair.change
        for pair in both
        if (pair.first, pair.second) == (other, letter) and pair.change.status == "better"
    )


def _undecided(both: Sequence[PairChange], beaten: Mapping[str, set[str]], unit: str) -> str:
    """Return which two leading models are not decided, and how many more prompts would decide."""
    better_than_it = {letter: sum(letter in own for own in beaten.values()) for letter in beaten}
    # The models that the fewest others beat; of these, the first two of which none beats the other.
    ranked = sorted(beaten, key=lambda letter: (better_than_it[letter], -len(beaten[letter]), letter))
    first, second = next(
        (a, b) for a, b in combinations(ranked, 2) if a not in beaten[b] and b not in beaten[a]
    )
    changes = [pair.change for pair in both if (pair.first, pair.second) == (first, second)]
    statuses = {change.status for change in changes}
    if {"better", "worse"} <= statuses:
        return f"Not decided between {first} and {second}: each is better at something, {_listed(changes)}."
    needed = []
    for change in changes:
        assert change.decision is not None
        needed.append((more_items_needed(change.decision.difference), change))
    known = [(more, change) for more, change in needed if more]
    more, change = min(known, key=lambda entry: entry[0]) if known else (0, changes[0])
    others = sorted(beaten[first] & beaten[second])
    third = f", both better than {', '.join(others)}" if others else ""
    sentence = f"Not decided between {first} and {second}{third}: {change.describe()}"
    return (
        f"{sentence}; about {more:,} more {unit} would decide a difference of this size."
        if more
        else f"{sentence}."
    )


def _listed(changes: Sequence[SuiteChange]) -> str:
    return "; ".join(change.describe() for change in changes if change.status != "not shown")
