"""Which turns of a conversation are used, trained or dropped, and that each loss is reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.data.dataset import PreparedData, prepare_conversations
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.settings import DataSettings

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return lines


def read(encoder: Encoder, source: str) -> PreparedData:
    return prepare_conversations(DataSettings(source=source, cache=False), encoder, max_length=200, seed=0)


def texts(encoder: Encoder, rows: Any) -> list[str]:
    return [encoder.tokenizer.decode(rows[index]["input_ids"]) for index in range(len(rows))]


def test_a_final_observation_is_dropped_and_a_call_is_a_reply(base_folder: Path, write: Write) -> None:
    def talk(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": "[]"}

    call = ("function_call", '{"name": "add", "arguments": {}}')
    rows = [
        talk(("human", "Add."), call),
        talk(("human", "Add."), call, ("observation", "5")),
        talk(("human", "Add."), call, ("observation", " "), ("gpt", "5")),
    ]
    own = Encoder(AutoTokenizer.from_pretrained(base_folder), "toolcall")
    prepared = read(own, write(*rows))
    one, two = texts(own, prepared.train)
    assert one == two and one.endswith("</tool_call></s>\n")
    assert prepared.report.counts == {
        "end with a turn that has no reply (not used)": 1,
        "dropped: empty turn": 1,
        "identical to an earlier row (not dropped)": 1,
    }


@pytest.mark.parametrize(("template", "passed_over"), [("mistral", 1), ("mistral_v1", 0), ("chatml", 0)])
def test_replies_without_loss_in_a_template_are_counted(
    base_folder: Path, write: Write, template: str, passed_over: int
) -> None:
    turns = [{"role": role, "content": "text"} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}, {"messages": turns}]
    own = Encoder(AutoTokenizer.from_pretrained(base_folder), template)
    counts = read(own, write(*rows)).report.counts
    assert counts.get("have replies without loss in this template", 0) == passed_over


def test_rows_with_tools_are_dropped_for_a_template_without_tools(base_folder: Path, write: Write) -> None:
    turns = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "5"}]
    rows = [{"conversations": turns, "tools": tools} for tools in ("", '[{"name": "add"}]')]
    own = Encoder(AutoTokenizer.from_pretrained(base_folder), "alpaca")
    report = read(own, write(*rows)).report
    [(what, where)] = report.examples.items()
    assert report.counts == {what: 1} and what == "dropped: the template cannot render the conversation"
    assert where.endswith("turn 1 is tools, but this template does not support tools; use 'toolcall'")
    with pytest.raises(UserError, match=r"use 'toolcall'(.|\n)*or choose another data\.template"):
        read(own, write(rows[1]))
