"""Prompts of files: columns by layout, by the run's mapping and by --column; blank rows keep their place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from align.cli.generate import parse_columns, read_choices
from align.generation.prompt_file import PromptFile, read_prompts
from align.generation.settings import check_labels, unknown_labels
from finetune.recipe.errors import UserError

TICKETS = "id,text,label\n1,Where is it?,delivery\n2,,billing\n3,I paid twice.,\n"
RUN = {"text": "text", "label": "label"}
ASKED = {"role": "user", "content": "u"}
ANSWERED = {"role": "assistant", "content": "a"}


def read(tmp_path: Path, name: str, content: str, **options: Any) -> PromptFile:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return read_prompts(str(tmp_path / name), **options)


def texts(file: PromptFile) -> list[str | None]:
    return [row.prompt[-1].content if row.prompt else None for row in file.rows]


def test_a_run_s_columns_serve_where_they_exist(tmp_path: Path) -> None:
    file = read(tmp_path, "tickets.csv", TICKETS, inherited=RUN)
    assert texts(file) == ["Where is it?", None, "I paid twice."]
    assert [row.expected for row in file.rows] == ["delivery", None, None]
    assert file.names == ["id", "text", "label"]
    unlabeled = read(tmp_path, "new.csv", "text\nHello\n", inherited=RUN)
    assert texts(unlabeled) == ["Hello"] and unlabeled.rows[0].expected is None
    other = read(tmp_path, "other.csv", "question\nWhy?\n", inherited=RUN)
    assert texts(other) == ["Why?"] and other.layout == "question"


def test_typed_columns_win(tmp_path: Path) -> None:
    content = "body,text,label\nb,t,l\n"
    for name in ("text", "prompt"):
        file = read(tmp_path, "a.csv", content, columns={name: "body"}, inherited=RUN)
        assert texts(file) == ["b"]
    with pytest.raises(UserError, match=r"--column: no column 'bodi' in .*\n.*\n.*did you mean 'body'"):
        read(tmp_path, "a.csv", content, columns={"prompt": "bodi"})


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"text": "t"}, "t", None),
        ({"text": "t", "label": None}, "t", None),
        ({"text": "t", "label": 3}, "t", "3"),
        ({"prompt": "p"}, "p", None),
        ({"prompt": "p", "completion": None}, "p", None),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"instruction": "i", "input": "n"}, "i", None),
        ({"messages": [ASKED]}, "u", None),
        ({"messages": [ASKED, ANSWERED]}, "u", "a"),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "p", "good"),
    ],
)
def test_layouts(tmp_path: Path, row: Mapping[str, Any], prompt: str, expected: str | None) -> None:
    file = read(tmp_path, "a.jsonl", json.dumps(row) + "\n")
    assert texts(file) == [prompt] and file.rows[0].expected == expected and file.rows[0].columns == row


def test_text_files_are_a_prompt_per_line_and_limit_counts_rows(tmp_path: Path) -> None:
    file = read(tmp_path, "a.txt", "one\ntwo\n\nthree\n", limit=2)
    assert texts(file) == ["one", "two"]


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.jsonl:2: field 'prompt': found 7"):
        read(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n')
    with pytest.raises(UserError, match="name the column of the prompt: --column prompt=YOUR_COLUMN"):
        read(tmp_path, "b.csv", "ticket\nHello\n")


def test_choices(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffred, white\n\n초록\n", encoding="utf-8")
    assert read_choices(None, tmp_path / "labels.txt", False) == ["red, white", "초록"]
    assert read_choices("a, b ,c", None, False) == ["a", "b", "c"] and read_choices(None, None, True) is None
    for labels, message in (
        (["a"], "one label only"),
        (["a", " "], "without text"),
        (["a", "b", "a"], "twice"),
    ):
        with pytest.raises(UserError, match=message):
            check_labels(labels)
    with pytest.raises(UserError, match="more than one of --choices"):
        read_choices("a,b", None, True)
    with pytest.raises(UserError, match="cannot be read"):
        read_choices(None, tmp_path / "none", False)
    assert unknown_labels(["biling", "x", "x", "billing"], ["billing"]) == [
        "'x' (2 rows) is no choice, so these rows count as wrong",
        "'biling' (1 rows) is no choice, so these rows count as wrong; did you mean 'billing'?",
    ]


def test_columns_of_the_command_line() -> None:
    assert parse_columns(["prompt=a=b", "completion=c"]) == {"prompt": "a=b", "completion": "c"}
    with pytest.raises(UserError, match="--column: 'prompt'"):
        parse_columns(["prompt"])
