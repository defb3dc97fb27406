"""Calls of user functions: returned values, exceptions, signatures, durations."""

import math
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.recipe import user_calls
from finetune.recipe.errors import UserError, UserFunctionError
from finetune.recipe.user_arguments import CompletionRow, RowFunction, signature_problems
from finetune.recipe.user_calls import CALLS, CallLog, CallTimes, merge_call_times
from finetune.recipe.user_function import (
    call_for_number,
    call_user_function,
    load_user_function,
)

NUMBERS = {
    "bool": (True, 1.0),
    "int": (3, 3.0),
    "numpy bool": (np.bool_(False), 0.0),
    "numpy float32": (np.float32(0.5), 0.5),
    "numpy float16": (np.float16(0.5), 0.5),
    "numpy longdouble": (np.longdouble(0.5), 0.5),
    "numpy int": (np.int64(7), 7.0),
    "0-d array": (np.array(2.5), 2.5),
    "torch scalar": (torch.tensor(2.5, requires_grad=True), 2.5),
    "torch bfloat16": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    "torch bool": (torch.tensor(True), 1.0),
    "Decimal": (Decimal("0.25"), 0.25),
    "Fraction": (Fraction(1, 4), 0.25),
}


@pytest.mark.parametrize(("value", "number"), NUMBERS.values(), ids=list(NUMBERS))
def test_every_scalar_is_a_number(value: Any, number: float) -> None:
    returned = call_for_number(lambda prompt, reply: value, "p", "r", where="here")
    assert type(returned) is float and returned == number


class Odd:
    def __repr__(self) -> str:
        raise ValueError("no text")


async def coroutine() -> float:
    return 1.0


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "None": (lambda: None, "it returned None", "return 0"),
    "nan": (lambda: math.nan, "it returned nan", ""),
    "inf": (lambda: -math.inf, "it returned -inf", ""),
    "numpy nan": (lambda: np.float32("nan"), "nan", ""),
    "torch inf": (lambda: torch.tensor(math.inf), "inf", ""),
    "Decimal NaN": (lambda: Decimal("sNaN"), "sNaN", ""),
    "huge": (lambda: 10**400, "it returned 1000", ""),
    "text": (lambda: "0.5", "it returned '0.5'", "float"),
    "numpy text": (lambda: np.str_("a"), "a", "float"),
    "complex": (lambda: 1j, "1j", ""),
    "numpy complex": (lambda: np.clongdouble(1j), "1j", ""),
    "date": (lambda: np.datetime64("2024-01-01"), "2024", ""),
    "list": (lambda: [0.5] * 1000, "it returned [0.5,", "once per completion"),
    "array": (lambda: np.ones(1), "array", "once per completion"),
    "dict": (lambda: {"score": 1}, "{'score': 1}", "once per completion"),
    "generator": (lambda: (x for x in [1.0]), "a generator", "`return` and not `yield`"),
    "coroutine": (lambda: coroutine(), "a coroutine", "async def"),
    "repr": (lambda: Odd(), "Odd", ""),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "actual", "repair"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_finite_number_is_refused(make: Callable[[], Any], actual: str, repair: str) -> None:
    with pytest.raises(UserFunctionError) as message:
        call_for_number(lambda prompt, reply: make(), "the prompt", "the reply", where="reward 'x' on row 3")
    [problem] = message.value.problems
    assert problem.where == "reward 'x' on row 3" and actual in problem.actual and repair in problem.repair
    assert (
        "prompt 'the prompt'" in problem.actual
        and "completion 'the reply'" in problem.actual
        and len(problem.actual) < 500
    )


@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), RecursionError("deep"), MemoryError(), OSError(28, "full")]
)
def test_any_exception_of_a_function_is_a_user_error(error: BaseException) -> None:
    def judge(prompt: str, reply: str) -> float:
        raise error

    with pytest.raises(UserFunctionError) as message:
        call_user_function(judge, "p", "r", where="here")
    line = judge.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in str(message.value)
    assert ("it called sys.exit(3)" if error.args == (3,) else type(error).__name__) in str(message.value)


def test_ctrl_c_during_a_call_is_no_error_of_the_function() -> None:
    def judge(prompt: str, reply: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_user_function(judge, "p", "r", where="here")


FORMS = """\
import functools


class Judge:
    def __call__(self, prompt, completion):
        return 2.0

    def score(self, prompt, completion):
        return 3.0


def general(scale, prompt, completion, *, offset=0.0):
    return scale + offset


called = Judge()
method = Judge().score
scaled = functools.partial(general, 4.0)
anonymous = lambda prompt, completion: 5.0
open_ended = lambda *arguments, **options: 6.0
cached = functools.lru_cache(lambda prompt, completion: 7.0)
builtin = max
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("called", 2.0),
        ("method", 3.0),
        ("scaled", 4.0),
        ("anonymous", 5.0),
        ("open_ended", 6.0),
        ("cached", 7.0),
        ("builtin", "p"),
    ],
)
def test_anything_that_can_be_called_is_a_function(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "rules.py").write_text(FORMS)
    function = load_user_function(f"{tmp_path}/rules.py:{name}", where="here")
    assert signature_problems(function, ("prompt", "completion"), where="here") == []
    assert RowFunction(function).call(CompletionRow("p", "c")) == value


def test_a_class_is_refused_with_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(FORMS)
    with pytest.raises(UserError, match=r"add `my_rule = Judge\(\)` to the file"):
        load_user_function(f"{tmp_path}/rules.py:Judge", where="here")
    with pytest.raises(UserError, match="one of general, called, method, anonymous, open") as message:
        load_user_function(f"{tmp_path}/rules.py:other", where="here")
    assert "Judge" not in str(message.value) and "functools" not in str(message.value)


def test_calls_are_counted_and_a_slow_one_is_reported_while_it_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_calls, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(user_calls, "POLL_SECONDS", 0.001)
    log = CallLog()
    for _ in range(2):
        with log.timed("rules.py:slow", "prompt 'p'"):
            while "rules.py:slow" not in log.reported:
                time.sleep(0.001)
    error = capsys.readouterr().err
    assert error.count("rules.py:slow has been running for 0 s on prompt 'p'") == 1
    assert log.times["rules.py:slow"].calls == 2 and log.times["rules.py:slow"].seconds >= 0.02


def test_ranks_call_at_the_same_time() -> None:
    ranks = [{"f": CallTimes(3, 1.5, 1.0)}, {"f": CallTimes(2, 2.5, 0.5), "g": CallTimes(1, 0.1, 0.1)}]
    assert merge_call_times(ranks) == {
        "f": {"calls": 5, "seconds": 2.5, "slowest": 1.0},
        "g": {"calls": 1, "seconds": 0.1, "slowest": 0.1},
    }


def test_a_call_is_recorded_under_the_function_s_name(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def rule(prompt, completion):\n    return 1.0\n")
    text = f"{tmp_path}/rules.py:rule"
    function = load_user_function(text, where="here")
    CALLS.clear()
    assert [function("p", "c"), function("p", "d")] == [1.0, 1.0]
    assert CALLS.times[text].calls == 2
