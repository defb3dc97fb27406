"""Published layouts are parsed to conversations; bad rows are reported with file, line and field."""

import pytest

from data_templates.segments import Message
from finetune.data.layouts import detect_layout
from finetune.data.readers import SourceRow
from finetune.data.rows import parse_rows
from finetune.recipe.errors import UserError

S, U, A = (
    lambda text, **more: Message("system", text, **more),
    lambda text, **more: Message("user", text, **more),
    lambda text, **more: Message("assistant", text, **more),
)


def read(row, columns=None):
    """Return one row's layout name and conversation."""
    layout = detect_layout(row, columns=columns)
    [conversation] = parse_rows([SourceRow(row, "file:1")], layout, columns)
    return layout.name, conversation


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"instruction": "q", "output": "a"}, "Alpaca", [U("q"), A("a")]),
        ({"instruction": "q", "input": "c", "output": "a"}, "Alpaca", [U("q", context="c"), A("a")]),
        ({"instruction": "q", "input": None, "output": "a"}, "Alpaca", [U("q"), A("a")]),
        ({"instruction": "q", "output": "a", "system": "s"}, "Alpaca", [S("s"), U("q"), A("a")]),
        ({"instruction": "q", "output": "a", "system": ""}, "Alpaca", [U("q"), A("a")]),
        ({"prompt": "q", "completion": "a"}, "prompt/completion", [U("q"), A("a")]),
        ({"prompt": "q", "response": "a", "system": "s"}, "prompt/response", [S("s"), U("q"), A("a")]),
        ({"question": "q", "answer": "a"}, "question/answer", [U("q"), A("a")]),
        (
            {"question": "q", "rationale": "r", "answer": "a"},
            "question/rationale/answer",
            [U("q"), A("r\n#### a")],
        ),
        ({"task": "t", "prompt": "q\n", "completion": "a<|endoftext|>"}, "T0 tasks", [U("q\n"), A("a")]),
        (
            {"task": "t", "prompt": "q", "completion": "<|endoftext|>a"},
            "T0 tasks",
            [U("q"), A("<|endoftext|>a")],
        ),
        ({"prompt": "q", "completion": "a<|endoftext|>"}, "prompt/completion", [U("q"), A("a<|endoftext|>")]),
        (
            {"definition": "d", "inputs": "i", "targets": "a"},
            "Natural Instructions",
            [U("d", context="i"), A("a")],
        ),
        ({"text": "q", "label": "a"}, "text/label", [U("q"), A("a")]),
        ({"text": "q", "label": 1}, "text/label", [U("q"), A("1")]),
        ({"inputs": "q", "targets": "a", "task_name": "t"}, "inputs/targets", [U("q"), A("a")]),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt/completion",
            [U("q"), A("a")],
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            "messages",
            [S("s"), U("q")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "trained": False},
                ]
            },
            "messages",
            [U("q"), A("a", trained=False)],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            "ShareGPT",
            [S("s"), U("q"), A("a")],
        ),
        (
            {
                "conversations": [{"from": "system", "value": "own"}, {"from": "user", "value": "q"}],
                "system": "s",
            },
            "ShareGPT",
            [S("own"), U("q")],
        ),
        ({"conversations": [{"role": "user", "content": "q"}]}, "ShareGPT", [U("q")]),
    ],
)
def test_layouts(row, name, expected):
    assert read(row) == (name, expected)


def test_columns_of_other_names_are_mapped():
    row = {"frage": "q", "antwort": "a", "kontext": "c", "id": 7}
    columns = {"instruction": "frage", "output": "antwort", "input": "kontext"}
    assert read(row, columns) == ("Alpaca", [U("q", context="c"), A("a")])


def test_a_mapped_column_loses_its_own_name():
    # `output` holds the question here; it must not make the row an Alpaca one with a missing instruction.
    row = {"output": "q", "answer": "a"}
    assert read(row, {"question": "output"}) == ("question/answer", [U("q"), A("a")])


def test_columns_can_be_exchanged():
    row = {"prompt": "a", "completion": "q"}
    assert read(row, {"prompt": "completion", "completion": "prompt"})[1] == [U("q"), A("a")]


def test_unknown_columns_list_the_layouts_and_the_repair():
    with pytest.raises(UserError) as caught:
        detect_layout(["frage", "antwort"], where="my.csv")
    text = str(caught.value)
    assert text.startswith("my.csv: no known layout has columns frage, antwort")
    assert "instruction+output" in text
    assert "question+answer" in text
    assert "'data.columns={instruction: QUESTION_COLUMN, output: ANSWER_COLUMN}'" in text


def test_mapping_to_a_missing_column_suggests_the_closest_name():
    with pytest.raises(UserError) as caught:
        detect_layout(["question", "reply"], columns={"instruction": "questoin"}, where="my.csv")
    text = str(caught.value)
    assert "data.columns: 'instruction' is mapped to 'questoin', but my.csv has no such column" in text
    assert "did you mean 'question'?" in text


def test_mapping_in_the_wrong_direction_is_turned_around():
    with pytest.raises(UserError) as caught:
        detect_layout(["ticket", "reply"], columns={"ticket": "instruction"}, where="my.csv")
    assert "repair:   the layout's name is on the left: 'data.columns={instruction: ticket}'" in str(
        caught.value
    )


ALPACA = {"instruction": "q", "output": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}]}


def turn(**fields):
    """Return a row with one turn."""
    return {"messages": [fields]}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (ALPACA, {"instruction": "q"}, "field 'output': missing or null"),
        (ALPACA, {"instruction": "q", "output": None}, "field 'output': missing or null"),
        (ALPACA, {"instruction": 3, "output": "a"}, "field 'instruction': found 3\n    expected: text"),
        (ALPACA, {"instruction": "q", "output": ["a"]}, "field 'output': found ['a']\n    expected: text"),
        (ALPACA, {"instruction": "q", "input": 1.5, "output": "a"}, "field 'input': found 1.5"),
        (ALPACA, {"instruction": "q", "output": "a", "system": 1}, "field 'system': found 1"),
        (
            ALPACA,
            {"instruction": "q\ud83d", "output": "a"},
            "field 'instruction': an unpaired surrogate ('\\ud83d')",
        ),
        (
            CHAT,
            {"messages": "q"},
            "field 'messages': found 'q'\n    expected: a list of turns with role and content",
        ),
        (CHAT, {"messages": []}, "field 'messages': found []"),
        (CHAT, {"messages": ["q"]}, "field 'messages[0]': found 'q'"),
        (CHAT, turn(role="user"), "field 'messages[0]': found {'role': 'user'}"),
        (
            CHAT,
            turn(role="robot", content="x"),
            "field 'messages[0].role': found 'robot'\n    expected: one of system",
        ),
        (CHAT, turn(role=["user"], content="x"), "field 'messages[0].role': found ['user']"),
        (
            CHAT,
            turn(role="assistant", content="x", tool_calls=[{"id": "1"}]),
            "field 'messages[0].tool_calls': found {'id': '1'}\n    expected: ",
        ),
        (
            CHAT,
            turn(role="user", content=None),
            "field 'messages[0].content': found None\n    expected: text",
        ),
        (CHAT, turn(role="user", content="\udc00"), "field 'messages[0].content': an unpaired surrogate"),
    ],
)
def test_pain_24_a_bad_row_is_reported_with_line_and_field(good, bad, message):
    layout = detect_layout(good)
    with pytest.raises(UserError) as caught:
        parse_rows([SourceRow(good, "file:1"), SourceRow(bad, "file:2")], layout, None)
    assert str(caught.value).startswith(f"file:2: {message}")
    assert len(caught.value.problems) == 1


def test_many_bad_rows_are_summarized():
    rows = [SourceRow({"instruction": "q", "output": number}, f"file:{number}") for number in range(1, 21)]
    with pytest.raises(UserError) as caught:
        parse_rows(rows, detect_layout(ALPACA), None)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == ["file:1", "file:2", "file:3", "file:4", "file:5", "and 15 more rows"]
    assert "20 of 20 rows do not fit" in str(caught.value)


def test_long_values_are_shortened():
    with pytest.raises(UserError) as caught:
        parse_rows(
            [SourceRow({"instruction": ["x" * 500], "output": "a"}, "file:1")], detect_layout(ALPACA), None
        )
    assert len(caught.value.problems[0].actual) < 100
