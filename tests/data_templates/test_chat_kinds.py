"""Where a reply begins and ends in the chat templates of tokenizers: one kind of template each."""

import json
from dataclasses import replace

import pytest
from chat_kinds import KINDS, RESULT, SYSTEM, TOOL, bound, call, chat_of, reply, user
from hypothesis import given, settings
from hypothesis import strategies as st

from data_templates._openai import to_openai
from data_templates.segments import TemplateError, render

ASK, HI = user("hello"), reply("Hi.")
MORE, NO = user("and?"), reply("No.")
THINK = reply("Hi.", reasoning="A greeting.")
THINK_AGAIN = reply("No.", reasoning="A question.")
CALL = reply("", tool_calls=call(w=5))
FORMS = {"text": {}, "null": {"null_content": True}}


def rows(name, messages):
    """Return each row of a conversation as prompt and trained text; EOS is ⏹."""
    template = bound(name)
    found = []
    for row in template.split(messages):
        segments, _ = render(template, row, special_tokens=KINDS[name].special)
        first = next(index for index, segment in enumerate(segments) if segment.trained)
        texts = [(segment.text if segment.kind != "eos" else "⏹", segment.trained) for segment in segments]
        prompt = "".join(text for text, _ in texts[:first])
        found.append((prompt, "".join(text for text, trained in texts[first:] if trained)))
    return found


def trained(name, messages):
    """Return the trained texts of a conversation's rows."""
    return [text for _, text in rows(name, messages)]


EMPTY = "<think>\n\n</think>\n\n"
HELD = "<think>\nA greeting.\n</think>\n\n"
EXPECTED = {
    "chatml": (["Hi.<|im_end|>No.<|im_end|>"], None),
    "tools": (["Hi.<|im_end|>No.<|im_end|>"], None),
    "header": (["Hi.<|eot|>No.<|eot|>"], None),
    "inst": ([" Hi. </s> No. </s>"], None),
    "text": (["Hi.\n⏹", "No.\n⏹"], None),
    "two ends": (["Hi.<|/response|><|im_end|>No.<|/response|><|im_end|>"], None),
    "eos after the end": (["Hi.<|im_end|>No.<|im_end|>"], None),
    "end once": (["Hi.\n<|im_end|>", "No.\n<|im_end|>"], None),
    "no end": (
        ["\n<think></think>\nHi.⏹", "\n<think></think>\nNo.⏹"],
        ["\n<think>A greeting.</think>\nHi.⏹", "\n<think>A question.</think>\nNo.⏹"],
    ),
    "harmony": (
        ["<|channel|>final<|message|>Hi.<|return|>", "<|channel|>final<|message|>No.<|return|>"],
        [
            f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"
            for thought, text in (("A greeting.", "Hi."), ("A question.", "No."))
        ],
    ),
    "recipients": (
        [" to=user<|message|>Hi.<|eot|> to=user<|message|>No.<|eot|>"],
        [
            " to=self<|message|>A greeting.<|eom|><|start|>assistant to=user<|message|>Hi.<|eot|>"
            " to=self<|message|>A question.<|eom|><|start|>assistant to=user<|message|>No.<|eot|>"
        ],
    ),
    # TRL and LLaMA-Factory write an empty thought into every turn of one row; so does no prompt of Qwen3.
    "thinks last": (
        [f"{EMPTY}Hi.<|im_end|>", f"{EMPTY}No.<|im_end|>"],
        [f"{HELD}Hi.<|im_end|>", "<think>\nA question.\n</think>\n\nNo.<|im_end|>"],
    ),
    "opens thought": (
        ["\n</think>\n\nHi.<|im_end|>", "\n</think>\n\nNo.<|im_end|>"],
        ["A greeting.\n</think>\n\nHi.<|im_end|>", "A question.\n</think>\n\nNo.<|im_end|>"],
    ),
    "opens, removes": (
        ["\n</think>\n\nHi.<|im_end|>", "\n</think>\n\nNo.<|im_end|>"],
        ["A greeting.\n</think>\n\nHi.<|im_end|>", "A question.\n</think>\n\nNo.<|im_end|>"],
    ),
    "opens, empty": (
        ["</think>Hi.<|im_end|>", "</think>No.<|im_end|>"],
        ["A greeting.\n</think>\nHi.<|im_end|>A question.\n</think>\nNo.<|im_end|>"],
    ),
    "opens, last apart": (
        ["\n</think>\n\nHi.\n<SPECIAL_12>", "\n</think>\n\nNo.\n<SPECIAL_12>"],
        ["A greeting.\n</think>\n\nHi.\n<SPECIAL_12>", "A question.\n</think>\n\nNo.\n<SPECIAL_12>"],
    ),
    "removes": (
        ["Hi.<|im_end|>No.<|im_end|>"],
        [f"{HELD}Hi.<|im_end|>", "<think>\nA question.\n</think>\n\nNo.<|im_end|>"],
    ),
    "inline": (
        ["Hi.<|im_end|>No.<|im_end|>"],
        [f"{HELD}Hi.<|im_end|><think>\nA question.\n</think>\n\nNo.<|im_end|>"],
    ),
    "fills": (
        ["<think></think>Hi.<|im_end|><think></think>No.<|im_end|>"],
        ["<think>A greeting.</think>Hi.<|im_end|>", "<think>A question.</think>No.<|im_end|>"],
    ),
    "closes thought": (["Hi.<|im_end|>", "No.<|im_end|>"], None),
    "prompt closes thought": (["Hi.<|im_end|>", "No.<|im_end|>"], None),
    "call by text": (["Hi.<|end|>No.<|end|>"], None),
}
"""The trained texts of two exchanges, and of the same with thoughts (None: the template has no place)."""


@pytest.mark.parametrize("name", KINDS)
def test_what_is_trained_is_what_the_template_writes_after_the_prompt(name):
    plain, thinking = EXPECTED[name]
    assert trained(name, [ASK, HI, MORE, NO]) == plain
    if thinking is None:
        with pytest.raises(TemplateError, match=r"turn 2.*; data\.reasoning=strip"):
            rows(name, [ASK, THINK])
    else:
        assert trained(name, [ASK, THINK, MORE, THINK_AGAIN]) == thinking


def conversations(kind):
    """Return conversations that a kind can take: system, thoughts, tools, several turns."""
    talks = [[ASK, HI], [SYSTEM, ASK, HI], [ASK, HI, MORE, NO], [SYSTEM, ASK, HI, MORE, NO, ASK, HI]]
    if kind.thoughts:
        talks += [[ASK, THINK], [ASK, THINK, MORE, NO], [SYSTEM, ASK, HI, MORE, THINK_AGAIN]]
    if kind.tools:
        talks += [[TOOL, ASK, CALL], [TOOL, ASK, CALL, RESULT, HI], [TOOL, ASK, CALL, RESULT, HI, MORE, NO]]
    if kind.tools and kind.thoughts:
        thinking = reply("", tool_calls=call(w=5), reasoning="Measure.")
        talks += [[TOOL, ASK, thinking, RESULT, THINK], [TOOL, ASK, thinking, RESULT, HI, MORE, THINK_AGAIN]]
    return talks


@pytest.mark.parametrize("name", KINDS)
def test_each_row_begins_with_the_prompt_of_inference_and_holds_the_whole_reply(name):
    chat, template = chat_of(KINDS[name]), bound(name)
    for messages in conversations(KINDS[name]):
        replies = [turn for turn in messages if turn.role == "assistant"]
        parts = template.split(messages)
        assert sum(turn.trained and turn.role == "assistant" for part in parts for turn in part) == len(
            replies
        )
        for part, (prompt, text) in zip(parts, rows(name, messages), strict=True):
            first = next(
                index for index, turn in enumerate(part) if turn.trained and turn.role == "assistant"
            )
            form = template.render.__self__._form
            turns, tools = to_openai(part[:first], form)
            assert prompt == chat(turns, True, tools)
            for turn in part:
                if turn.role == "assistant" and turn.trained:
                    assert all(piece in text for piece in (turn.reasoning, turn.content))
                    assert not turn.tool_calls or ("area" in text and "5" in text)


def test_the_tokens_that_end_a_reply():
    stops = {name: bound(name).stop for name in KINDS}
    assert stops["harmony"] == ("<|return|>", "<|call|>")
    assert stops["two ends"] == stops["eos after the end"] == stops["end once"] == ("<|im_end|>",)
    assert stops["text"] == ()
    # Without an end, the generation stops where the next turn begins.
    assert stops["no end"] == ("<|user|>", "<|observation|>")


def test_a_call_of_each_kind_of_template():
    assert trained("harmony", [TOOL, ASK, CALL]) == [
        ' to=functions.area<|channel|>commentary json<|message|>{"w": 5}<|call|>'
    ]
    assert trained("opens thought", [TOOL, ASK, CALL]) == [
        "\n</think>\n\n<tool_call>\n<function=area>\n<parameter=w>\n5\n</parameter>\n</function>\n</tool_call><|im_end|>"
    ]
    assert trained("no end", [ASK, CALL]) == [
        "\n<think></think>\n<tool_call>area\n<arg_key>w</arg_key>\n<arg_value>5</arg_value>\n</tool_call>⏹"
    ]
    # Its arguments are text, and content is null.
    assert trained("call by text", [ASK, CALL]) == ['<|call|>area\n```json\n{"w": 5}\n```<|end|>']
    two = reply("", tool_calls=f"{call(w=5)}\n{call(w=6)}")
    assert trained("tools", [TOOL, ASK, two, RESULT, RESULT, HI])[0].count("<tool_call>") == 2


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("chatml", [TOOL, ASK, HI], "drops the tool of turn 1 .tools.; data.template=toolcall"),
        ("chatml", [ASK, CALL, RESULT, HI], "drops the tool call of turn 2"),
        (
            "harmony",
            [TOOL, ASK, reply("", tool_calls=f"{call(w=5)}\n{call(w=6)}")],
            "drops the tool call of turn 3",
        ),
        ("harmony", [TOOL, ASK, reply("I look.", tool_calls=call(w=5))], "drops turn 3"),
        ("closes thought", [ASK, THINK], "prompt of turn 2 ends its thought before the reply begins"),
    ],
)
def test_nothing_is_left_out_in_silence(name, messages, message):
    with pytest.raises(TemplateError, match=message):
        rows(name, messages)


def test_thoughts_of_earlier_replies_are_counted():
    template = bound("thinks last")
    assert template.num_left_out([ASK, THINK, MORE, THINK_AGAIN]) == 1
    assert template.num_left_out([ASK, THINK]) == 0
    assert bound("inline").num_left_out([ASK, THINK, MORE, THINK_AGAIN]) == 0


def test_a_thought_inside_the_text_is_written_where_the_template_has_a_place():
    inline = reply("<think>\nA greeting.\n</think>\n\nHi.")
    for name, (_, thinking) in EXPECTED.items():
        if thinking is not None:
            assert trained(name, [ASK, inline]) == trained(name, [ASK, THINK]), name
    assert trained("chatml", [ASK, inline]) == ["<think>\nA greeting.\n</think>\n\nHi.<|im_end|>"]


def test_the_thought_of_a_reply_is_marked():
    for name, kind in KINDS.items():
        if kind.thoughts:
            segments, _ = render(bound(name), [ASK, THINK])
            thought = "".join(segment.text for segment in segments if segment.thought)
            rest = "".join(segment.text for segment in segments if segment.trained and not segment.thought)
            assert "A greeting." in thought and "Hi." not in thought, name
            assert "Hi." in rest and "think>" not in rest and "A greeting." not in rest, name


def test_an_earlier_turn_that_changes_once_the_reply_is_there():
    """gpt-oss takes the thought of a call out of the conversation as soon as a final text follows."""
    thinking = reply("", tool_calls=call(w=5), reasoning="Measure.")
    first, last = rows("harmony", [TOOL, ASK, thinking, RESULT, HI])
    assert "analysis<|message|>Measure.<|end|>" in first[1]
    assert "analysis<|message|>Measure.<|end|>" in last[0]  # as at inference, where no final text follows yet
    assert last[1] == "<|channel|>final<|message|>Hi.<|return|>"


def test_tool_ids_and_names_of_results():
    two = reply("", tool_calls=f"{call(w=5)}\n{call(w=6)}")
    turns, tools = to_openai([TOOL, ASK, two, RESULT, RESULT], bound("tools").render.__self__._form)
    assert tools == [json.loads(TOOL.content)]
    ids = [tool_call["id"] for tool_call in turns[1]["tool_calls"]]
    assert [turn["tool_call_id"] for turn in turns[2:]] == ids
    assert all(len(identifier) == 9 and identifier.isalnum() for identifier in ids) and ids[0] != ids[1]
    assert {turn["name"] for turn in turns[2:]} == {"area"}


PIECES = [
    "a",
    "hello",
    "e",
    "</think>",
    "<think>",
    "\n\n",
    " ",
    "{",
    '"',
    "<|im_end|>",
    "<|im_start|>assistant\n",
]
PIECES += ["### assistant: ", "</tool_call>", "한국어", "</s>", "<|channel|>final<|message|>", "{{ x }}"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(lambda pieces: "x" + "".join(pieces))


@st.composite
def hostile_conversations(draw, kind):
    """Draw a conversation that a kind can take, with text that looks like markup."""
    turns = [SYSTEM] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        thought = draw(st.just("") | TEXTS) if kind.thoughts else ""
        turns += [user(draw(TEXTS)), reply(draw(TEXTS), reasoning=thought, trained=draw(st.booleans()))]
    return turns


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_text_changes_where_a_reply_begins_and_ends(name, data):
    kind, template = KINDS[name], bound(name)
    messages = data.draw(hostile_conversations(kind))
    neutral = {"content": "x", "reasoning": ""}
    for part in template.split(messages):
        last = max((i for i, turn in enumerate(part) if turn.role == "assistant" and turn.trained), default=0)
        if not last:
            continue
        try:
            render(template, part, special_tokens=kind.special)
        except TemplateError as error:
            assert "drops" in str(error) and "</think>" in part[last].content
            continue
        plain = [replace(turn, **neutral | ({"reasoning": "y"} if turn.reasoning else {})) for turn in part]
        text, plain_text, prompt = (
            "".join(segment.text for segment in render(template, turns, special_tokens=kind.special)[0])
            for turns in (part, plain, part[:last])
        )
        assert text.startswith(prompt)
        assert [text.count(token) for token in kind.special] == [plain_text.count(t) for t in kind.special]
