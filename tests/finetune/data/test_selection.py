"""Row selection: what ``select`` selects, counts and reports."""

import json
from pathlib import Path

import pytest

from finetune.data.conversation_rows import ConversationRows
from finetune.data.load import load_rows
from finetune.data.report import DataReport
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings


def rows(count: int = 10):
    return [
        {"instruction": f"q{i}", "output": "x" * (i + 1), "score": f"{4 + (i % 3) / 2}", "other": None}
        for i in range(count)
    ]


def select_from(source, seed: int = 0, **select):
    report = DataReport()
    data = DataSettings(source=source, select=select)
    train, _ = load_rows(ConversationRows(), data, seed, report, DataReport())
    return [row.messages[0].content for row in train], report


def test_by_the_length_of_the_replies():
    selected, report = select_from(rows(), min_reply_characters=3, max_reply_characters=6)
    assert selected == ["q2", "q3", "q4", "q5"]
    assert report.counts == {
        "dropped: replies shorter than 3 characters": 2,
        "dropped: replies longer than 6 characters": 4,
    }
    assert report.examples["dropped: replies longer than 6 characters"] == "row 7"


def test_by_rating_as_alpagasus():
    selected, report = select_from(rows(), score="score", min_score=4.5)
    assert selected == ["q1", "q2", "q4", "q5", "q7", "q8"]
    assert report.counts == {"dropped: score below 4.5": 4} and report.examples == {
        "dropped: score below 4.5": "row 1"
    }
    assert report.sources[0].num_read == 10 and report.sources[0].num_usable == 6


def test_n_rows_as_lima_are_sampled_with_the_seed():
    first, report = select_from(rows(100), rows=10)
    assert len(first) == 10 and report.counts == {"dropped: select.rows=10": 90}
    assert first == sorted(first, key=lambda name: int(name[1:])), "in the order of the file"
    assert select_from(rows(100), rows=10)[0] == first
    assert select_from(rows(100), seed=1, rows=10)[0] != first
    assert len(select_from(rows(8), rows=10)[0]) == 8


def test_the_longest_and_the_best():
    assert select_from(rows(), rows=3, rows_by="length")[0] == ["q7", "q8", "q9"]
    # 5.0 is at 2, 5 and 8; the fourth is the first of those rated 4.5.
    assert select_from(rows(), score="score", rows=4, rows_by="score")[0] == ["q1", "q2", "q5", "q8"]


def test_near_duplicates_are_dropped_and_reported():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    source = [
        {"instruction": long, "output": "yes"},
        {"instruction": "another question", "output": "no"},
        {"instruction": long.title() + "!", "output": "yes"},
    ]
    selected, report = select_from(source, near_dedup=0.8)
    assert selected == [long, "another question"]
    assert report.counts == {"dropped: at least 80% identical to an earlier row": 1}
    assert list(report.examples.values()) == ["row 3 repeats row 1"]


def test_rating_comes_before_the_number_of_rows():
    selected, report = select_from(rows(30), score="score", min_score=5, rows=4, rows_by="length")
    assert selected == ["q20", "q23", "q26", "q29"]
    assert report.counts == {"dropped: score below 5": 20, "dropped: select.rows=4": 6}


def test_duplicates_are_counted_without_select():
    source = [*rows(3), *rows(2)]
    report = DataReport()
    train, _ = load_rows(ConversationRows(), DataSettings(source=source), 0, report, DataReport())
    assert len(train) == 5 and report.counts == {"identical to an earlier row (not dropped)": 2}
    assert report.examples == {"identical to an earlier row (not dropped)": "row 4 repeats row 1"}


def test_held_out_duplicates_of_training_rows_are_reported(tmp_path: Path):
    other = tmp_path / "held_out.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    aside = DataReport()
    load_rows(ConversationRows(), DataSettings(source=rows(3), held_out=str(other)), 0, DataReport(), aside)
    assert aside.counts == {"identical to a training row": 2}
    assert aside.examples == {"identical to a training row": f"{other}:1 repeats row 1"}


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"score": "rating", "min_score": 1}, "the source has no column 'rating'"),
        ({"score": "other", "min_score": 1}, "row 1: field 'other': found None"),
        ({"score": "instruction", "min_score": 1}, "row 1: field 'instruction': found 'q0'"),
        (
            {"score": "score", "min_score": 9},
            "data.source: no row to train on: rows dropped: score below 9",
        ),
    ],
)
def test_bad_ratings_are_reported_with_row_and_column(select, message):
    with pytest.raises(UserError) as caught:
        select_from(rows(), **select)
    assert message in str(caught.value)


def test_many_bad_ratings_are_summarized():
    with pytest.raises(UserError) as caught:
        select_from(rows(20), score="other", min_score=1)
    assert len(caught.value.problems) == 6 and "20 of 20 rows do not fit" in str(caught.value)
