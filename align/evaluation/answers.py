"""Answers of models to the same prompts, from evaluations and run directories, and the held-out grades."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from finetune.evaluation.intervals import estimate
from finetune.evaluation.items import SCORE, ItemResult
from finetune.evaluation.metrics import GRADE
from finetune.evaluation.results import SuiteResult
from finetune.training.atomic_files import read_jsonl
from finetune.training.run_directory import HELD_OUT, SAMPLES

GRADER, MEAN_GRADE = "grader ", "mean grade"
HELD_OUT_SETTINGS = {"task": "completion", "purpose": "task"}


@dataclass(frozen=True)
class Answers:
    """What several models answer to one prompt.

    Attributes:
        prompt: the prompt, or the text that is scored.
        expected: the reference answer, or "".
        texts: the answer of each model, None of one that was not asked.
        scores: the score of each model, None where there is none.
    """

    prompt: str
    expected: str
    texts: Sequence[str | None]
    scores: Sequence[float | None] = field(default=())

    @property
    def num_different(self) -> int:
        """Return the number of different answers."""
        return len({text for text in self.texts if text is not None})

    @property
    def is_different(self) -> bool:
        """Return whether two models answer differently."""
        return self.num_different > 1

    @property
    def order(self) -> tuple[bool, int]:
        """Return the sort key: other scores first, then by the number of different answers."""
        scores = {score for score in self.scores if score is not None}
        return (len(scores) <= 1, -self.num_different)


def answer_text(evidence: Mapping[str, Any]) -> str:
    """Return the answer in the evidence of an item: completion, chosen answer, or nothing for a text."""
    if "completion" in evidence:
        return str(evidence["completion"])
    return str(evidence["choices"][evidence["chosen"]]) if "chosen" in evidence else ""


def expected_text(evidence: Mapping[str, Any]) -> str:
    """Return the reference answer in the evidence of an item, or ""."""
    if "correct" in evidence:
        return " / ".join(str(evidence["choices"][index]) for index in evidence["correct"])
    return str(evidence.get("expected", ""))


def common_results(results: Sequence[SuiteResult | None]) -> list[SuiteResult | None]:
    """Return results on the same items: None of a model whose items or settings of the suite are others.

    Results with a fingerprint are compared as they are. Grades of held-out prompts have none, and are reduced
    to the prompts that all models have, without those that have none in common with the others: another seed
    holds out other rows.

    Args:
        results: of each model; None of one without the suite.
    """
    present = [result for result in results if result is not None]
    if present[0].fingerprint:
        keys = [None if result is None else _comparable_key(result) for result in results]
        most = Counter(key for key in keys if key is not None).most_common(1)[0][0]
        return [result if key == most else None for result, key in zip(results, keys, strict=True)]
    names = [None if result is None else {item.id for item in result.items} for result in results]
    while sum(own is not None for own in names) > 1:
        shown = [own for own in names if own is not None]
        common = set.intersection(*shown)
        if common:
            pairs = zip(results, names, strict=True)
            return [_reduced(result, common) if result and own else None for result, own in pairs]
        # Leave out the model that has the fewest prompts in common with the others.
        overlaps = [
            sum(len(own & other) for other in shown if other is not own) if own else inf for own in names
        ]
        names[overlaps.index(min(overlaps))] = None
    return [None] * len(results)


def _comparable_key(result: SuiteResult) -> tuple[str, ...]:
    """Return what results must share: items and settings, and the completions that a judge compared with."""
    opponents = (str(item.evidence.get("compared_with", "")) for item in result.items)
    return (result.fingerprint, *opponents)


def _reduced(result: SuiteResult, names: set[str]) -> SuiteResult:
    items = [item for item in result.items if item.id in names]
    return replace(result, items=items, metrics={name: estimate(GRADE, items) for name in result.metrics})


def item_answers(results: Sequence[SuiteResult | None]) -> list[Answers]:
    """Return the answers to the items of a suite that all models with a result have.

    Args:
        results: of each model; None of one without the suite.
    """
    items = [{item.id: item for item in result.items} if result is not None else None for result in results]
    present = [by_id for by_id in items if by_id is not None]
    common = [name for name in present[0] if all(name in by_id for by_id in present)]
    answers = []
    for name in common:
        own = [None if by_id is None else by_id[name] for by_id in items]
        evidence = present[0][name].evidence
        answers.append(
            Answers(
                str(evidence.get("prompt") or evidence.get("text", "")),
                expected_text(evidence),
                [None if item is None else answer_text(item.evidence) for item in own],
                [None if item is None else item.score for item in own],
            )
        )
    return sorted(answers, key=lambda entry: entry.order)


def sample_answers(folders: Sequence[Path]) -> list[Answers]:
    """Return the replies after training to the prompts of samples.jsonl that two or more runs have."""
    replies = [
        {entry["prompt"]: entry for entry in read_jsonl(folder / SAMPLES) if "after" in entry}
        for folder in folders
    ]
    prompts = dict.fromkeys(prompt for own in replies for prompt in own)
    answers = [
        Answers(
            prompt,
            next(str(own[prompt].get("expected") or "") for own in replies if prompt in own),
            [own[prompt]["after"] if prompt in own else None for own in replies],
        )
        for prompt in prompts
        if sum(prompt in own for own in replies) > 1
    ]
    return sorted(answers, key=lambda entry: entry.order)


def held_out_results(folder: Path) -> dict[str, SuiteResult]:
    """Return the grades of held-out prompts after training as results of suites, {} without any.

    One for each grader, for exact match, the retention set and the labels of a classification.
    """
    suites: dict[str, list[ItemResult]] = {}
    purposes: dict[str, str] = {}
    for entry in read_jsonl(folder / HELD_OUT):
        if entry["when"] != "after":
            continue
        for name, score in _scores(entry):
            purposes[name] = "retention" if entry["evaluation"] == "retention" else "task"
            items = suites.setdefault(name, [])
            items.append(_item(entry, score))
    return {
        name: SuiteResult(
            name,
            {**HELD_OUT_SETTINGS, "purpose": purposes[name]},
            "",
            _with_unique_ids(items),
            {MEAN_GRADE if name.startswith(GRADER) else "correct": estimate(GRADE, items)},
        )
        for name, items in suites.items()
    }


def _scores(entry: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield name and score of what an entry of held_out.jsonl was graded by."""
    if "correct" in entry:
        name = "retention" if entry["evaluation"] == "retention" else "exact match"
        yield name, float(entry["correct"])
    if entry["evaluation"] == "classification":
        yield "label accuracy", float(entry["completion"] == entry["expected"])
    for name, grade in entry.get("grades", {}).items():
        if grade is not None:
            yield f"{GRADER}{name}", float(grade)


def _item(entry: Mapping[str, Any], score: float) -> ItemResult:
    # Rows of a classification have a location instead of a prompt.
    prompt = str(entry.get("prompt") or entry["location"])
    evidence = {"prompt": prompt, "expected": entry.get("expected", ""), "completion": entry["completion"]}
    return ItemResult(prompt, prompt, "", {SCORE: score}, evidence)


def _with_unique_ids(items: Sequence[ItemResult]) -> list[ItemResult]:
    """Return items whose id is the prompt; a repeated prompt keeps its cluster and gets a number."""
    counts: dict[str, int] = {}
    unique = []
    for item in items:
        number = counts[item.id] = counts.get(item.id, 0) + 1
        unique.append(item if number == 1 else replace(item, id=f"{item.id} ({number})"))
    return unique
