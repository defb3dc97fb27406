"""Columns that no layout reads are named; those that change the meaning of a row stop the run."""

from pathlib import Path
from typing import Any

import pytest
from row_reading import PAIR, A, Q, chat, read, turn
from small_preferences import prepared

from finetune.data.conversation_rows import ConversationRows
from finetune.data.load import load_rows
from finetune.data.report import DataReport
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings

IMAGE = {"images": ["a.png"]}
UNANSWERED = "end with a turn that has no reply (not used)"
MIXED = "have a system turn, which replaces their system column"
USER_LOSS = "mark a turn as trained that is no reply (not trained)"


def load(rows: list[dict[str, Any]], **settings: Any) -> DataReport:
    """Return the report of conversations."""
    report = DataReport()
    load_rows(ConversationRows(), DataSettings(source=rows, **settings), 0, report, DataReport())
    return report


def test_columns_that_are_not_read_are_named_in_one_line() -> None:
    rows = [
        chat(Q, turn("assistant", "a", id=3, logprobs=None), images=None, id=0, tags=[]),
        chat(turn("user", "q", name="Ann"), A, images=[], id=None, source="web", tags=[None]),
    ]
    assert load(rows).notes == ["columns not used: id, messages[].id, source, messages[].name"]


def test_a_column_that_changes_the_meaning_stops_the_run() -> None:
    rows = [chat(Q, A), chat(Q, A, label=True), chat(Q, A, label=False, **IMAGE)]
    with pytest.raises(UserError) as caught:
        load(rows)
    assert str(caught.value) == (
        "row 2: columns label, images have content that is not trained\n"
        "    expected: columns of layout messages, or data.ignore_columns\n"
        "    repair:   llm-align kto trains on labels; or 'data.ignore_columns=[label, images]'"
    )
    assert load(rows, ignore_columns=["label", "images"]).notes == []


def test_a_conversation_that_ends_with_the_user_is_counted() -> None:
    report = load([chat(Q, A), chat(Q, A, turn("user", "and?")), chat(Q, A, turn("user", ""))])
    assert report.counts[UNANSWERED] == 1 and report.examples[UNANSWERED] == "row 2"


def test_json_in_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    turns = '"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]"'
    path.write_text(f"messages,id\n{turns},7\n", encoding="utf-8")
    report = DataReport()
    [row], _ = load_rows(ConversationRows(), DataSettings(source=str(path)), 0, report, DataReport())
    assert [message.content for message in row.messages] == ["q", "a"]
    assert report.notes == ["columns not used: id"]


def test_a_margin_that_the_stage_does_not_use_is_named() -> None:
    rows = [PAIR | {"prompt": f"q{number}", "margin": 3} for number in range(3)]
    assert prepared(rows).report.notes[0] == "columns not used: margin"


CASES: list[tuple[str, dict[str, Any], list[str], bool]] = [
    # stage, row, lines, does it stop
    ("sft", chat(Q, A, label=3), ["columns not used: label"], False),
    ("sft", chat(Q, A, label="joy"), ["columns not used: label"], False),
    ("sft", chat(Q, A, label="False"), ["columns not used: label"], True),
    ("sft", chat(Q, A, label="bad"), ["columns not used: label"], True),
    ("sft", chat(Q, A, kto_tag=False), ["columns not used: kto_tag"], True),
    ("sft", chat(Q, A, score=4.5), ["columns not used: score"], False),
    ("sft", chat(Q, A, score=0), ["columns not used: score"], True),
    ("sft", chat(Q, A, chosen="a", rejected="b"), ["columns not used: chosen, rejected"], True),
    ("sft", chat(Q, A, chosen=[Q, A], rejected=[Q]), ["columns not used: chosen, rejected"], False),
    ("sft", chat(Q, A, loss_mask=[0, 1]), ["columns not used: loss_mask"], True),
    ("sft", chat(Q, A, video="v.mp4"), ["columns not used: video"], True),
    ("sft", chat(Q, turn("assistant", "a", audio={"id": "x"})), ["columns not used: messages[].audio"], True),
    ("sft", chat(Q, turn("assistant", "a", audio=None)), [], False),
    ("sft", chat(turn("user", "q", images=["a"]), A), ["columns not used: messages[].images"], True),
    (
        "sft",
        chat(Q, turn("assistant", "a", train_detail=[{"begin_offset": 0}])),
        ["columns not used: messages[].train_detail"],
        True,
    ),
    (
        "sft",
        chat(turn("user", [{"type": "text", "text": "q", "cache_control": {"type": "x"}}]), A),
        ["columns not used: messages[].content[].cache_control"],
        False,
    ),
    ("sft", chat(turn("system", "own"), Q, A, system="s"), [f"rows {MIXED}: 1 (first: file:1)"], False),
    ("sft", chat(turn("user", "q", train=True), A), [f"rows {USER_LOSS}: 1 (first: file:1)"], False),
    ("sft", chat(turn("user", "q", weight=0), A), [], False),
    ("sft", {"prompt": "q", "response": "a", "thinking": True}, ["columns not used: thinking"], False),
    ("pairs", PAIR | IMAGE, ["columns not used: images"], True),
    ("pairs", PAIR | {"label": 0, "score": 1}, ["columns not used: label, score"], False),
    (
        "pairs",
        {"instruction": "q", "answers": [{"text": t, "score": 1, "model": "m"} for t in "ab"]},
        ["columns not used: answers[].model"],
        False,
    ),
    ("labels", chat(Q, A, **{"label": "good", "": 7}), ["columns not used: ''"], False),
    ("labels", chat(Q, A, label=1, source="web"), ["columns not used: source"], False),
    ("prompts", {"prompt": "q", "answer": "a", "label": 0}, ["columns not used: answer, label"], False),
    ("prompts", {"prompt": "q", "audio": "a.wav"}, ["columns not used: audio"], True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_further_unused_columns(case: tuple[str, dict[str, Any], list[str], bool]) -> None:
    stage, row, lines, stops = case
    unused = read(stage, row)[1]
    assert unused.lines() == lines
    assert bool(unused.problems()) == stops


@pytest.mark.slow
def test_a_rating_that_selects_rows_is_used() -> None:
    rows = [chat(Q, A, score=0), chat(Q, A, score=1)]
    report = load(rows, select={"score": "score", "min_score": 1})
    assert report.notes == [] and report.sources[0].num_usable == 1


@pytest.mark.slow
def test_a_mapping_to_a_column_that_the_layout_does_not_read_is_refused() -> None:
    with pytest.raises(
        UserError, match="layout messages has no column 'sytem', which 'persona' is mapped to"
    ):
        load([chat(Q, A, persona="s")], columns={"sytem": "persona"})
