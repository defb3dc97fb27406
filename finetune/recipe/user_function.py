"""User functions of a recipe (``path/to/file.py:function``): load, check the signature, call."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.recipe.discovery import INSTALLED, local_path
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.renamed import renamed_function

FUNCTION_FORMAT = "path/to/file.py:function"
NUMBER_FORMAT = "a finite number, or true or false"
GRADER_PARAMETERS = ("prompt", "reply")
MAX_SHOWN_CHARACTERS = 80
"""Characters of prompt and reply shown in the error of a function that failed on them."""


def load_user_function(text: str, *, where: str) -> Callable[..., Any]:
    """Import the file in ``text`` and return its function.

    Args:
        text: ``path/to/file.py:function``; relative paths are resolved from the working directory, then from
            the project folder.
        where: the recipe's key, for the message.

    Raises:
        UserError: no such file, an error while it is imported, or no such function in it.
    """
    file = function_file(text, where=where)
    name = text.rpartition(":")[2]
    module = _import_file(file, where)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    if name not in functions:
        actual = f"'{file}' has no function '{name}'"
        expected = one_of(functions) if functions else "a function; the file has none"
        raise UserError(Problem(where, actual, expected, did_you_mean(name, functions)))
    function: Callable[..., Any] = vars(module)[name]
    return function


def function_file(text: str, *, where: str) -> Path:
    """Return the existing file of ``path/to/file.py:function``.

    Raises:
        UserError: ``text`` has another format, or there is no such file.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(Problem(where, f"'{text}'", FUNCTION_FORMAT, f"write {where}: rules.py:my_rule"))
    # A wheel's project folder is inside the package: shipped functions are found from site-packages.
    file = local_path(path) or local_path(str(INSTALLED / path))
    if file is None or not file.is_file():
        repair = renamed_function(text) or f"relative paths are resolved from {Path.cwd()}"
        raise UserError(Problem(where, f"'{path}' does not exist", "an existing Python file", repair))
    return file


def file_digest(text: str, *, where: str) -> str:
    """Return the SHA-256 of the file of ``path/to/file.py:function``.

    Raises:
        UserError: there is no such file.
    """
    return hashlib.sha256(function_file(text, where=where).read_bytes()).hexdigest()


def call_for_number(function: Callable[[str, str], Any], prompt: str, reply: str, *, where: str) -> float:
    """Call a user function that must return a number.

    Raises:
        UserError: it raised, or returned no finite number; the message shows prompt and reply.
    """
    number = call_user_function(function, prompt, reply, where=where, expected=NUMBER_FORMAT)
    if number is None:
        problem = _return_problem(where, "it returned None", prompt, reply, NUMBER_FORMAT)
        raise UserError(replace(problem, repair="return 0 for prompts that it does not apply to"))
    return number


def call_user_function(
    function: Callable[[str, str], Any],
    prompt: str,
    reply: str,
    *,
    where: str,
    expected: str = f"{NUMBER_FORMAT}, or None",
) -> float | None:
    """Call a user function on a prompt and a reply; None means that it does not apply to this prompt.

    Args:
        function: (prompt, reply) -> a number, a bool or None.
        prompt: the prompt's text.
        reply: the generated reply.
        where: the function's key in the recipe, for the message.
        expected: the accepted return values, for the message.

    Raises:
        UserError: it raised, or returned neither a finite number nor None.
    """
    try:
        value = function(prompt, reply)
    except Exception as error:  # the function is the user's and may raise anything
        actual = f"{type(error).__name__}: {error}"
        raise UserError(_return_problem(where, actual, prompt, reply, expected)) from error
    if value is None:
        return None
    # Real and not float: numpy scalars and bools are fine; NaN would poison every mean.
    if not isinstance(value, Real) or not isfinite(value):
        raise UserError(_return_problem(where, f"it returned {value!r}", prompt, reply, expected))
    return float(value)


def _return_problem(where: str, actual: str, prompt: str, reply: str, expected: str) -> Problem:
    details = f"{actual}; prompt {prompt[:MAX_SHOWN_CHARACTERS]!r}, reply {reply[:MAX_SHOWN_CHARACTERS]!r}"
    return Problem(where, details, expected)


def signature_problems(
    function: Callable[..., Any], parameters: tuple[str, ...], *, where: str
) -> list[Problem]:
    """Return the problems of a function that will be called with these positional arguments."""
    # bind() checks numbers and names of parameters without calling the function.
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        signature = f"{function.__name__}{inspect.signature(function)}"
        expected = f"a function that takes ({', '.join(parameters)})"
        return [Problem(where, f"{signature}: {error}", expected)]
    return []


def load_graders(graders: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """Return the grader functions that a recipe names; their files are executed.

    Raises:
        UserError: a file or function is missing, or does not take a prompt and a reply.
    """
    functions: dict[str, Callable[..., Any]] = {}
    problems: list[Problem] = []
    for name, text in graders.items():
        where = f"evaluate.graders.{name}"
        try:
            functions[name] = load_user_function(text, where=where)
            problems += signature_problems(functions[name], GRADER_PARAMETERS, where=where)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return functions


def _import_file(file: Path, where: str) -> ModuleType:
    """Import a file as a module."""
    # A digest of the path in its name: two files called rules.py are two modules.
    file = file.resolve()
    name = f"recipe_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's and may raise anything
        del sys.modules[name]
        actual = f"'{file}' cannot be imported: {type(error).__name__}: {error}"
        raise UserError(Problem(where, actual, "an importable Python file")) from error
    return module


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Return True if a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
