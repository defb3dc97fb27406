"""Loss mask: every reply, all tokens, the last reply; and turns with a train flag in the data."""

from typing import Any

import pytest
from small_tokenizers import tokenizer as small_tokenizer

from data_templates.segments import Message
from finetune.data.dataset import PreparedData, apply_loss_scope, build_loss_mask, prepare_conversations
from finetune.data.layouts import detect_layout
from finetune.data.readers import SourceRow
from finetune.data.rows import parse_rows
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings

ROLES = ("user", "assistant", "user", "assistant")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def turns(**flags: Any) -> dict[str, Any]:
    """Return a row of four turns; ``flags[reply_1]`` are additional keys of the first reply."""
    texts = ("one?", "first", "two?", "second")
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]
    messages[1] |= flags.get("reply_1", {})
    messages[3] |= flags.get("reply_2", {})
    return {"messages": messages}


def read(row: dict[str, Any], loss_on: str = "assistant") -> PreparedData:
    encoder = Encoder(small_tokenizer("qwen"), "chatml")
    settings = DataSettings(source=[row], template="chatml", loss_on=loss_on)
    return prepare_conversations(settings, encoder, max_length=500, seed=0)


def trained_text(data: PreparedData) -> str:
    row = data.train[0]
    return small_tokenizer("qwen").decode(row["input_ids"][row["labels"] != -100])


END = "<|im_end|>"


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", f"first{END}second{END}"),
        ("last_assistant", f"second{END}"),
        (
            "all",  # all but the first token, <|im_start|>, which follows nothing
            f"user\none?{END}\n<|im_start|>assistant\nfirst{END}\n"
            f"<|im_start|>user\ntwo?{END}\n<|im_start|>assistant\nsecond{END}",
        ),
    ],
)
def test_loss_mask_of_each_scope(loss_on: str, expected: str) -> None:
    data = read(turns(), loss_on)
    assert trained_text(data).replace(f"{END}\n", END).rstrip() == expected.replace(f"{END}\n", END)
    assert data.train[0]["labels"][0] == -100


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"trained": False}, {"weight": 0.0}])
def test_turns_that_the_data_marks_carry_no_loss(flag: dict[str, Any]) -> None:
    assert trained_text(read(turns(reply_1=flag))) == f"second{END}"
    assert trained_text(read(turns(reply_2=flag))) == f"first{END}"


@pytest.mark.parametrize("flag", [{"train": True}, {"weight": 1}, {"train": None}, {"weight": 1.0}])
def test_turns_that_are_marked_as_trained(flag: dict[str, Any]) -> None:
    assert trained_text(read(turns(reply_1=flag))) == f"first{END}second{END}"


def test_sharegpt_turns_are_marked_too() -> None:
    conversation = [
        {"from": "human", "value": "one?", "train": False},
        {"from": "gpt", "value": "first", "train": False},
        {"from": "human", "value": "two?"},
        {"from": "gpt", "value": "second", "train": True},
    ]
    assert trained_text(read({"conversations": conversation})) == f"second{END}"


def test_a_last_reply_that_is_marked_leaves_nothing() -> None:
    with pytest.raises(UserError, match="dropped: no trained token"):
        read(turns(reply_2={"weight": 0}), "last_assistant")


def test_scope_all_trains_marked_turns_and_reports_it() -> None:
    data = read(turns(reply_1={"train": False}), "all")
    assert data.train.num_trained == data.train.num_tokens - 1
    assert data.report.counts == {"have turns marked train=false, trained anyway because data.loss_on=all": 1}
    assert read(turns(), "all").report.counts == {}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"train": "no"}, "field 'messages[1].train': found 'no'\n    expected: true or 1"),
        ({"weight": 0.5}, "field 'messages[1].weight': found 0.5"),
        ({"weight": 2}, "field 'messages[1].weight': found 2"),
        ({"trained": "false"}, "field 'messages[1].trained': found 'false'"),
    ],
)
def test_pain_24_invalid_train_flags_are_reported(flag: dict[str, Any], message: str) -> None:
    row = turns(reply_1=flag)
    with pytest.raises(UserError) as caught:
        parse_rows([SourceRow(row, "file:1")], detect_layout(row), None)
    assert str(caught.value).startswith(f"file:1: {message}")


def test_scope_last_changes_only_the_train_flags() -> None:
    conversation = [Message(role, role) for role in ROLES]
    marked = apply_loss_scope(conversation, "last_assistant")
    assert [turn.trained for turn in marked] == [False, False, False, True]
    assert [turn.content for turn in marked] == [turn.content for turn in conversation]
    assert (
        apply_loss_scope(conversation, "assistant") == apply_loss_scope(conversation, "all") == conversation
    )


def test_loss_mask_by_hand() -> None:
    assert build_loss_mask([False, True, False], "all") == [True, True, True]
    assert (
        build_loss_mask([False, True, False], "assistant")
        == build_loss_mask([False, True, False], "last_assistant")
        == [False, True, False]
    )


def test_each_choice_has_its_own_cache_file() -> None:
    first = read(turns(), "assistant")
    other = read(turns(), "all")
    assert not other.report.from_cache and other.train.num_trained > first.train.num_trained
    assert read(turns(), "all").report.from_cache


def test_plain_text_rows_point_to_pretraining() -> None:
    with pytest.raises(UserError, match="for plain text, use continued pretraining: llm-align pretrain"):
        detect_layout(["text"], where="my.jsonl")
