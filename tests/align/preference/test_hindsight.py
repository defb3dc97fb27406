"""Chain of hindsight: the order of completions and control texts, and the loss mask."""

from math import nan

import pytest
from small_tokenizers import tokenizer

from align.preference.hindsight import chains, questions
from align.preference.rows.judged import Comparison
from data_templates._segments import Message
from finetune.data.conversation import wishing
from finetune.data.tokens import Encoder

GOOD, BAD = "Answer well.", "Answer badly."


def said(role: str, text: str) -> Message:
    return Message(role, text)  # type: ignore[arg-type]


def ranked(*replies: str, where: str = "f:1") -> Comparison:
    prompt = (said("user", "one"), said("assistant", "two"), said("user", "three"))
    answers = tuple(said("assistant", reply) for reply in replies)
    return Comparison(prompt, answers, (nan,) * len(replies), tuple(range(len(replies))), nan, where)


def test_the_best_and_the_worst_stand_behind_the_words_that_ask_for_them():
    rows = [ranked("best", "middle", "worst", where=f"f:{line}") for line in range(40)]
    talks = chains(rows, good=GOOD, bad=BAD, seed=0)
    orders = set()
    for talk in talks:
        texts = [turn.content for turn in talk.messages]
        assert texts[:2] == ["one", "two"] and len(texts) == 6
        asked_for = [(texts[2].removeprefix("three\n\n"), texts[3]), (texts[4], texts[5])]
        assert sorted(asked_for) == [(BAD, "worst"), (GOOD, "best")]
        orders.add(tuple(asked_for))
    assert len(orders) == 2, "both orders occur"
    assert [talk.where for talk in talks] == [row.where for row in rows]


def test_the_order_is_drawn_with_the_seed():
    rows = [ranked("a", "b", where=f"f:{line}") for line in range(20)]
    first, again, other = (chains(rows, good=GOOD, bad=BAD, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("template", ["chatml", "llama2", "vicuna"])
def test_completions_are_learnt_and_feedback_and_history_are_not(template):
    encoder = Encoder(tokenizer("qwen"), template)
    [talk] = chains([ranked("good reply", "bad reply")], good=GOOD, bad=BAD, seed=0)
    encoded = encoder.encode(talk.messages)
    pairs = zip(encoded.input_ids, encoded.trained, strict=True)
    learnt = encoder.tokenizer.decode([token for token, trained in pairs if trained])
    assert "good reply" in learnt and "bad reply" in learnt
    assert not any(words in learnt for words in ("two", "three", GOOD, BAD))


def test_a_tuned_model_is_asked_for_a_good_answer_in_the_words_that_it_learnt():
    encoder = Encoder(tokenizer("qwen"), "chatml", wish=GOOD)
    row = ranked("good reply", "bad reply")
    [talk] = [
        talk
        for seed in range(9)
        for talk in chains([row], good=GOOD, bad=BAD, seed=seed)
        if talk.messages[3].content == "good reply"
    ][:1]
    asked = encoder.encode_prompt(row.prompt)
    assert encoder.encode(talk.messages).input_ids[: len(asked)] == asked
    assert wishing(row.prompt, "") is row.prompt


def test_a_question_is_asked_once_with_its_best_completion():
    found = questions([ranked("a", "b"), ranked("c", "d", where="f:2")])
    assert [(talk.messages[-1].content, talk.where) for talk in found] == [("a", "f:1")]
