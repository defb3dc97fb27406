"""Turns of published layouts and what they mean: ``[(stage, row, expected)]``.

Expected is one line per message, as ``shown`` writes it, or the beginning of the error. The first case of a
kind is its strongest.
"""

import json

from row_reading import CLOCK, CLOCK_AT, PAIR, PAIR_SHOWN, PLAIN, TOOL, A, Case, Q, call, chat, turn

TOOL_CALLS: list[Case] = [
    (
        "sft",
        chat(
            Q,
            turn("assistant", tool_calls=[call(id="1"), call(arguments={"town": "Oslo"}, id="2")]),
            turn("tool", "noon in Oslo", tool_call_id="2"),
            turn("tool", "noon", tool_call_id="1", name="clock"),
            A,
            tools=[{"name": "clock"}],
        ),
        [
            f"tools: {TOOL}",
            "user: q",
            f"assistant:  -> {CLOCK}\n{CLOCK_AT}",
            "observation: noon",
            "observation: noon in Oslo",
            "assistant: a",
        ],
    ),
    (
        "sft",
        chat(Q, turn("assistant", "I look.", tool_calls=[call()])),
        ["user: q", f"assistant: I look. -> {CLOCK}"],
    ),
    (
        "sft",
        chat(Q, {"role": "assistant", "content": None, "tool_calls": [call(arguments="")]}),
        ["user: q", f"assistant:  -> {CLOCK}"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", "a", tool_calls=[]), Q, turn("assistant", "b", tool_calls=None)),
        [*PLAIN, "user: q", "assistant: b"],
    ),
    (
        "sft",
        chat(
            Q, turn("assistant", function_call={"name": "clock", "arguments": "{}"}), turn("function", "noon")
        ),
        ["user: q", f"assistant:  -> {CLOCK}", "observation: noon"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=json.dumps([call()])), turn("tool", {"hour": 12})),
        ["user: q", f"assistant:  -> {CLOCK}", 'observation: {"hour": 12}'],
    ),
    (
        "sft",
        chat(Q, turn("tool_call", CLOCK), turn("tool_call", CLOCK_AT), turn("tool_response", "noon"), A),
        ["user: q", f"assistant:  -> {CLOCK}\n{CLOCK_AT}", "observation: noon", "assistant: a"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", "I look."), turn("tool_call", CLOCK)),
        ["user: q", f"assistant: I look. -> {CLOCK}"],
    ),
    (
        "sft",
        chat(
            Q,
            turn("assistant", tool_calls=[call(id="1"), call(id="2")]),
            turn("tool", "x", tool_call_id="9"),
            A,
        ),
        ["user: q", f"assistant:  -> {CLOCK}\n{CLOCK}", "observation: x", "assistant: a"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[call(arguments="now")])),
        "messages[1].tool_calls: not JSON",
    ),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[{"id": "1"}])),
        "messages[1].tool_calls: found {'id': '1'}",
    ),
    ("sft", chat(turn("user", "q", tool_calls=[call()]), A), "messages[0].tool_calls: found [{'type'"),
    (
        "pairs",
        {"prompt": "q", "chosen": [turn("assistant", tool_calls=[call()])], "rejected": [A]},
        ["user: q", f"assistant:  -> {CLOCK}", "assistant: a"],
    ),
    (
        "labels",
        chat(Q, turn("assistant", tool_calls=[call()]), label=True),
        ["user: q", f"assistant:  -> {CLOCK}"],
    ),
    (
        "prompts",
        chat(Q, turn("assistant", tool_calls=[call()]), turn("tool", "noon")),
        ["user: q", f"assistant:  -> {CLOCK}", "observation: noon"],
    ),
]

REASONING: list[Case] = [
    (
        "sft",
        chat(
            Q,
            turn("assistant", "a", reasoning_content="r"),
            Q,
            turn("assistant", "b", thinking="s", reasoning="s"),
        ),
        ["user: q", "assistant: (r) a", "user: q", "assistant: (s) b"],
    ),
    ("sft", chat(Q, turn("assistant", "a", reasoning="r")), ["user: q", "assistant: (r) a"]),
    ("sft", chat(Q, turn("assistant", "a", reasoning_content=None, thinking="")), PLAIN),
    (
        "sft",
        chat(Q, turn("assistant", [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}])),
        ["user: q", "assistant: (r) a"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[call()], reasoning_content="r")),
        ["user: q", f"assistant: (r)  -> {CLOCK}"],
    ),
    ("sft", {"instruction": "q", "output": "a", "reasoning": "r"}, ["user: q", "assistant: (r) a"]),
    ("sft", {"question": "q", "answer": "a", "thinking": "r"}, ["user: q", "assistant: (r) a"]),
    ("sft", {"prompt": "q", "response": "a", "thinking": True}, PLAIN),
    (
        "sft",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "reasoning": "r"}]},
        ["user: q", "assistant: (r) a"],
    ),
    (
        "pairs",
        PAIR | {"chosen": turn("assistant", "a", thinking="r")} | {"rejected": turn("assistant", "b")},
        ["user: q", "assistant: (r) a", "assistant: b"],
    ),
    (
        "labels",
        {"prompt": [Q], "completion": [turn("assistant", "a", reasoning="r")], "label": 1},
        ["user: q", "assistant: (r) a"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", "a", reasoning="r", thinking="s")),
        "messages[1].thinking: found 's', but",
    ),
    (
        "sft",
        chat(Q, turn("assistant", "a", reasoning="\ud83d")),
        "messages[1].reasoning: an unpaired surrogate",
    ),
]

PARTS: list[Case] = [
    (
        "sft",
        chat(
            turn("user", [{"type": "text", "text": "q "}, {"type": "text", "text": "more"}]),
            turn("assistant", [{"type": "text", "text": "a"}]),
        ),
        ["user: q more", "assistant: a"],
    ),
    ("sft", chat(turn("user", [{"type": "text", "content": "q"}]), A), PLAIN),
    ("sft", chat(turn("user", [{"type": "text", "value": "q"}]), A), PLAIN),
    ("sft", chat(turn("user", ["q"]), A), PLAIN),
    ("sft", chat(turn("user", [{"text": "q"}]), A), PLAIN),
    (
        "sft",
        chat(
            turn("user", [{"type": "input_text", "text": "q"}]),
            turn("assistant", [{"type": "output_text", "text": "a"}]),
        ),
        PLAIN,
    ),
    ("sft", chat(turn("user", [{"type": "text", "text": "q", "image_url": None}]), A), PLAIN),
    ("sft", chat(turn("system", [{"type": "text", "text": "s"}]), Q, A), ["system: s", *PLAIN]),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[call()]), turn("tool", [{"type": "text", "text": "noon"}])),
        ["user: q", f"assistant:  -> {CLOCK}", "observation: noon"],
    ),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[call()]), turn("tool", [{"type": "web", "url": "u"}])),
        ["user: q", f"assistant:  -> {CLOCK}", 'observation: [{"type": "web", "url": "u"}]'],
    ),
    (
        "pairs",
        {
            "prompt": [turn("user", [{"type": "text", "text": "q"}])],
            "chosen": [A],
            "rejected": [turn("assistant", "b")],
        },
        PAIR_SHOWN,
    ),
    (
        "sft",
        chat(turn("user", [{"type": "image_url", "image_url": {"url": "u"}}]), A),
        "messages[0].content[0]: found {'type': 'image_url'",
    ),
    (
        "sft",
        chat(turn("user", [{"type": "text", "text": None}]), A),
        "messages[0].content[0]: found None, expected text",
    ),
    ("sft", chat(turn("user", [{"type": "text", "text": "q"}, 3]), A), "messages[0].content: found ["),
]

ROLES: list[Case] = [
    (
        "sft",
        chat(turn("developer", "d"), turn("system", "s"), turn("human", "q"), turn("model", "a")),
        ["system: d\n\ns", *PLAIN],
    ),
    ("sft", chat(turn("developer", "d"), Q, A), ["system: d", *PLAIN]),
    ("sft", chat(turn("developer", ""), turn("system", "s"), Q, A), ["system: s", *PLAIN]),
    ("sft", {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
    ("sft", {"conversations": [Q, A]}, PLAIN),
    ("sft", {"messages": [{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}]}, PLAIN),
    ("sft", {"messages": [{"role": None, "from": "human", "value": "q", "content": None}, A]}, PLAIN),
    (
        "sft",
        chat(Q, turn("assistant", tool_calls=[call()]), turn("ipython", "noon")),
        ["user: q", f"assistant:  -> {CLOCK}", "observation: noon"],
    ),
    ("sft", chat(Q, {"role": "assistant", "content": None, "refusal": "no"}), ["user: q", "assistant: no"]),
    ("sft", chat(turn("robot", "q"), A), "messages[0].role: found 'robot', expected one of system, user"),
    ("sft", chat({"role": None, "content": "q"}, A), "messages[0]: found {'role': None"),
    ("sft", chat({"content": "q"}, A), "messages[0]: found {'content': 'q'}"),
]

UNTRAINED = ["user: q", "assistant: a [untrained]"]
FLAGS: list[Case] = [
    (
        "sft",
        chat(Q, turn("assistant", "a", weight=0), Q, turn("assistant", "b", masked=False, train=True)),
        [*UNTRAINED, "user: q", "assistant: b"],
    ),
    *[
        ("sft", chat(Q, turn("assistant", "a", **{name: value})), PLAIN)
        for name, value in (("trained", True), ("loss", None), ("weight", 1.0), ("loss_mask", 1))
    ],
    *[
        ("sft", chat(Q, turn("assistant", "a", **{name: value})), UNTRAINED)
        for name, value in (
            ("train", False),
            ("trained", 0),
            ("training", False),
            ("train_on_turn", False),
            ("trainable", False),
            ("loss", False),
            ("loss_weight", 0.0),
            ("loss_mask", 0),
            ("masked", True),
        )
    ],
    ("sft", chat(Q, turn("assistant", "a", train=True, weight=0)), UNTRAINED),
    ("sft", chat(Q, turn("assistant", "a", loss_weight=0.5)), "messages[1].loss_weight: found 0.5"),
    ("sft", chat(Q, turn("assistant", "a", masked="yes")), "messages[1].masked: found 'yes'"),
]

TURN_CASES = {
    "tool calls": TOOL_CALLS,
    "reasoning": REASONING,
    "parts": PARTS,
    "roles": ROLES,
    "flags": FLAGS,
}
