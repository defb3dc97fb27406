"""Published layouts of preference data are recognized and parsed into prompts and scored completions."""

from math import isnan

import pytest
from small_preferences import pair, read

from data_templates.segments import Message

S, U, A = (
    lambda text, **more: Message("system", text, **more),
    lambda text, **more: Message("user", text, **more),
    lambda text, **more: Message("assistant", text, **more),
)
HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
LISTED = [{"role": "user", "content": "q"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]


def assistant_turns(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("row", "name", "prompt"),
    [
        (
            {"chosen": f"{HH} good", "rejected": f"{HH} bad"},
            "chosen/rejected",
            (U("one"), A("two"), U("three")),
        ),
        (
            {"prompt": HH, "chosen": "good", "rejected": "bad"},
            "prompt/chosen/rejected",
            (U("one"), A("two"), U("three")),
        ),
        (pair(), "prompt/chosen/rejected", (U("q"),)),
        (pair(system="s"), "prompt/chosen/rejected", (S("s"), U("q"))),
        (
            {"prompt": LISTED, "chosen": assistant_turns("good"), "rejected": assistant_turns("bad")},
            "prompt/chosen/rejected",
            (U("q"),),
        ),
        (
            {"chosen": LISTED + assistant_turns("good"), "rejected": LISTED + assistant_turns("bad")},
            "chosen/rejected",
            (U("q"),),
        ),
        (
            {
                "chosen": LISTED + assistant_turns("good"),
                "rejected": LISTED + assistant_turns("bad"),
                "system": "s",
            },
            "chosen/rejected",
            (S("s"), U("q")),
        ),
        (
            {
                "conversations": SHARED,
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            "ShareGPT with ranking",
            (S("s"), U("q")),
        ),
        (
            {"messages": LISTED, "chosen": assistant_turns("good")[0], "rejected": assistant_turns("bad")[0]},
            "messages with ranking",
            (U("q"),),
        ),
        (
            {"instruction": "q", "input": "c", "chosen": "good", "rejected": "bad"},
            "Alpaca with ranking",
            (U("q", context="c"),),
        ),
        (
            {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
            "question/chosen/rejected",
            (S("s"), U("q")),
        ),
    ],
)
def test_pairs(row, name, prompt):
    layout, judged = read(row)
    assert layout == name and judged.ordered
    assert [answer.prompt for answer in judged.completions] == [prompt, prompt]
    assert [answer.reply for answer in judged.completions] == [A("good"), A("bad")]
    assert all(isnan(answer.score) for answer in judged.completions) and isnan(judged.margin)


def test_ultrafeedback_has_extra_columns():
    row = {
        "prompt": "q",
        "prompt_id": "7f",
        "chosen": LISTED + assistant_turns("good"),
        "rejected": LISTED + assistant_turns("bad"),
        "messages": LISTED + assistant_turns("good"),
        "score_chosen": 8.5,
        "score_rejected": 8,
    }
    name, judged = read(row)
    assert name == "prompt/chosen/rejected"
    assert [answer.prompt for answer in judged.completions] == [(U("q"),)] * 2
    assert [answer.score for answer in judged.completions] == [8.5, 8.0]


def test_a_margin_is_read_from_a_column_and_numbers_from_text():
    row = pair(margin="1.5", score_chosen="3", score_rejected="2")
    judged = read(row)[1]
    assert judged.margin == 1.5 and [answer.score for answer in judged.completions] == [3.0, 2.0]


def test_ranked_lists():
    name, judged = read({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]})
    assert name == "prompt/responses/scores" and not judged.ordered
    assert [(a.reply.content, a.score) for a in judged.completions] == [("a", 1.0), ("b", 3.0), ("c", 2.0)]
    name, judged = read(
        {"prompt": LISTED, "responses": [assistant_turns("a"), assistant_turns("b")], "ranks": [2, 1]}
    )
    assert name == "prompt/responses/ranks"
    assert [answer.score for answer in judged.completions] == [-2.0, -1.0]


def test_alpaca_eval_and_logickor():
    answers = [{"model": "m", "text": "a", "score": 0.5}, {"model": "n", "text": "b", "score": 0}]
    name, judged = read({"instruction": "q", "dataset": "d", "answers": answers})
    assert name == "instruction with scored answers"
    assert [(a.reply.content, a.score) for a in judged.completions] == [("a", 0.5), ("b", 0.0)]
    answers = [
        {"model": "m", "outputs": ["a", "later"], "judge_scores": [8.0, 10.0]},
        {"model": "n", "outputs": ["b", "later"], "judge_scores": [9.0, 0.0]},
    ]
    name, judged = read({"questions": ["first", "second"], "references": [None, None], "answers": answers})
    assert name == "questions with judged answers"
    assert [(a.prompt, a.reply.content, a.score) for a in judged.completions] == [
        ((U("first"),), "a", 8.0),
        ((U("first"),), "b", 9.0),
    ]
    assert "later questions" in judged.notes[0]


def test_ultrafeedback_s_lists_are_scored_by_the_mean_of_their_aspects():
    scores = [(7.5, 4.0), (10.0, 2.25)]  # the published overall scores hold 10s that were 1s
    completions = [
        {"model": "m", "response": text, "overall_score": overall, "fine-grained_score": mean}
        for text, (overall, mean) in zip("ab", scores, strict=True)
    ]
    name, judged = read({"source": "evol", "instruction": "q", "completions": completions})
    assert name == "UltraFeedback" and not judged.ordered
    assert [(a.prompt, a.reply, a.score) for a in judged.completions] == [
        ((U("q"),), A("a"), 4.0),
        ((U("q"),), A("b"), 2.25),
    ]


@pytest.mark.parametrize(
    ("votes", "scores"),
    [
        ((1, 1, 1), [3.0, 0.0]),
        ((2, 2, 0), [0.0, 2.0]),
        ((1, "2", 1), [2.0, 1.0]),
        ((0, 1, 2), [0.0, 0.0]),
        ((0, 0, 1), [0.0, 0.0]),
    ],
)
def test_pandalm_s_majority(votes, scores):
    row = {"instruction": "q", "input": "c", "response1": "a", "response2": "b"}
    name, judged = read(row | {f"annotator{i}": vote for i, vote in enumerate(votes, 1)})
    assert name == "PandaLM votes" and judged.completions[0].prompt == (U("q", context="c"),)
    assert [answer.score for answer in judged.completions] == scores


def test_bools_become_text_and_are_reported():
    row = {"instruction": "q", "response1": True, "response2": "No", "annotator1": 1}
    judged = read(row)[1]
    assert judged.completions[0].reply == A("True") and "true/false" in judged.notes[0]


@pytest.mark.parametrize(
    ("label", "score"), [(True, 1.0), (False, 0.0), (1, 1.0), ("0", 0.0), ("True", 1.0), ("false", 0.0)]
)
def test_labels(label, score):
    rows = {
        "messages with label": {"messages": LISTED + assistant_turns("a"), "label": label},
        "prompt/completion/label": {"prompt": "q", "completion": "a", "label": label},
        "ShareGPT with label": {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "label": label,
        },
    }
    for expected, row in rows.items():
        name, judged = read(row)
        [answer] = judged.completions
        assert (name, answer.prompt, answer.reply, answer.score) == (expected, (U("q"),), A("a"), score)


def test_columns_are_mapped_and_can_be_swapped():
    row = {"frage": "q", "gut": "a", "schlecht": "b"}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    assert [answer.reply for answer in read(row, columns)[1].completions] == [A("a"), A("b")]
    swapped = read(pair(), {"chosen": "rejected", "rejected": "chosen"})[1]
    assert [answer.reply for answer in swapped.completions] == [A("bad"), A("good")]


def test_dialogue_ending_with_a_user_turn_has_no_reply():
    row = {"chosen": f"{HH} good", "rejected": "\n\nHuman: one"}
    assert [answer.reply for answer in read(row)[1].completions] == [A("good"), None]
