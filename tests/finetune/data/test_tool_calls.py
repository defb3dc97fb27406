"""Tools and calls of datasets become the JSON lines of chat templates, or a problem with a location."""

import json

import pytest

from data_templates.segments import Message
from finetune.data.layouts import detect_layout
from finetune.data.readers import SourceRow
from finetune.data.rows import parse_rows
from finetune.data.tool_calls import calls_to_json_lines, tools_to_json_lines
from finetune.recipe.errors import UserError

AREA = {"name": "area", "description": "넓이", "parameters": {"type": "object", "properties": {}}}
WRAPPED = '{"type": "function", "function": ' + json.dumps(AREA, ensure_ascii=False) + "}"
CALL = {"name": "area", "arguments": {"sides": [5, 3], "unit": "제곱미터"}}
TURNS = [
    {"from": "human", "value": "How large?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"area": 15}'},
    {"from": "gpt", "value": "15."},
]


@pytest.mark.parametrize("none", [None, "", "[]", []])
def test_no_tools(none):
    assert tools_to_json_lines(none) == ""


@pytest.mark.parametrize(
    "tools", [[AREA], json.dumps([AREA]), [{"type": "function", "function": AREA}], f"[{WRAPPED}]"]
)
def test_tools_are_wrapped_once_and_unicode_is_unchanged(tools):
    assert tools_to_json_lines(tools) == WRAPPED


def test_one_tool_per_line():
    assert tools_to_json_lines([AREA, {"name": "b"}]).split("\n") == [
        WRAPPED,
        '{"type": "function", "function": {"name": "b"}}',
    ]


@pytest.mark.parametrize("call", [CALL, [CALL], json.dumps(CALL), json.dumps([{**CALL, "id": "x"}])])
def test_calls_have_one_canonical_form(call):
    assert calls_to_json_lines(call) == '{"name": "area", "arguments": {"sides": [5, 3], "unit": "제곱미터"}}'


def test_line_feeds_inside_arguments_stay_inside():
    assert calls_to_json_lines([{"name": "a", "arguments": {"text": "one\ntwo"}}] * 2).count("\n") == 1


def read(**changes):
    """Return a row's conversation."""
    row = {"conversations": TURNS, "tools": [AREA], **changes}
    layout = detect_layout(row)
    [conversation] = parse_rows([SourceRow(row, "file:1")], layout, None)
    return layout.name, conversation


def test_llama_factorys_layout():
    name, conversation = read()
    assert name == "ShareGPT"
    assert conversation == [
        Message("tools", WRAPPED),
        Message("user", "How large?"),
        Message("assistant", "", tool_calls=calls_to_json_lines(CALL)),
        Message("observation", '{"area": 15}'),
        Message("assistant", "15."),
    ]


def test_tools_follow_the_system_text():
    _, conversation = read(system="Be brief.")
    assert [turn.role for turn in conversation[:3]] == ["system", "tools", "user"]
    _, conversation = read(conversations=[{"from": "system", "value": "own"}, *TURNS], system="s")
    assert [turn.content for turn in conversation[:2]] == ["own", WRAPPED]


@pytest.mark.parametrize("none", [None, "[]"])
def test_rows_without_tools_among_rows_with_them(none):
    assert read(tools=none)[1][0] == Message("user", "How large?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": "[{'name': 1}]"}, "field 'tools': not JSON (Expecting property name"),
        ({"tools": '{"name": "a"}'}, "field 'tools': found {'name': 'a'}"),
        ({"tools": [{"description": "x"}]}, "field 'tools': found {'description': 'x'}"),
        ({"tools": [{"type": "function", "function": "a"}]}, "field 'tools': found {'type': 'function'"),
        ({"tools": '[{"name": "\\ud83d"}]'}, "field 'tools': an unpaired surrogate"),
    ],
)
def test_pain_24_invalid_tools_are_reported(changes, message):
    with pytest.raises(UserError) as caught:
        read(**changes)
    assert str(caught.value).startswith(f"file:1: {message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("area(5, 3)", "not JSON (Expecting value at column 1): 'area(5, 3)'"),
        ("[]", "found no tool call"),
        ('{"name": "area"}', "found {'name': 'area'}"),
        ('{"name": "area", "arguments": "5"}', "found {'name': 'area', 'arguments': '5'}"),
        ('"area"', "found 'area'"),
    ],
)
def test_pain_24_an_invalid_call_is_reported_with_its_turn(value, message):
    with pytest.raises(UserError) as caught:
        read(conversations=[TURNS[0], {"from": "function_call", "value": value}])
    assert str(caught.value).startswith(f"file:1: field 'conversations[1].value': {message}\n")
    assert '{"name": ..., "arguments": {...}} as JSON' in str(caught.value)
