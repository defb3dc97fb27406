"""Columns of published layouts and what they mean: ``[(stage, row, expected)]``.

Expected is one line per message, as ``shown`` writes it, or the beginning of the error. The first case of a
kind is its strongest.
"""

import json

from row_reading import PAIR, PAIR_SHOWN, PLAIN, TOOL, A, Case, Q, chat, turn

HISTORY: list[Case] = [
    (
        "sft",
        {
            "instruction": "q",
            "input": "c",
            "output": "a",
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
        },
        [
            "system: s",
            "user: q1",
            "assistant: a1",
            "user: q2",
            "assistant: a2",
            "user: q | c",
            "assistant: a",
        ],
    ),
    ("sft", {"instruction": "q", "output": "a", "history": []}, PLAIN),
    ("sft", {"instruction": "q", "output": "a", "history": None}, PLAIN),
    ("sft", {"instruction": "q", "output": "a", "history": ""}, PLAIN),
    (
        "sft",
        {"instruction": "q", "output": "a", "history": '[["q1", "a1"]]'},
        ["user: q1", "assistant: a1", *PLAIN],
    ),
    (
        "sft",
        {"prompt": "q", "response": "a", "history": [["q1", "a1"]]},
        ["user: q1", "assistant: a1", *PLAIN],
    ),
    (
        "sft",
        chat(turn("system", "s"), Q, A, history=[["q1", "a1"]]),
        ["system: s", "user: q1", "assistant: a1", *PLAIN],
    ),
    (
        "sft",
        {"question": "q", "answer": "a", "history": [turn("user", "q1"), turn("assistant", "a1")]},
        ["user: q1", "assistant: a1", *PLAIN],
    ),
    (
        "pairs",
        {"instruction": "q", "chosen": "a", "rejected": "b", "history": [["q1", "a1"]]},
        ["user: q1", "assistant: a1", *PAIR_SHOWN],
    ),
    (
        "labels",
        {"prompt": "q", "completion": "a", "label": True, "history": [["q1", "a1"]]},
        ["user: q1", "assistant: a1", *PLAIN],
    ),
    ("prompts", {"instruction": "q", "history": [["q1", "a1"]]}, ["user: q1", "assistant: a1", "user: q"]),
    (
        "sft",
        {"instruction": "q", "output": "a", "history": "talk"},
        "history: found 'talk', expected a list of",
    ),
    ("sft", {"instruction": "q", "output": "a", "history": [["q1"]]}, "history: found [['q1']]"),
    ("sft", {"instruction": "q", "output": "a", "history": [["q1", 1]]}, "history[0][1]: found 1"),
]

SYSTEM: list[Case] = [
    ("sft", chat(Q, A, system="s", system_prompt="s"), ["system: s", *PLAIN]),
    ("sft", chat(Q, A, system_prompt="s"), ["system: s", *PLAIN]),
    ("sft", chat(turn("system", "own"), Q, A, system="s"), ["system: own", *PLAIN]),
    ("sft", chat(turn("system", " "), Q, A, system="s"), ["system: s", *PLAIN]),
    ("sft", chat(turn("system", ""), Q, A), PLAIN),
    (
        "sft",
        {"definition": "q", "inputs": "c", "targets": "a", "system": "s"},
        ["system: s", "user: q | c", "assistant: a"],
    ),
    (
        "sft",
        {"question": "q", "rationale": "r", "answer": "a", "system_prompt": "s"},
        ["system: s", "user: q", "assistant: r\n#### a"],
    ),
    ("sft", {"task": "t", "prompt": "q", "completion": "a", "system": "s"}, ["system: s", *PLAIN]),
    ("pairs", PAIR | {"system_prompt": "s"}, ["system: s", *PAIR_SHOWN]),
    (
        "pairs",
        {"prompt": [turn("system", "s"), Q], "chosen": [Q, A], "rejected": [Q, turn("assistant", "b")]},
        ["system: s", *PAIR_SHOWN],
    ),
    (
        "pairs",
        {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1], "system": "s"},
        ["system: s", *PAIR_SHOWN],
    ),
    ("prompts", {"question": "q", "system_prompt": "s"}, ["system: s", "user: q"]),
    ("sft", chat(Q, A, system="s", system_prompt="t"), "system_prompt: found 't', but 'system' is 's'"),
    ("sft", chat(Q, A, system=float("nan"), tools=float("nan"), history=float("nan")), PLAIN),
    ("sft", {"instruction": "q", "output": float("nan")}, "output: missing or null"),
    ("sft", chat(Q, A, system=1), "system: found 1, expected text"),
]

TOOLS: list[Case] = [
    (
        "pairs",
        {
            "conversations": [turn("system", "s"), Q],
            "tools": [{"name": "clock"}],
            "chosen": A,
            "rejected": turn("assistant", "b"),
        },
        ["system: s", f"tools: {TOOL}", *PAIR_SHOWN],
    ),
    ("pairs", PAIR | {"tools": '[{"name": "clock"}]'}, [f"tools: {TOOL}", *PAIR_SHOWN]),
    ("pairs", PAIR | {"tools": "[]"}, PAIR_SHOWN),
    (
        "pairs",
        {"chosen": [Q, A], "rejected": [Q, turn("assistant", "b")], "tools": [{"name": "clock"}]},
        [f"tools: {TOOL}", *PAIR_SHOWN],
    ),
    ("labels", chat(Q, A, label=False, tools=[{"name": "clock"}]), [f"tools: {TOOL}", *PLAIN]),
    ("prompts", {"prompt": "q", "tools": [{"name": "clock"}]}, [f"tools: {TOOL}", "user: q"]),
    ("sft", {"instruction": "q", "output": "a", "tools": [{"name": "clock"}]}, [f"tools: {TOOL}", *PLAIN]),
    ("sft", chat(Q, A, functions=[{"name": "clock"}]), [f"tools: {TOOL}", *PLAIN]),
    ("sft", chat(Q, A, functions=[{"name": "clock"}], tools=[{"name": "clock"}]), [f"tools: {TOOL}", *PLAIN]),
    ("sft", chat(Q, A, tools=[{"type": "function", "name": "clock"}]), [f"tools: {TOOL}", *PLAIN]),
    (
        "sft",
        chat(Q, A, tools=[{"type": "function", "function": {"name": "c", "parameters": '{"a": 1}'}}]),
        ['tools: {"type": "function", "function": {"name": "c", "parameters": {"a": 1}}}', *PLAIN],
    ),
    ("pairs", PAIR | {"tools": "clock"}, "tools: not JSON"),
    ("pairs", PAIR | {"tools": [{"title": "clock"}]}, "tools: found {'title': 'clock'}"),
]

LISTED = [turn("user", "q"), turn("assistant", "a")]
JSON_CELLS: list[Case] = [
    ("sft", {"messages": json.dumps(LISTED), "tools": '[{"name": "clock"}]'}, [f"tools: {TOOL}", *PLAIN]),
    (
        "sft",
        {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
        PLAIN,
    ),
    ("sft", {"messages": f"  {json.dumps(LISTED, indent=2)}"}, PLAIN),
    ("sft", {"prompt": json.dumps(LISTED[:1]), "completion": json.dumps(LISTED[1:])}, PLAIN),
    ("sft", {"prompt": "[1, 2]", "completion": '{"a": 1}'}, ["user: [1, 2]", 'assistant: {"a": 1}']),
    ("sft", {"prompt": "[q", "completion": "{a"}, ["user: [q", "assistant: {a"]),
    (
        "sft",
        {"instruction": json.dumps(LISTED), "output": "a"},
        [f"user: {json.dumps(LISTED)}", "assistant: a"],
    ),
    (
        "pairs",
        {"chosen": json.dumps(LISTED), "rejected": json.dumps([Q, turn("assistant", "b")])},
        PAIR_SHOWN,
    ),
    ("pairs", {"prompt": "q", "responses": '["a", "b"]', "scores": "[2, 1]"}, PAIR_SHOWN),
    ("labels", {"messages": json.dumps(LISTED), "label": "True"}, PLAIN),
    ("prompts", {"prompt": json.dumps(LISTED[:1])}, ["user: q"]),
    ("sft", {"messages": "[{'role': 'user', 'content': 'q'}]"}, "messages: found \"[{'role'"),
    ("sft", {"messages": f"[{'9' * 5000}]"}, "messages: found '[999"),
    ("sft", {"messages": "[" * 100_000}, "messages: found '[[["),
]

COLUMN_CASES = {
    "history": HISTORY,
    "system": SYSTEM,
    "tools": TOOLS,
    "JSON in a cell": JSON_CELLS,
}
