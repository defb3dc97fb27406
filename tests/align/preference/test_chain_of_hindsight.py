"""Chain of hindsight: the order of completions and control texts, and the loss mask."""

from math import nan

import pytest
from small_tokenizers import tokenizer

from align.preference.rows.comparisons import Comparison
from align.stages.chain_of_hindsight import best_completion_prompts, build_chains
from data_templates.segments import Message
from finetune.data.conversation import with_control_suffix
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe

GOOD, BAD = "Answer well.", "Answer badly."


def message(role: str, text: str) -> Message:
    return Message(role, text)  # type: ignore[arg-type]


def ranked(*replies: str, where: str = "f:1") -> Comparison:
    prompt = (message("user", "one"), message("assistant", "two"), message("user", "three"))
    completions = tuple(message("assistant", reply) for reply in replies)
    return Comparison(prompt, completions, (nan,) * len(replies), tuple(range(len(replies))), nan, where)


def test_best_and_worst_follow_their_control_texts():
    rows = [ranked("best", "middle", "worst", where=f"f:{line}") for line in range(40)]
    conversations = list(build_chains(rows, good=GOOD, bad=BAD, seed=0))
    orders = set()
    for conversation in conversations:
        texts = [turn.content for turn in conversation.messages]
        assert texts[:2] == ["one", "two"] and len(texts) == 6
        controlled = [(texts[2].removeprefix("three\n\n"), texts[3]), (texts[4], texts[5])]
        assert sorted(controlled) == [(BAD, "worst"), (GOOD, "best")]
        orders.add(tuple(controlled))
    assert len(orders) == 2, "both orders occur"
    assert [conversation.location for conversation in conversations] == [row.location for row in rows]


def test_order_depends_on_the_seed():
    rows = [ranked("a", "b", where=f"f:{line}") for line in range(20)]
    first, again, other = (list(build_chains(rows, good=GOOD, bad=BAD, seed=seed)) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("template", ["chatml", "llama2", "vicuna"])
def test_loss_is_on_completions_only(template):
    encoder = Encoder(tokenizer("qwen"), template)
    [conversation] = build_chains([ranked("good reply", "bad reply")], good=GOOD, bad=BAD, seed=0)
    encoded = encoder.encode(conversation.messages)
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    trained_text = encoder.tokenizer.decode([token for token, trained in pairs if trained])
    assert "good reply" in trained_text and "bad reply" in trained_text
    assert not any(words in trained_text for words in ("two", "three", GOOD, BAD))


def test_generation_prompt_has_the_trained_control_text():
    encoder = Encoder(tokenizer("qwen"), "chatml", control_suffix=GOOD)
    row = ranked("good reply", "bad reply")
    [conversation] = [
        conversation
        for seed in range(9)
        for conversation in build_chains([row], good=GOOD, bad=BAD, seed=seed)
        if conversation.messages[3].content == "good reply"
    ][:1]
    prompt_ids = encoder.encode_prompt(row.prompt)
    assert encoder.encode(conversation.messages).input_ids[: len(prompt_ids)] == prompt_ids
    assert with_control_suffix(row.prompt, "") is row.prompt


def test_each_prompt_appears_once_with_its_best_completion():
    prompts = best_completion_prompts([ranked("a", "b"), ranked("c", "d", where="f:2")])
    assert [(conversation.messages[-1].content, conversation.location) for conversation in prompts] == [
        ("a", "f:1")
    ]


def test_equal_feedback_texts_are_refused() -> None:
    same = {"chain_of_hindsight.good": "Give an answer.", "chain_of_hindsight.bad": "Give an answer."}
    with pytest.raises(UserError, match=r"chain_of_hindsight.bad.*equal to chain_of_hindsight.good"):
        read_recipe("chain_of_hindsight", "quickstart", shortcuts=same)
