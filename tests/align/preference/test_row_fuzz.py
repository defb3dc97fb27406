"""Rows of every layout with columns and keys of every kind: what is read or named is what was there."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from row_reading import LAYOUTS, read
from small_tokenizers import tokenizer

from data_templates.segments import TemplateError
from finetune.data.contents import THOUGHTS
from finetune.data.conversation import usable_turns
from finetune.data.fields import RowError, json_cell
from finetune.data.layouts import detect_layout
from finetune.data.readers import SourceRow
from finetune.data.report import DataReport
from finetune.data.rows import parse_rows
from finetune.data.tokens import Encoder
from finetune.data.turns import CALL_ROLES, ROLES, TRAIN_FLAGS, parse_turns
from finetune.recipe.errors import UserError

WORD = re.compile(r"w\d+x")
Draw = Callable[..., Any]
FUZZ = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
COMPLETIONS = (
    "chosen",
    "rejected",
    "responses",
    "answers",
    "completions",
    "response1",
    "response2",
    "completion",
)
ORDINARY = [name for name in ROLES if name not in CALL_ROLES]


def words(value: Any) -> set[str]:
    """Return the words of a value."""
    return set(WORD.findall(json.dumps(value)))


class Words:
    """Draws values with words that occur once in a row."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.number = draw, 0

    def text(self) -> str:
        self.number += 1
        return f"w{self.number}x"

    def any_text(self) -> Any:
        return self.draw(st.sampled_from([self.text(), self.text(), "", None, " ", 3, [self.text()]]))

    def call(self) -> dict[str, Any]:
        arguments = {self.text(): self.text()}
        name, given = self.text(), self.draw(st.sampled_from([arguments, json.dumps(arguments)]))
        inner = {"name": name, "arguments": given}
        return self.draw(st.sampled_from([inner, {"id": "1", "type": "function", "function": inner}]))

    def content(self) -> Any:
        parts = [
            {"type": "text", "text": self.text()},
            self.text(),
            {"type": "thinking", "thinking": self.text()},
        ]
        some = self.draw(
            st.lists(st.sampled_from([*parts, {"type": "image_url", "url": self.text()}]), max_size=3)
        )
        return self.draw(
            st.sampled_from([self.text(), self.text(), self.text(), some, {"a": self.text()}, "", None])
        )

    def turn(self, role: str) -> dict[str, Any]:
        keys = self.draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "value")]))
        turn: dict[str, Any] = dict(zip(keys, (role, self.content()), strict=True))
        if role in CALL_ROLES:
            turn[keys[1]] = self.draw(st.sampled_from([self.call(), [self.call()], json.dumps(self.call())]))
        extra = self.draw(
            st.lists(
                st.sampled_from(["flag", "thought", "calls", "old call", "id", "name", "odd"]), max_size=3
            )
        )
        for kind in extra:
            turn |= {
                "flag": {
                    self.draw(st.sampled_from([*TRAIN_FLAGS, "masked"])): self.draw(
                        st.sampled_from([0, 1, True])
                    )
                },
                "thought": {self.draw(st.sampled_from(THOUGHTS)): self.any_text()},
                "calls": {"tool_calls": self.draw(st.sampled_from([[self.call(), self.call()], [], None]))},
                "old call": {"function_call": self.call()},
                "id": {"tool_call_id": "1"},
                "name": {"name": self.text()},
                "odd": {
                    self.draw(st.sampled_from(["refusal", "images", "content", "mood"])): self.any_text()
                },
            }[kind]
        return turn

    def turns(self) -> Any:
        roles = self.draw(
            st.lists(
                st.sampled_from(["user", "assistant", "gpt", "tool", *ORDINARY, *CALL_ROLES]),
                min_size=1,
                max_size=5,
            )
        )
        turns = [
            self.turn(role)
            for role in self.draw(st.sampled_from([roles, ["user", "assistant"], ["system", "user", "gpt"]]))
        ]
        return self.draw(st.sampled_from([turns, turns, json.dumps(turns)]))

    def column(self, name: str) -> Any:
        """Return a value that may stand in a column of this name."""
        if name in ("messages", "conversations"):
            return self.turns()
        if name in ("prompt", "chosen", "rejected", "completion", "response", "question", "answer"):
            return self.draw(st.sampled_from([self.text(), self.text(), self.turns()]))
        special = {
            "history": [[self.text(), self.text()]],
            "tools": [{"name": self.text(), "description": self.text()}],
            "functions": [{"name": self.text()}],
            "responses": [self.text(), self.text()],
            "scores": [1, 2],
            "ranks": [1, 2],
            "questions": [self.text()],
            "completions": [
                {"response": self.text(), "fine-grained_score": n, "model": self.text()} for n in (1, 2)
            ],
            "label": True,
            "margin": 1,
        }
        if name == "answers":
            scored = [{"text": self.text(), "score": n, "model": self.text()} for n in (1, 2)]
            judged = [{"outputs": [self.text()], "judge_scores": [n], "model": self.text()} for n in (1, 2)]
            return self.draw(st.sampled_from([scored, judged]))
        if name.startswith("annotator") or "score" in name or "rating" in name:
            return special.get(name, 1)
        return special.get(name, self.text())


@st.composite
def stages_and_rows(draw: Draw, stages: tuple[str, ...] = tuple(LAYOUTS)) -> tuple[str, dict[str, Any]]:
    """Draw a stage and a row of one of its layouts, with further columns that are read or not."""
    stage = draw(st.sampled_from(stages))
    layout = draw(st.sampled_from(list(LAYOUTS[stage])))
    source = Words(draw)
    optional = draw(
        st.lists(
            st.sampled_from([*layout.optional, "id", "images", "label", "chosen", "score", "mood"]),
            max_size=4,
        )
    )
    row = {name: source.column(name) for name in layout.required}
    row |= {
        name: draw(st.sampled_from([source.column(name), source.any_text()]))
        for name in optional
        if name not in row
    }
    return stage, row


def lost_words(stage: str, row: dict[str, Any], shown: list[str], lines: list[str]) -> Iterator[str]:
    """Yield the words of a row that are neither read nor in a column or a key that is named."""
    found = words(shown)
    named = {
        name for line in lines if "not used: " in line for name in line.split("not used: ")[1].split(", ")
    }
    counted = "\n".join(line for line in lines if line.startswith("rows "))
    for column, value in row.items():
        # Prompts: of the completions only the best one is needed.
        if stage == "prompts" and column in COMPLETIONS:
            continue
        missing = words(value) - found
        if column in named or not missing:
            continue
        if column.startswith("system") and "system turn" in counted:
            continue
        keys = {name.split("[].")[1] for name in named if name.startswith(f"{column}[].")}
        parsed = json_cell(value)
        missing -= {
            word
            for key in keys
            for entry in parsed
            if isinstance(entry, dict)
            for word in words(entry.get(key))
        }
        yield from missing


def result_names(row: dict[str, Any]) -> set[str]:
    """Return the names of results: those of the functions that were called, whose order templates write."""
    columns = [value for value in map(json_cell, row.values()) if isinstance(value, list)]
    turns = [turn for value in columns for turn in value if isinstance(turn, dict)]
    results = [
        turn for turn in turns if ROLES.get(turn.get("role") or turn.get("from") or "") == "observation"
    ]
    return words([turn.get("name") for turn in results])


@pytest.mark.slow
@FUZZ
@given(stages_and_rows())
def test_nothing_of_a_row_vanishes(case: tuple[str, dict[str, Any]]) -> None:
    stage, row = case
    try:
        shown, unused = read(stage, row)
    except (RowError, UserError) as error:
        assert str(error)
        return
    lost = set(lost_words(stage, row, shown, unused.lines())) - result_names(row)
    assert not lost, (shown, unused.lines())


@pytest.mark.slow
@FUZZ
@given(stages_and_rows(("sft",)), st.sampled_from(["toolcall", "chatml", "vicuna", "alpaca"]))
def test_what_is_trained_and_counted_is_what_was_read(
    case: tuple[str, dict[str, Any]], template: str
) -> None:
    row = case[1]
    try:
        layout = detect_layout(row)
        [messages] = parse_rows([SourceRow(row, "file:1")], layout, None)
    except UserError:
        assume(False)
    report = DataReport()
    turns = usable_turns(messages, "file:1", report)
    removed = messages if turns is None else messages[len(turns) :]
    assert bool(report.counts) == any(not turn.is_empty for turn in removed) or turns is None
    if turns is None:
        return
    encoder = encoders[template]
    [encoded] = encoder.encode_many([turns])
    if isinstance(encoded, TemplateError):
        assert str(encoded)
        return
    text = encoder.tokenizer.decode(encoded.input_ids)
    marked = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    trained = encoder.tokenizer.decode([token for token, is_trained in marked if is_trained])
    assert words([turn.key for turn in turns]) == words(text)
    assert words([turn.key for turn in turns if turn.role == "assistant" and turn.trained]) == words(trained)


PLAIN = st.sampled_from(["user", "human", "assistant", "gpt", "system", "developer", "tool", "function_call"])
PLAIN_TURN = st.tuples(PLAIN, st.sampled_from(["a", " ", "", "\ud83d"]), st.booleans()).map(
    lambda turn: {"role": turn[0], "content": turn[1]} if turn[2] else {"value": turn[1], "from": turn[0]}
)


@pytest.mark.slow
@FUZZ
@given(st.lists(PLAIN_TURN, min_size=1, max_size=4))
def test_plain_turns_are_read_as_any_others(entries: list[dict[str, Any]]) -> None:
    def result(entries: list[dict[str, Any]]) -> Any:
        try:
            return parse_turns(entries, "messages")
        except RowError as error:
            return str(error)

    # A key with null changes nothing, and the turn is no longer a plain one.
    assert result(entries) == result([{**entry, "name": None} for entry in entries])


encoders = {}


@pytest.fixture(autouse=True, scope="module")
def _encoders() -> None:
    encoders.update(
        {name: Encoder(tokenizer("qwen"), name) for name in ("toolcall", "chatml", "vicuna", "alpaca")}
    )
