"""Functions given in Python as values of a recipe: names, digests of their code, texts in recipe.yaml."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from finetune.recipe.errors import UserError
from finetune.recipe.python_function import PythonFunction
from finetune.recipe.user_function import file_digest, load_user_function


def define(source: str, name: str = "rule", **values: Any) -> Callable[..., Any]:
    """Return a function as a notebook's cell defines it."""
    namespace: dict[str, Any] = {"__name__": "notebook", **values}
    exec(source, namespace)  # noqa: S102 - a test's own source
    function: Callable[..., Any] = namespace[name]
    return function


def digest(source: str, **values: Any) -> str:
    return PythonFunction.of(define(source, **values)).sha256


RULE = "def rule(completion):\n    return {}\n"
HELPED = "def helper(text):\n    return {}\ndef rule(completion):\n    return helper(completion)\n"


def test_the_digest_is_that_of_the_code() -> None:
    assert digest(RULE.format(1)) == digest("# a comment\n\n" + RULE.format(1)) != digest(RULE.format(2))
    assert digest(HELPED.format("len(text)")) != digest(HELPED.format("len(text) - 1")), "a helper"
    limit = RULE.format("len(completion) < LIMIT")
    assert digest(limit, LIMIT=3) == digest(limit, LIMIT=3) != digest(limit, LIMIT=4), "a global"
    assert digest(RULE.replace("completion", "completion, weight=1").format("weight")) != digest(
        RULE.replace("completion", "completion, weight=2").format("weight")
    )


def test_functions_that_call_each_other_have_a_digest() -> None:
    source = "def even(n):\n    return n == 0 or odd(n - 1)\ndef odd(n):\n    return n != 0 and even(n - 1)\n"
    assert PythonFunction.of(define(source, "even")).sha256 != PythonFunction.of(define(source, "odd")).sha256


class Judge:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, completion: str) -> bool:
        return len(completion) < self.limit


def general(scale: float, completion: str) -> float:
    return scale * len(completion)


@pytest.mark.parametrize(
    ("function", "other", "name"),
    [
        (Judge(3), Judge(4), "Judge"),
        (partial(general, 2.0), partial(general, 3.0), "general"),
        (Judge(3).__call__, Judge(4).__call__, "__call__"),
        (lambda completion: 1.0, lambda completion: 2.0, "function"),
    ],
)
def test_objects_partials_methods_and_lambdas(
    function: Callable[..., Any], other: Callable[..., Any], name: str
) -> None:
    value = PythonFunction.of(function)
    assert value.name == name and str(value) == f"<function {name} given in Python>"
    assert value.sha256 == PythonFunction.of(function).sha256 != PythonFunction.of(other).sha256


def test_it_is_called_like_a_function_of_a_file() -> None:
    value = PythonFunction.of(Judge(3))
    assert load_user_function(value, where="here")(completion="ab") is True
    assert file_digest(value, where="here") == value.sha256


def test_its_text_in_a_recipe_file_asks_for_it_again() -> None:
    with pytest.raises(UserError, match="which a recipe file cannot hold") as error:
        load_user_function("<function rule given in Python>", where="rewards.sources[0].function")
    assert "load_recipe(RUN, reward=function)" in str(error.value)
