"""Our chat templates render the same text as the published ones."""

import json

import pytest
from golden_chats import ANSWER, ASK, LONG, SYSTEM
from published_chats import EXAONE, MISTRAL, ZEPHYR, rendered, trl

from data_templates.segments import Message, render
from finetune.recipe.discovery import load_plugin

PUBLISHED = {
    "llama3": trl("llama3"),
    "gemma": trl("gemma3"),
    "qwen": trl("qwen2_5"),
    "chatml": trl("qwen3_instruct_2507"),
    "toolcall": trl("qwen3_instruct_2507"),
    "zephyr": ZEPHYR,
    "exaone": EXAONE,
    "mistral": MISTRAL,
}
WITHOUT_BOS = ("qwen", "chatml", "toolcall", "zephyr", "exaone")
"""Their Jinja leaves BOS to the tokenizer, which adds it or (Qwen's) has none."""

WEATHER = {
    "name": "weather",
    "description": "날씨 of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
CALLS = [
    {"name": "weather", "arguments": {"place": "서울", "days": [1, 2]}},
    {"name": "now", "arguments": {}},
]


def text_of(name, messages):
    """Return our template's text."""
    template = load_plugin("data_templates", name, where="test").TEMPLATE
    tokens = {"bos": "" if name in WITHOUT_BOS else "<s>", "eos": "</s>"}
    segments, _ = render(template, messages)
    return "".join(segment.text or tokens.get(segment.kind, "") for segment in segments)


def plain(messages):
    """Return messages as chat templates take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "messages",
    [[ASK], [ASK, ANSWER], [SYSTEM, ASK], [SYSTEM, ASK, ANSWER], LONG[1:4], LONG[1:], LONG[:4], LONG],
)
def test_parity_with_the_published_template(name, messages):
    expected = rendered(PUBLISHED[name], plain(messages), opened=messages[-1].role == "user")
    assert text_of(name, messages) == expected


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("calls", [CALLS[:1], CALLS])
@pytest.mark.parametrize("end", [3, 4, 5, 6])
def test_tools_calls_and_observations_have_the_published_form(system, calls, end):
    tools = Message("tools", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in TOOLS))
    called = Message(
        "assistant", "", tool_calls="\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    )
    seen = Message("observation", '{"sky": "맑음"}')
    ours = [tools, ASK, called, seen, ANSWER, Message("user", "And 4?")][:end]
    tool_calls = [{"type": "function", "function": call} for call in calls]
    theirs = [
        {"role": "user", "content": ASK.content},
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
        {"role": "tool", "content": seen.content},
        {"role": "assistant", "content": ANSWER.content},
        {"role": "user", "content": "And 4?"},
    ][: end - 1]
    opened = ours[-1].role in ("user", "observation")
    expected = rendered(PUBLISHED["toolcall"], plain(system) + theirs, tools=TOOLS, opened=opened)
    assert text_of("toolcall", [*system, *ours]) == expected
    if system:
        assert expected == rendered(trl("qwen2_5"), plain(system) + theirs, tools=TOOLS, opened=opened)
