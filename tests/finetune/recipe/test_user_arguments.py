"""Arguments of user functions: filled by name, TRL's signature, what is refused and what is reported."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest

from data_templates.segments import Message
from finetune.recipe.errors import UserFunctionError
from finetune.recipe.user_arguments import (
    ROW_NAMES,
    CompletionRow,
    RowFunction,
    column_problems,
    default_notes,
    missing_value_problems,
    signature_problems,
)
from finetune.recipe.user_function import call_for_numbers

COLUMNS = {
    "a:1": {"question": "1 + 1?", "answer": "2", "level": 3},
    "a:2": {"question": "2 + 2?", "answer": "4", "expected": "four", "level": None},
}
NAMES = ["question", "answer", "expected", "level"]
TALK = {"a:1": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hi"}]}}
TWO = ("prompt", "completion")


def row(number: int = 1, completion: str = "2", **more: Any) -> CompletionRow:
    return CompletionRow("1 + 1?", completion, "solution 2", f"a:{number}", COLUMNS, **more)


async def an_async_rule(prompt: str, completion: str) -> float:
    return 1.0


CALLS: list[tuple[Callable[..., Any], Any]] = [
    (lambda prompt, completion: (prompt, completion), ("1 + 1?", "2")),
    (lambda completion, prompt: (prompt, completion), ("1 + 1?", "2")),
    (lambda completion: completion, "2"),
    (lambda completion, expected: expected, "solution 2"),
    (lambda completion, *, answer: answer, "2"),
    (lambda completion, answer=None: answer, "2"),
    (lambda completion, level=0: level, 3),
    (lambda completion, threshold=0.5: threshold, 0.5),
    (lambda prompt, completion, /, answer: (prompt, completion, answer), ("1 + 1?", "2", "2")),
    (
        lambda completion, **rest: sorted(rest),
        ["answer", "expected", "level", "prompt", "question"],
    ),
    (lambda *texts: texts, ("1 + 1?", "2")),
    (partial(lambda scale, prompt, completion: scale, 2.0), 2.0),
    (lru_cache(lambda completion: completion), "2"),
]


@pytest.mark.parametrize(("function", "value"), CALLS)
def test_parameters_are_filled_by_name(function: Callable[..., Any], value: Any) -> None:
    assert signature_problems(function, ROW_NAMES, where="here", has_columns=True) == []
    assert column_problems(RowFunction(function), NAMES, where="here") == []
    assert RowFunction(function).call(row()) == value


def test_a_column_named_expected_is_the_reference_answer() -> None:
    function = RowFunction(lambda completion, expected: expected)
    assert [function.call(row(1)), function.call(row(2))] == ["solution 2", "four"]


def test_a_missing_value_leaves_the_default() -> None:
    assert RowFunction(lambda completion, level=9: level).call(row(2)) == 9


SIGNATURES: list[tuple[Any, tuple[str, ...], bool, str, str]] = [
    (lambda prompt: 1, ROW_NAMES, True, "takes no `completion`", "`completion`"),
    (lambda prompt, reply: 1, ROW_NAMES, True, "takes no `completion`", "rename `reply` to `completion`"),
    (lambda prompt, response: 1, ROW_NAMES, True, "takes no `completion`", "rename `response`"),
    (lambda p, c: 1, ROW_NAMES, True, "takes no `completion`", "name the parameter"),
    (lambda: 1, ROW_NAMES, True, "too many positional arguments", ""),
    (an_async_rule, ROW_NAMES, True, "is an async function", "async def"),
    (lambda prompt, completion, answer: 1, TWO, False, "nothing fills the parameter 'answer'", "answer=None"),
    (lambda completion, expected: 1, TWO, False, "nothing fills the parameter 'expected'", "expected=None"),
    (lambda prompt, completion: 1, ("prompt",), False, "nothing fills the parameter 'completion'", ""),
]


@pytest.mark.parametrize(("function", "names", "has_columns", "actual", "repair"), SIGNATURES)
def test_signatures_are_refused_before_the_run(
    function: Any, names: tuple[str, ...], has_columns: bool, actual: str, repair: str
) -> None:
    [problem] = signature_problems(function, names, where="here", has_columns=has_columns)
    assert actual in problem.actual and repair in problem.repair
    assert problem.expected.startswith(f"parameters named {', '.join(names)}")


UNKNOWN: list[tuple[Any, str, str, str]] = [
    (lambda completion, answr: 1, "'answr'", "level", "did you mean 'answer'?"),
    (lambda prompt, completion, weight: 1, "'weight'", "question", "weight=None"),
    (lambda completions, prompt: 1, "'prompt'", "prompts", "did you mean 'prompts'?"),
    (lambda completions, completion_ids: 1, "'completion_ids'", "answer", "TRL's trainer"),
]


@pytest.mark.parametrize(("function", "actual", "expected", "repair"), UNKNOWN)
def test_unknown_parameters_are_refused_with_the_list(
    function: Any, actual: str, expected: str, repair: str
) -> None:
    [problem] = column_problems(RowFunction(function), NAMES, where="here")
    assert actual in problem.actual and expected in problem.expected and repair in problem.repair


def test_a_default_that_nothing_fills_is_reported() -> None:
    function = RowFunction(lambda completion, answer=None, threshold=0.5: 1)
    assert default_notes(function, NAMES, what="reward 'f'") == [
        "reward 'f': no column 'threshold' in the rows: the parameter keeps its default (0.5)"
    ]


def test_rows_without_a_value_are_counted() -> None:
    function = RowFunction(lambda completion, level, expected: 1)
    [problem] = missing_value_problems(function, [row(1), row(2)], where="reward 'f'")
    assert problem.actual == "1 of 2 rows have no value in column 'level' (first: a:2)"
    assert problem.repair == "give the parameter a default: level=None"
    bare = [CompletionRow("p", "c", None, "b:1")]
    [level, expected] = missing_value_problems(function, bare, where="reward 'f'")
    assert "a column `expected`" in expected.expected and "'level'" in level.actual


BATCHES: list[tuple[Callable[..., Any], Any]] = [
    (lambda completions, **kwargs: completions, ["2", "5"]),
    (lambda prompts, completions: prompts, ["1 + 1?", "1 + 1?"]),
    (lambda completions, answer, **kwargs: answer, ["2", "4"]),
    (lambda completions, expected: expected, ["solution 2", "four"]),
    (lambda completions, level=None, **kwargs: level, [3, None]),
    (lambda completions, weight=1.5, **kwargs: weight, 1.5),
    (
        lambda completions, **kwargs: sorted(kwargs),
        ["answer", "expected", "level", "prompts", "question"],
    ),
]


@pytest.mark.parametrize(("function", "value"), BATCHES)
def test_the_signature_of_trl_gets_lists(function: Callable[..., Any], value: Any) -> None:
    assert signature_problems(function, ROW_NAMES, where="here", has_columns=True) == []
    assert column_problems(RowFunction(function), NAMES, where="here") == []
    assert RowFunction(function).is_batch
    assert RowFunction(function).call_batch([row(1), row(2, "5")]) == value


def test_conversational_rows_give_conversations_as_in_trl() -> None:
    talk = CompletionRow("Hi", "hello", None, "a:1", TALK, [Message("user", "Hi")])
    function = RowFunction(lambda prompts, completions: (prompts[0], completions[0]))
    prompt = [{"role": "user", "content": "Hi"}]
    assert function.call_batch([talk]) == (prompt, [{"role": "assistant", "content": "hello"}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "it returned 1 values"),
        ("ab", "it returned no list"),
        ([1.0, "x"], "it returned 'x' in its list"),
        ([1.0, float("nan")], "it returned nan in its list"),
        (3.0, "TypeError"),
    ],
)
def test_a_batch_must_return_a_number_for_each_completion(value: Any, message: str) -> None:
    with pytest.raises(UserFunctionError) as error:
        call_for_numbers(lambda: value, 2, where="reward 'f' on a:1 to a:2")
    assert message in str(error.value) and "a list of 2 numbers, one per completion" in str(error.value)


def test_a_function_for_conversations_says_what_texts_are() -> None:
    function = RowFunction(lambda completions: [completion[0]["content"] for completion in completions])
    with pytest.raises(UserFunctionError, match="lists of messages if the rows are messages"):
        call_for_numbers(lambda: function.call_batch([row()]), 1, where="here")


def test_none_in_a_batch_counts_as_0() -> None:
    assert call_for_numbers(lambda: [None, True], 2, where="here") == [0.0, 1.0]
