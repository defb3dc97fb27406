"""A judge's verdicts become win rates of both models; what it cannot judge counts nowhere."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from align.evaluation.held_out import SuiteItems
from align.evaluation.judges import Judgment, Pair
from align.evaluation.preference import judge_suite
from data_templates.segments import Message
from finetune.evaluation.answers import CompletionAnswer
from finetune.evaluation.items import EvalItem
from finetune.evaluation.suites import NamedSuite, Suite, SuiteData
from finetune.recipe.errors import UserError


class LongerIsBetter:
    """Prefers the longer completion; cannot judge an empty one."""

    label = "longer"
    identity = {"judge": "longer"}

    def compare(self, pairs: Sequence[Pair], *, progress: object = None) -> list[Judgment]:
        return [
            Judgment.of_scores(len(pair.completion_a), len(pair.completion_b))
            if pair.completion_a
            else Judgment(None)
            for pair in pairs
        ]


def entry(*references: str | None) -> SuiteItems:
    settings = Suite(description="", task="preference", data=SuiteData(source="rows.jsonl"))
    items = [
        EvalItem(str(number), (Message("user", "Why?"),), reference)
        for number, reference in enumerate(references)
    ]
    return SuiteItems(NamedSuite("mine", Path("mine.yaml"), settings), items)


def completions(*texts: str) -> list[CompletionAnswer]:
    return [CompletionAnswer(text, True) for text in texts]


def test_both_models_have_complementary_win_rates() -> None:
    own, other = completions("long", "a", "bb", ""), completions("s", "aa", "cc", "x")
    judged = judge_suite(entry(None, None, None, None), LongerIsBetter(), own, other)
    # Win, loss, tie, and one without a judgment.
    assert [item.score for item in judged.result.items] == [1, 0, 0.5, None]
    assert judged.against is not None
    assert [item.score for item in judged.against.items] == [0, 1, 0.5, None]
    win_rate = judged.result.metrics["win rate"]
    assert (win_rate.value, win_rate.count) == (0.5, 3)
    assert judged.result.items[1].evidence["compared_with"] == "aa"
    assert any("unusable: 1 pairs" in note for note in judged.result.notes)
    assert judged.result.fingerprint == judged.against.fingerprint


def test_without_another_model_the_rows_replies_are_the_opponent() -> None:
    judged = judge_suite(entry("ab", "abcd"), LongerIsBetter(), completions("abc", "abc"), None)
    assert judged.against is None
    assert [item.score for item in judged.result.items] == [1, 0]
    with pytest.raises(UserError, match=r"1 of 2 rows have no reply \(first: 1\)"):
        judge_suite(entry("ab", None), LongerIsBetter(), completions("abc", "abc"), None)
