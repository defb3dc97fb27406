"""Suites of task ``preference``: a judge compares completions of two models, or with the rows' replies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.evaluation.held_out import SuiteItems
from align.evaluation.judges import JudgeReport, Judgment, Pair, PairJudge, Verdict
from finetune.evaluation.answer_cache import digest
from finetune.evaluation.answers import CompletionAnswer
from finetune.evaluation.intervals import suite_estimates
from finetune.evaluation.items import SCORE, EvalItem, ItemResult
from finetune.evaluation.results import SuiteResult
from finetune.evaluation.run_suite import PROMPT_CHARACTERS, suite_fingerprint
from finetune.recipe.errors import Problem, UserError

SCORES: Mapping[Verdict, float] = {"A": 1.0, "tie": 0.5, "B": 0.0}
"""A win counts 1, a tie one half."""


@dataclass(frozen=True)
class JudgedSuite:
    """Results of a suite that a judge has scored.

    Attributes:
        result: of the model.
        against: of the other model, whose scores are the complement; None against the rows' own replies.
    """

    result: SuiteResult
    against: SuiteResult | None


def judge_suite(
    entry: SuiteItems,
    judge: PairJudge,
    completions: Sequence[CompletionAnswer],
    others: Sequence[CompletionAnswer] | None,
) -> JudgedSuite:
    """Return the win rates of two models' completions, or of one model's against the rows' replies.

    Args:
        entry: the suite with its items.
        judge: compares them.
        completions: of the model, one for each item.
        others: of the other model; None: the rows' own replies.

    Raises:
        UserError: a row has no reply to compare with, or the judge fails.
    """
    other_texts = _replies(entry) if others is None else [completion.text for completion in others]
    pairs = [
        Pair(item.prompt, completion.text, other, item.reference, item.id, item.columns)
        for item, completion, other in zip(entry.items, completions, other_texts, strict=True)
    ]
    judgments = judge.compare(pairs)
    scores = [None if entry.verdict is None else SCORES[entry.verdict] for entry in judgments]
    notes = [f"judge {judge.label}: {line}" for line in JudgeReport.of(judgments).lines()]
    first = _result(entry, judge, _item_results(entry.items, pairs, judgments, scores), notes)
    if others is None:
        return JudgedSuite(first, None)
    swapped = [pair.swapped for pair in pairs]
    complements = [None if score is None else 1 - score for score in scores]
    second = _result(entry, judge, _item_results(entry.items, swapped, judgments, complements), [])
    return JudgedSuite(first, second)


def _replies(entry: SuiteItems) -> list[str]:
    if missing := [item.id for item in entry.items if not item.reference]:
        actual = f"{len(missing):,} of {len(entry.items):,} rows have no reply (first: {missing[0]})"
        expected = "another model, or a reply in each row"
        raise UserError(Problem(str(entry.suite.path), actual, expected, "--against MODEL"))
    return [item.reference or "" for item in entry.items]


def _item_results(
    items: Sequence[EvalItem],
    pairs: Sequence[Pair],
    judgments: Sequence[Judgment],
    scores: Sequence[float | None],
) -> list[ItemResult]:
    return [
        ItemResult(
            item.id,
            item.cluster or item.id,
            item.group,
            {} if score is None else {SCORE: score},
            {
                "prompt": "\n".join(turn.full_text for turn in item.prompt)[:PROMPT_CHARACTERS],
                "completion": pair.completion_a,
                "compared_with": pair.completion_b,
                "judge": dict(judgment.evidence),
            },
        )
        for item, pair, judgment, score in zip(items, pairs, judgments, scores, strict=True)
    ]


def _result(
    entry: SuiteItems, judge: PairJudge, results: Sequence[ItemResult], notes: Sequence[str]
) -> SuiteResult:
    metrics, groups = suite_estimates(entry.suite.metrics, results)
    settings = entry.suite.settings
    return SuiteResult(
        suite=entry.suite.name,
        settings=settings.model_dump(mode="json"),
        fingerprint=digest([suite_fingerprint(settings, entry.items), dict(judge.identity)])[:16],
        items=results,
        metrics=metrics,
        groups=groups,
        notes=notes,
    )
