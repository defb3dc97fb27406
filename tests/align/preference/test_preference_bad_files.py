"""Invalid preference files: one message each, with file, line, field, expected value and repair."""

import json

import pytest
from small_preferences import pair, prepared

from finetune.recipe.errors import UserError

ASKED = [{"role": "user", "content": "q"}]
LISTED = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
VOTES = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1}
ANSWERS = {"instruction": "q", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}
JUDGED = {
    "questions": ["q"],
    "answers": [{"outputs": ["a"], "judge_scores": [1]}, {"outputs": ["b"], "judge_scores": [2]}],
}
LABELLED = {"prompt": "q", "completion": "a", "label": True}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}

FIELDS = {
    "chosen is a number": (pair(), {"chosen": 5}, "field 'chosen': found 5", "text, or a list of turns"),
    "rejected is null": (
        pair(),
        {"rejected": None},
        "field 'rejected': missing or null",
        "prompt+chosen+rejected",
    ),
    "prompt is a number": (pair(), {"prompt": 7}, "field 'prompt': found 7", "a list of turns"),
    "text beside turns": (
        {"prompt": ASKED, "chosen": "a", "rejected": "b"},
        {"rejected": [{"role": "assistant", "content": "b"}]},
        "field 'rejected': a list of turns, but chosen is text",
        "the same type in both columns",
    ),
    "an empty list": (
        {"prompt": ASKED, "chosen": ASKED, "rejected": ASKED},
        {"chosen": [], "rejected": []},
        "field 'chosen': found []",
        "a list of turns",
    ),
    "an unknown role": (
        {"prompt": ASKED, "chosen": ASKED, "rejected": ASKED},
        {"chosen": [{"role": "narrator", "content": "a"}]},
        "field 'chosen[0].role': found 'narrator'",
        "one of system, user",
    ),
    "a turn without content": (
        {"prompt": ASKED, "chosen": ASKED, "rejected": ASKED},
        {"chosen": [{"role": "assistant"}]},
        "field 'chosen[0]': found {'role': 'assistant'}",
        "an object with role and content",
    ),
    "no prompt at all": (HH, {"chosen": "a"}, "field 'chosen': a reply without a prompt, 'a'", "Human:"),
    "an unpaired surrogate": (
        pair(),
        {"chosen": "\ud83d"},
        "field 'chosen': an unpaired surrogate",
        "valid Unicode",
    ),
    "a score for one alone": (
        pair(score_chosen=1, score_rejected=0),
        {"score_rejected": None},
        "field 'score_rejected': missing or null, but score_chosen is given",
        "a score for both, or for none",
    ),
    "a score in words": (
        pair(score_chosen=1, score_rejected=0),
        {"score_chosen": "good"},
        "field 'score_chosen': found 'good'",
        "a finite number",
    ),
    "a negative margin": (pair(margin=1), {"margin": -1}, "field 'margin': found -1", "0 or more"),
    "responses are text": (
        LISTED,
        {"responses": "a"},
        "field 'responses': found 'a'",
        "a list of completions",
    ),
    "a single response": (
        LISTED,
        {"responses": ["a"], "scores": [1]},
        "field 'responses': a list of 1",
        "at least two completions",
    ),
    "too few scores": (
        LISTED,
        {"scores": [1]},
        "field 'scores': 1 for 2 responses",
        "one per entry of responses",
    ),
    "a score of NaN": (
        LISTED,
        {"scores": [1, float("nan")]},
        "field 'scores[1]': found nan",
        "a finite number",
    ),
    "a truth value for a score": (LISTED, {"scores": [1, True]}, "field 'scores[1]': found True", "number"),
    "scores are one number": (LISTED, {"scores": 3}, "field 'scores': found 3", "a list of numbers"),
    "a response of null": (LISTED, {"responses": ["a", None]}, "field 'responses[1]': found None", "text"),
    "an answer without a score": (
        ANSWERS,
        {"answers": [{"text": "a", "score": 1}, {"text": "b"}]},
        "field 'answers[1]': found {'text': 'b'}",
        "an object with 'score'",
    ),
    "outputs are text": (
        JUDGED,
        {"answers": [{"outputs": "a", "judge_scores": [1]}, {"outputs": ["b"], "judge_scores": [1]}]},
        "field 'answers[0].outputs': found 'a'",
        "a list of answers, one per question",
    ),
    "no question": (JUDGED, {"questions": []}, "field 'questions': found []", "a list of questions"),
    "an unknown vote": (
        VOTES,
        {"annotator1": 3},
        "field 'annotator1': found 3",
        "1 or 2 (the better response)",
    ),
    "a vote in words": (VOTES, {"annotator1": "left"}, "field 'annotator1': found 'left'", "0 (a tie)"),
    "an unknown label": (LABELLED, {"label": "fine"}, "field 'label': found 'fine'", "true, 1 or good"),
    "a label of 2": (LABELLED, {"label": 2}, "field 'label': found 2", "false, 0 or bad"),
    "a label of null": (
        LABELLED,
        {"label": None},
        "field 'label': missing or null",
        "prompt+completion+label",
    ),
}
"""A valid row, the invalid fields of the second row, and the found and expected parts of the message."""


def error_message(rows, tmp_path, **settings):
    """Return the message for a file of these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepared(str(path), **settings)
    assert len(caught.value.problems) == 1
    return str(caught.value).replace(str(path), "rows.jsonl")


@pytest.mark.parametrize("case", FIELDS)
def test_invalid_field(case, tmp_path):
    good, wrong, found, expected = FIELDS[case]
    kind = "labels" if "label" in good else "rankings"
    text = error_message([good, {**good, **wrong}, good], tmp_path, kind=kind)
    assert text.startswith(f"rows.jsonl:2: {found}"), text
    assert expected in text.split("expected: ")[1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "q", "chosen": "a"}], {}, "no known layout has columns prompt, chosen"),
        ([{"chosen": HH["chosen"]}], {}, "no known layout has columns chosen"),
        (
            [{"frage": "q", "gut": "a"}],
            {},
            "data.columns={prompt: QUESTION, chosen: BETTER, rejected: WORSE}",
        ),
        ([pair()], {"columns": {"chosen": "gud"}}, "'chosen' is mapped to 'gud', but"),
        ([LABELLED], {}, "layout prompt/completion/label: labels are for KTO"),
        ([LISTED], {"kind": "labels"}, "layout prompt/responses/scores: ranked lists are for a reward model"),
        (
            [pair(rejected="good")],
            {},
            "no usable comparison: rows dropped: identical chosen and rejected: 1",
        ),
        (
            [pair(score_chosen=1, score_rejected=2)],
            {},
            "1 of 1 scored pairs have a higher score for rejected",
        ),
        ([pair()], {"held_out": 1}, "data.held_out: 1 of 1 usable rows"),
        ([pair(), pair(chosen="c")], {"held_out": 1}, "1 of 2 usable rows, but every prompt has more"),
        ([pair()], {"max_length": 64, "max_prompt_length": 64}, "data.max_prompt_length: 64, but prompt and"),
        ([pair("x" * 99)], {"max_length": 8, "overflow": "drop"}, "raise data.max_length"),
        (
            [{"conversations": [{"from": "gpt", "value": "q"}], "chosen": "a", "rejected": "b"}],
            {},
            "no rows to train on: ",
        ),
        (
            [
                {
                    "messages": [*ASKED, {"role": "assistant", "content": "a"}] * 2,
                    "chosen": "a",
                    "rejected": "b",
                }
            ],
            {"template": "alpaca"},
            "dropped: the template cannot render the conversation: 1 (first: rows.jsonl:1: the turns are",
        ),
    ],
)
def test_invalid_file(rows, settings, message, tmp_path):
    assert message in error_message(rows, tmp_path, **settings)


def test_many_bad_rows_report_the_first_five(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(pair(chosen=3)) + "\n") * 9)
    with pytest.raises(UserError) as caught:
        prepared(str(path))
    assert len(caught.value.problems) == 6
    assert "and 4 more rows: 9 of 9 rows do not fit" in str(caught.value)
