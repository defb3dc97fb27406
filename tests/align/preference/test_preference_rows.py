"""Rows without a usable comparison are dropped, counted and reported with the first location."""

from math import isnan

import pytest
from small_preferences import compare, pair

from finetune.recipe.errors import UserError

GOOD = pair()
SCORED = {"score_chosen": 2, "score_rejected": 1}


def ranked(scores, responses="abcdefgh", prompt="q"):
    return {"prompt": prompt, "responses": list(responses[: len(scores)]), "scores": scores}


def hh(prompt, chosen, rejected, other=None):
    texts = [
        f"\n\nHuman: {question}\n\nAssistant: {reply}"
        for question, reply in ((prompt, chosen), (other or prompt, rejected))
    ]
    return {"chosen": texts[0], "rejected": texts[1]}


def replies(row):
    return [reply.content for reply in row.replies]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(rejected=" good "), "dropped: identical chosen and rejected"),
        (pair(rejected=" "), "dropped: empty completion"),
        (pair(prompt=" "), "dropped: empty turn in the prompt"),
        (hh("q", "a", "b", other="another"), "dropped: chosen and rejected have different prompts"),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "dropped: a dialogue without a final reply"),
        (pair(score_chosen=1, score_rejected=1), "dropped: tie"),
        (
            pair(score_chosen=1, score_rejected=2),
            "dropped: the rejected completion has the higher score",
        ),
        (ranked([1, 1, 1]), "dropped: tie"),
        (ranked([2, 1], "aa"), "dropped: identical chosen and rejected"),
        (ranked([3, 2, 1], "aaa"), "dropped: fewer than two distinct completions"),
        (ranked([3, 2, 1], ["a", "", " "]), "dropped: fewer than two distinct completions"),
        ({"prompt": "q", "completion": "", "label": True}, "dropped: empty completion"),
        (
            {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2},
            "dropped: tie",
        ),
    ],
)
def test_unusable_rows_are_dropped_and_counted(row, message):
    rows, report = compare(pair(**SCORED), pair(**SCORED), pair(**SCORED), row)
    assert len(rows) == 3
    assert report.counts[message] == 1
    assert f"rows {message}: 1 (first: file:4)" in report.lines()


def test_different_prompts_can_be_unified():
    [row], report = compare(hh("mine", "a", "b", other="yours"), on_different_prompts="chosen")
    assert [turn.content for turn in row.prompt] == ["mine"] and replies(row) == ["a", "b"]
    assert report.counts == {
        "with different prompts of chosen and rejected: the chosen one's is used for both": 1
    }


def test_whitespace_does_not_make_prompts_different():
    [row], report = compare(hh("q", "a", "b", other="q  "))
    assert replies(row) == ["a", "b"] and report.counts == {}


def test_tied_pairs_can_keep_the_row_s_order():
    [row], report = compare(pair(score_chosen=1, score_rejected=1), on_tie="keep")
    assert row.ranks == (0, 1) and row.margin == 0.0
    assert report.counts == {"with tied scores, kept in the row's order": 1}


def test_tied_lists_and_votes_are_dropped():
    rows, report = compare(pair(), ranked([1, 1]), on_tie="keep")
    assert len(rows) == 1 and report.counts == {"dropped: tie": 1}


def test_lists_are_sorted_and_ties_share_a_rank():
    [row], report = compare(ranked([1, 5, 3, 3, 0.5]))
    assert replies(row) == ["b", "c", "d", "a", "e"]
    assert row.scores == (5, 3, 3, 1, 0.5) and row.ranks == (0, 1, 1, 3, 4) and row.margin == 4.5
    assert report.counts == {"with tied completions, which share a rank": 1}


def test_lists_lose_duplicates_and_empty_completions():
    [row], report = compare(ranked([1, 2, 3, 4], ["a", "b", "", "a "]))
    assert replies(row) == ["a ", "b"] and row.scores == (4, 2) and row.ranks == (0, 1)
    assert report.counts == {
        "with empty completions, which are dropped": 1,
        "with duplicate completions, which are dropped": 1,
    }


def test_margins():
    rows, _ = compare(pair(), pair(**SCORED), pair(**SCORED, margin=3))
    assert isnan(rows[0].margin) and isnan(rows[0].scores[0]) and rows[0].ranks == (0, 1)
    assert [row.margin for row in rows[1:]] == [1.0, 3.0]
    assert rows[1].scores == (2.0, 1.0)


def test_swapped_columns_are_refused():
    wrong = pair(score_chosen=1, score_rejected=2)
    with pytest.raises(UserError) as caught:
        compare(GOOD, wrong, wrong, pair(**SCORED))
    text = str(caught.value)
    assert text.startswith("file:2: 2 of 3 scored pairs have a higher score for rejected")
    assert "data.columns={chosen: rejected, rejected: chosen}" in text


def test_labels_have_one_completion():
    [good, bad], _ = compare(
        {"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "completion": "b", "label": 0}
    )
    assert (replies(good), good.scores, good.ranks) == (["a"], (1.0,), (0,))
    assert bad.scores == (0.0,) and good.text_key != bad.text_key
