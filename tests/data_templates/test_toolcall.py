"""Tool calls: loss mask, injection by tool responses, and templates without tool support."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_templates import toolcall
from data_templates.segments import Message, TemplateError, render
from finetune.recipe.discovery import load_plugin, plugin_names

TOOLS = Message("tools", '{"type": "function", "function": {"name": "area"}}')
ASK = Message("user", "How large?")
CALL = Message("assistant", "", tool_calls='{"name": "area", "arguments": {"sides": [5, 3]}}')
OBSERVATION = Message("observation", '{"area": 15}')
ANSWER = Message("assistant", "It is 15.")
SPECIAL = ["<s>", "</s>", *toolcall.TEMPLATE.markers]


def trained_text(messages):
    """Return the text that carries loss, turns separated by a bar."""
    segments, _ = render(toolcall.TEMPLATE, messages)
    ends = (segment.text + ("|" if segment.kind == "eos" else "") for segment in segments if segment.trained)
    return "".join(ends)


def test_calls_and_replies_carry_loss_and_nothing_else():
    text = '<tool_call>\n{"name": "area", "arguments": {"sides": [5, 3]}}\n</tool_call><|im_end|>|'
    assert trained_text([TOOLS, ASK, CALL, OBSERVATION, ANSWER]) == f"{text}It is 15.<|im_end|>|"


def test_several_calls_in_one_turn():
    one, two = '{"name": "a", "arguments": {}}', '{"name": "b", "arguments": {}}'
    text = f"<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{two}\n</tool_call><|im_end|>|"
    assert trained_text([TOOLS, ASK, Message("assistant", "", tool_calls=f"{one}\n{two}")]) == text


def test_text_before_a_call_and_a_result_for_each_call():
    calls = Message("assistant", "I look.", tool_calls=f"{CALL.tool_calls}\n{CALL.tool_calls}")
    turns = [TOOLS, ASK, calls, OBSERVATION, OBSERVATION, ANSWER]
    assert trained_text(turns).startswith('I look.\n<tool_call>\n{"name"')
    text = "".join(segment.text for segment in render(toolcall.TEMPLATE, turns)[0])
    assert (
        '<tool_response>\n{"area": 15}\n</tool_response>\n<tool_response>\n{"area": 15}\n</tool_resp' in text
    )


def test_a_thought_precedes_text_and_calls():
    message = replace(CALL, content="I look.", reasoning="How?")
    assert trained_text([TOOLS, ASK, message]).startswith(
        "<think>\nHow?\n</think>\n\nI look.\n<tool_call>\n{"
    )
    assert trained_text([TOOLS, ASK, replace(CALL, reasoning="How?")]).startswith(
        "<think>\nHow?\n</think>\n\n<tool_call>\n{"
    )


def test_a_thought_cannot_end_itself():
    segments, num_escaped = render(toolcall.TEMPLATE, [ASK, replace(ANSWER, reasoning="a</think>b")])
    assert "".join(segment.text for segment in segments).count("</think>") == 1 and num_escaped == 1


def test_a_call_that_is_not_trained_reads_the_same():
    silent = replace(CALL, trained=False)
    learnt_text = render(toolcall.TEMPLATE, [TOOLS, ASK, CALL, OBSERVATION, ANSWER])[0]
    silent_text = render(toolcall.TEMPLATE, [TOOLS, ASK, silent, OBSERVATION, ANSWER])[0]
    assert [s.text for s in silent_text] == [s.text for s in learnt_text]
    assert trained_text([TOOLS, ASK, silent, OBSERVATION, ANSWER]) == "It is 15.<|im_end|>|"


@pytest.mark.parametrize(
    "name", [name for name in plugin_names("data_templates") if name not in ("tokenizer", "toolcall")]
)
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([TOOLS, ASK, ANSWER], "turn 1 is tools"),
        ([ASK, CALL, OBSERVATION, ANSWER], "turn 2 is a tool call"),
    ],
)
def test_other_templates_reject_tools_and_suggest_toolcall(name, turns, message):
    template = load_plugin("data_templates", name, where="test").TEMPLATE
    with pytest.raises(
        TemplateError, match=f"{message}, but this template does not support tools; use 'toolcall'"
    ):
        render(template, turns)


THINKING = ("chatml", "toolcall", "tokenizer")


@pytest.mark.parametrize("name", [name for name in plugin_names("data_templates") if name not in THINKING])
def test_templates_without_reasoning_refuse_a_thought(name):
    template = load_plugin("data_templates", name, where="test").TEMPLATE
    with pytest.raises(TemplateError, match="turn 2 has a thought"):
        render(template, [ASK, replace(ANSWER, reasoning="5 times 3")])


@pytest.mark.parametrize(
    "turns",
    [
        [TOOLS],
        [ASK, OBSERVATION],
        [ASK, ANSWER, OBSERVATION],
        [ASK, CALL, ANSWER],
        [ASK, TOOLS, ANSWER],
        [OBSERVATION, ANSWER],
    ],
)
def test_observations_follow_calls_and_tools_come_first(turns):
    with pytest.raises(TemplateError, match="with tool calls: observation"):
        render(toolcall.TEMPLATE, turns)


def hostile():
    """Generate hostile tool responses: complete tags, halves, spaces."""
    halves = [half for text in SPECIAL for half in (text[: len(text) // 2], text[len(text) // 2 :])]
    pieces = [*SPECIAL, *halves, " ", "\n", "assistant", '{"name": "pay"}']
    return st.lists(st.sampled_from(pieces), max_size=6).map("".join)


def talk(roles, texts):
    """Return a conversation whose first reply is a call after its text."""
    turns = [Message(role, text) for role, text in zip(roles, texts, strict=True)]
    return [*turns[:3], replace(turns[3], tool_calls=texts[3] or "x"), *turns[4:]]


@settings(deadline=None)
@given(texts=st.lists(hostile(), min_size=6, max_size=6))
def test_observations_cannot_inject_a_call_or_a_turn(texts):
    roles = ("system", "tools", "user", "assistant", "observation", "assistant")
    single_line = [text.replace("\n", " ") for text in texts]
    neutral = ["x" if text.strip() else text for text in single_line]
    actual, emitted = (
        "".join(segment.text for segment in render(toolcall.TEMPLATE, turns, special_tokens=SPECIAL)[0])
        for turns in (talk(roles, single_line), talk(roles, neutral))
    )
    for marker in SPECIAL:
        assert len(re.findall(f"(?={re.escape(marker)})", actual)) == len(
            re.findall(f"(?={re.escape(marker)})", emitted)
        ), (marker, actual)
