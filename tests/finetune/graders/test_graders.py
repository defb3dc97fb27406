"""Graders by tables, and graders by their names: options, unknown names, missing packages."""

import sys
from typing import Any

import pytest

from finetune.graders.loading import load_grader
from finetune.recipe.errors import UserError
from finetune.recipe.graders import grader_names
from finetune.recipe.user_arguments import CompletionRow
from finetune.recipe.user_function import file_digest, load_user_function

NFD = "\u1112\u1161\u11ab"  # the syllable 한 in decomposed form
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
CITIES = ["Busan", "New York", "York"]


def grade(name: str, completion: str, columns: dict[str, Any], options: dict[str, Any]) -> Any:
    row = CompletionRow("prompt", completion, None, "row", {"row": columns})
    return load_grader(name, options, where="s.yaml: grader").call(row)


@pytest.mark.parametrize(
    ("name", "options", "completion", "columns", "value"),
    [
        ("exact", {}, "  a  b\n", {"expected": "a b"}, True),
        ("exact", {}, "The Nile.", {"expected": "nile"}, False),
        ("exact", {"lenient": True}, "The Nile.", {"expected": "nile"}, True),
        ("exact", {}, NFD, {"expected": "한"}, True),
        ("exact", {}, "7", {"expected": 7}, True),
        ("exact", {}, "b", {"expected": ["a", "b"]}, True),
        ("contains", {}, "It is the NILE!", {"expected": "nile"}, True),
        ("contains", {"case_sensitive": True}, "It is the NILE!", {"expected": "nile"}, False),
        ("contains", {"words": True}, "juvenile", {"expected": "nile"}, False),
        ("contains", {}, "수도는 서울입니다.", {"expected": "서울"}, True),
        ("contains", {}, "a", {"expected": ["a", "b"]}, True),
        ("contains", {"all": True}, "a", {"expected": ["a", "b"]}, False),
        ("number", {}, "48 + 24 = 72", {"expected": "#### 72"}, True),
        ("number", {"tolerance": 0.01}, "3.14", {"expected": "3.1416"}, True),
        ("regex", {"pattern": r"\d{4}"}, "in 1999", {}, True),
        ("regex", {"pattern": r"\d{4}", "full": True}, "in 1999", {}, False),
        ("regex", {"pattern": "^yes", "ignore_case": True}, "Yes, I do", {}, True),
        ("regex", {}, "abc", {"pattern": "a.c"}, True),
        ("regex", {}, "abc", {"expected": "b+"}, True),
        (
            "regex",
            {"pattern": r"Answer: (\w)", "compare": True},
            "Answer: A, no, Answer: B",
            {"expected": "B"},
            True,
        ),
        ("regex", {"pattern": r"Answer: (\w)", "compare": True}, "B", {"expected": "B"}, False),
        ("json_schema", {}, '{"age": 3}', {}, True),
        ("json_schema", {}, "{'age': 3}", {}, False),
        ("json_schema", {}, "NaN", {}, False),
        ("json_schema", {"json_schema": AGE}, '```json\n{"age": 3}\n```', {}, True),
        ("json_schema", {"json_schema": AGE, "fence": False}, '```json\n{"age": 3}\n```', {}, False),
        ("json_schema", {"json_schema": AGE}, 'Here: {"age": 3}', {}, False),
        ("json_schema", {"json_schema": AGE}, '{"age": "3"}', {}, False),
        ("json_schema", {}, '{"age": "3"}', {"schema": '{"required": ["name"]}'}, False),
        ("choice", {}, "The answer is (B), not A.", {"expected": "B"}, True),
        ("choice", {}, "Answer: A. No: the answer is B", {"expected": "B"}, True),
        ("choice", {}, "B. York", {"expected": 1, "choices": CITIES}, True),
        ("choice", {}, "A large town", {"expected": "A", "choices": CITIES}, False),
        ("choice", {}, "I would say New York.", {"expected": 1, "choices": CITIES}, True),
        ("choice", {}, "York, I think", {"expected": "York", "choices": CITIES}, True),
        ("choice", {}, "Busan or York", {"expected": "York", "choices": CITIES}, False),
        (
            "choice",
            {},
            "it is (C)",
            {"expected": 2, "choices": {"text": CITIES, "label": ["A", "B", "C"]}},
            True,
        ),
        (
            "choice",
            {"labels": "numbers"},
            "정답은 ②번입니다.",
            {"expected": 2, "choices": ["가", "나"]},
            True,
        ),
        ("choice", {"labels": "numbers"}, "1", {"expected": "2", "choices": ["가", "나"]}, False),
        ("refusal", {}, "I'm sorry, but I can’t help with that.", {}, True),
        ("refusal", {}, "Of course! First, open the file.", {}, False),
        ("refusal", {"refuses": False}, "Of course! First, open the file.", {}, True),
        ("refusal", {}, "", {}, False),
    ],
)
def test_grade(
    name: str, options: dict[str, Any], completion: str, columns: dict[str, Any], value: bool
) -> None:
    assert grade(name, completion, columns, options) is value


def test_every_grader_loads_by_its_name_and_has_a_digest() -> None:
    names = grader_names()
    assert {"exact", "number", "instructions", "refusal"} <= set(names)
    assert not {"loading", "stories"} & set(names)
    for name in names:
        assert load_user_function(name, where="here").name == name
    assert len({file_digest(name, where="here") for name in names}) == len(names)


def test_a_column_called_options_is_not_an_option() -> None:
    assert grade("exact", "a", {"expected": "a", "options": ["x", "y"]}, {}) is True


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("numbr", {}, ["s.yaml: grader: 'numbr' is unknown", "did you mean 'number'?"]),
        ("regex", {"patern": "a"}, ["s.yaml: grader_options.patern: unknown key"]),
        (
            "regex",
            {"pattern": "("},
            ["s.yaml: grader_options.pattern: found the string '('", "no regular expression"],
        ),
        ("json_schema", {"json_schema": {"type": "thing"}}, ["no JSON schema", "'thing' is not valid"]),
        ("nofile.py:f", {}, ["'nofile.py' does not exist"]),
    ],
)
def test_a_mistake_in_a_suite_is_one_message(name: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_grader(name, options, where="s.yaml: grader")
    assert len(error.value.problems) == 1
    assert [part for part in parts if part not in str(error.value)] == []


def test_options_of_a_function_are_refused(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("def good(completion):\n    return 1\n", encoding="utf-8")
    function = f"{tmp_path}/mine.py:good"
    assert load_grader(function, {}, where="grader").call(CompletionRow("p", "c")) == 1
    with pytest.raises(UserError, match="grader_options: a for the function"):
        load_grader(function, {"a": 1}, where="grader")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jsonschema" else sys)
    with pytest.raises(UserError, match=r"needs the package jsonschema[\s\S]*llm-align\[graders\]"):
        load_grader("json_schema", {}, where="grader")


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("choice", {"expected": "D", "choices": CITIES}, "the reference answer is 'D'"),
        ("regex", {}, "no pattern"),
        ("number", {"expected": "many"}, "no number"),
    ],
)
def test_a_row_without_an_answer_is_an_error(name: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade(name, "text", columns, {})
