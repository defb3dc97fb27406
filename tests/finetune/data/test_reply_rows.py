"""Rows of tokens for the chat templates of tokenizers: one row for a conversation, or one for each reply."""

from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import MAKERS

from data_templates.segments import Message
from finetune.data.dataset import PreparedData, prepare_conversations
from finetune.data.tokens import Encoder
from finetune.recipe.settings import DataSettings

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|im_start|>answer{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""The header of a reply goes on after the generation prompt, with special tokens."""
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate("abcdef")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(template: str, *turns: dict[str, Any], loss_on: str = "assistant") -> tuple[Encoder, PreparedData]:
    tokenizer = MAKERS["qwen"]()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, "tokenizer")
    settings = DataSettings(source=[{"messages": list(turns)}], template="tokenizer", loss_on=loss_on)
    return encoder, prepare_conversations(settings, encoder, max_length=500, seed=0)


def texts(encoder: Encoder, data: PreparedData) -> list[tuple[str, str]]:
    """Return each row's text before the first trained token, and its trained text."""
    found = []
    for row in (data.train[index] for index in range(len(data.train))):
        trained = row["labels"] != -100
        start = int(trained.int().argmax())
        ids = row["input_ids"]
        found.append((encoder.tokenizer.decode(ids[:start]), encoder.tokenizer.decode(ids[trained])))
    return found


def test_a_header_with_special_tokens_is_a_part_of_the_reply() -> None:
    encoder, data = read(PARTS, *TURNS[:4])
    [(prompt, trained)] = texts(encoder, data)
    assert prompt == "<|im_start|>user<|im_start|>a<|im_end|><|im_start|>assistant"
    reply = "<|im_start|>answer<|im_start|>{}<|im_end|>"
    assert trained == reply.format("b") + reply.format("d")


@pytest.mark.parametrize(("template", "end"), [(THINKS_LAST, "<|im_end|>"), (NO_END, "<|im_end|>")])
def test_one_row_for_each_reply_with_the_prompt_of_inference(template: str, end: str) -> None:
    encoder, data = read(template, *TURNS)
    turns = [Message(turn["role"], turn["content"]) for turn in TURNS]
    rows = texts(encoder, data)
    assert [trained for _, trained in rows] == [f"{text}{end}" for text in "bdf"]
    assert [prompt for prompt, _ in rows] == [
        encoder.tokenizer.decode(encoder.encode_prompt(turns[:index])) for index in (1, 3, 5)
    ]
    # A template without an end leaves EOS to the end of a row: in a conversation it would stand for nothing.
    assert rows[2][0].count(end) == (0 if template == NO_END else 5)
    assert data.report.counts == {
        "are split into one row per reply (the template writes earlier replies differently)": 1
    }
    assert data.report.rows == 3 and len(data.prompts) == 1


@pytest.mark.parametrize("loss_on", ["all", "last_assistant"])
def test_other_scopes_of_the_loss_need_one_row(loss_on: str) -> None:
    encoder, data = read(THINKS_LAST, *TURNS, loss_on=loss_on)
    [(_, trained)] = texts(encoder, data)
    assert trained.endswith("f<|im_end|>") and ("b" in trained) == (loss_on == "all")
