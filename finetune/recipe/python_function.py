"""A user's Python function that a recipe names as ``path/to/file.py:function``."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.recipe.discovery import INSTALLED
from finetune.recipe.errors import Problem, UserError, nearest, one_of
from finetune.recipe.paths import local_path

EXPECTED = "path/to/file.py:function"
NUMBER = "a finite number, or true or false"
SHOWN = 80
"""Characters of prompt and reply in a message about a function that failed on them."""


def load_function(text: str, *, where: str) -> Callable[..., Any]:
    """Return the function that ``text`` names; its file is executed.

    Args:
        text: ``path/to/file.py:function``; relative paths start where the user is, then in the project's
            folder.
        where: the recipe's key, for the message.

    Raises:
        UserError: no such file, an error while it is executed, or no such function in it.
    """
    file = function_file(text, where=where)
    name = text.rpartition(":")[2]
    module = _executed(file, where)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    if name not in functions:
        found = f"'{file}' has no function '{name}'"
        expected = one_of(functions) if functions else "a function, and the file has none"
        raise UserError(Problem(where, found, expected, nearest(name, functions)))
    function: Callable[..., Any] = vars(module)[name]
    return function


def function_file(text: str, *, where: str) -> Path:
    """Return the existing file of ``path/to/file.py:function``.

    Raises:
        UserError: ``text`` is written otherwise, or there is no such file.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(Problem(where, f"'{text}'", EXPECTED, f"write {where}: rules.py:my_rule"))
    file = local_path(path) or local_path(str(INSTALLED / path))
    if file is None or not file.is_file():
        repair = f"relative paths start at {Path.cwd()}"
        raise UserError(Problem(where, f"'{path}' does not exist", "an existing Python file", repair))
    return file


def file_digest(text: str, *, where: str) -> str:
    """Return the SHA-256 of the file of ``path/to/file.py:function``.

    Raises:
        UserError: there is no such file.
    """
    return hashlib.sha256(function_file(text, where=where).read_bytes()).hexdigest()


def number_from(function: Callable[[str, str], Any], prompt: str, reply: str, *, where: str) -> float:
    """Return what a user's function says of a reply.

    Raises:
        UserError: it raised something, or gave no finite number; the message shows prompt and reply.
    """
    number = opinion_of(function, prompt, reply, where=where, expected=NUMBER)
    if number is None:
        problem = _no_number(where, "it returned None", prompt, reply, NUMBER)
        raise UserError(replace(problem, repair="return 0 where it has nothing to say"))
    return number


def opinion_of(
    function: Callable[[str, str], Any],
    prompt: str,
    reply: str,
    *,
    where: str,
    expected: str = f"{NUMBER}, or None",
) -> float | None:
    """Return what a user's function says of a reply, None where it has nothing to say.

    Args:
        function: (prompt, reply) -> a number or a truth.
        prompt: what was asked.
        reply: what is judged.
        where: who judges, for the message.
        expected: what it should return, for the message.

    Raises:
        UserError: it raised something, or returned neither a finite number nor None.
    """
    try:
        value = function(prompt, reply)
    except Exception as error:  # the function is the user's and may raise anything
        found = f"{type(error).__name__}: {error}"
        raise UserError(_no_number(where, found, prompt, reply, expected)) from error
    if value is None:
        return None
    if not isinstance(value, Real) or not isfinite(value):
        raise UserError(_no_number(where, f"it returned {value!r}", prompt, reply, expected))
    return float(value)


def _no_number(where: str, found: str, prompt: str, reply: str, expected: str) -> Problem:
    at = f"{found}; prompt {prompt[:SHOWN]!r}, reply {reply[:SHOWN]!r}"
    return Problem(where, at, expected)


def call_problems(function: Callable[..., Any], parameters: tuple[str, ...], *, where: str) -> list[Problem]:
    """Return what is wrong with a function that will be called with these arguments, in this order."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        own = f"{function.__name__}{inspect.signature(function)}"
        expected = f"a function that takes ({', '.join(parameters)})"
        return [Problem(where, f"{own}: {error}", expected)]
    return []


def _executed(file: Path, where: str) -> ModuleType:
    """Return a file as a module of its own, whatever other files are called."""
    file = file.resolve()
    name = f"recipe_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's and may raise anything
        del sys.modules[name]
        found = f"'{file}' cannot be executed: {type(error).__name__}: {error}"
        raise UserError(Problem(where, found, "a Python file that can be imported")) from error
    return module


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
