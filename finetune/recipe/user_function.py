"""Functions of a recipe, ``path/to/file.py:function`` or a grader: load, check the signature, call."""

import hashlib
import importlib.util
import inspect
import reprlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from math import isfinite
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.recipe.discovery import INSTALLED, local_path
from finetune.recipe.errors import Problem, UserError, UserFunctionError, did_you_mean, one_of
from finetune.recipe.graders import grader_file, grader_function, grader_names
from finetune.recipe.one_run import no_run_inside
from finetune.recipe.python_function import PythonFunction, is_python_function_text
from finetune.recipe.renamed import renamed_function
from finetune.recipe.user_calls import CALLS, FunctionTimeoutError
from finetune.recipe.user_files import imported_modules, local_modules
from finetune.recipe.user_state import UserState, import_first, user_code

FUNCTION_FORMAT = "path/to/file.py:function"
NUMBER_FORMAT = "a finite number, or true or false"
CONVERSATIONS_REPAIR = (
    "completions are texts if the rows are texts, and lists of messages if the rows are messages, as in TRL"
)
MAX_SHOWN_CHARACTERS = 80
"""Characters of prompt and completion shown in the error of a function that failed on them."""
MAX_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class UserFunction:
    """A function of a user's file; a call leaves the process as it was, and is measured and limited."""

    text: str
    function: Callable[..., Any]
    state: UserState

    @property
    def name(self) -> str:
        """Return the function's name."""
        return self.text.rpartition(":")[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; its random numbers are seeded with its arguments."""
        arguments = [str(value) for value in (*args, *kwargs.values())]
        first = kwargs.get("prompt", kwargs.get("prompts", arguments[0] if arguments else ""))
        shown = f"prompt {str(first)[:MAX_SHOWN_CHARACTERS]!r}"
        with (
            no_run_inside(self.text),
            CALLS.timed(self.text, shown) as call,
            user_code(self.state, seed="\0".join(arguments)),
            call.limited(),
        ):
            return self.function(*args, **kwargs)


def load_user_function(text: str | PythonFunction, *, where: str) -> UserFunction:
    """Import the file in ``text`` and return its function.

    Args:
        text: ``path/to/file.py:function``; relative paths are resolved from the working directory, then from
            the project folder. Or the name of a grader, or a function that was given in Python.
        where: the recipe's key, for the message.

    Raises:
        UserError: no such file, an error while it is imported, or no such function in it.
    """
    if isinstance(text, PythonFunction):
        return UserFunction(text.name, text.function, UserState(text.file))
    if text in grader_names():
        return UserFunction(text, grader_function(text, {}, where=where), UserState(grader_file(text)))
    file = function_file(text, where=where)
    name = text.rpartition(":")[2]
    module, state = _import_file(file.resolve(), where)
    value = vars(module).get(name)
    if isinstance(value, type):
        actual = f"'{name}' of '{file}' is a class"
        repair = f"add `my_rule = {name}()` to the file, with a method __call__, and name my_rule"
        raise UserError(Problem(where, actual, "a function", repair))
    if not callable(value):
        functions = [key for key, item in vars(module).items() if _is_offered(item, module)]
        actual = f"'{file}' has no function '{name}'"
        expected = one_of(functions) if functions else "a function; the file has none"
        raise UserError(Problem(where, actual, expected, did_you_mean(name, functions)))
    return UserFunction(text, value, state)


def _is_offered(value: Any, module: ModuleType) -> bool:
    """Return whether a name of a file is a function that a recipe may name."""
    if inspect.isfunction(value):
        return True
    # Decorated functions and instances, but no classes and nothing imported.
    return callable(value) and not isinstance(value, type) and value.__module__ == module.__name__


def function_file(text: str, *, where: str) -> Path:
    """Return the existing file of ``path/to/file.py:function``, or of a grader.

    Raises:
        UserError: ``text`` has another format, or there is no such file.
    """
    path, _, name = text.rpartition(":")
    if is_python_function_text(text):
        repair = "give it again: load_recipe(RUN, reward=function), or graders={name: function}"
        actual = f"{text}, which a recipe file cannot hold"
        raise UserError(Problem(where, actual, FUNCTION_FORMAT, repair))
    if text in (graders := grader_names()):
        return grader_file(text)
    if not path.endswith(".py") or not name.isidentifier():
        expected = f"{FUNCTION_FORMAT}, or a grader: {', '.join(graders)}"
        repair = did_you_mean(text, graders) or f"write {where}: rules.py:my_rule"
        raise UserError(Problem(where, f"'{text}' is unknown", expected, repair))
    # A wheel's project folder is inside the package: shipped functions are found from site-packages.
    file = local_path(path) or local_path(str(INSTALLED / path))
    if file is None or not file.is_file():
        repair = renamed_function(text) or f"relative paths are resolved from {Path.cwd()}"
        raise UserError(Problem(where, f"'{path}' does not exist", "an existing Python file", repair))
    return file


def file_digest(text: str | PythonFunction, *, where: str) -> str:
    """Return the SHA-256 of the file of ``path/to/file.py:function`` and of the local files it imports.

    Of a function that was given in Python: of its code.

    Raises:
        UserError: there is no such file.
    """
    if isinstance(text, PythonFunction):
        return text.sha256
    file = function_file(text, where=where)
    digest = hashlib.sha256(file.read_bytes())
    for module in local_modules(file):
        digest.update(module.relative_to(file.parent).as_posix().encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()


def call_for_number(function: Callable[[str, str], Any], prompt: str, reply: str, *, where: str) -> float:
    """Call a user function that must return a number.

    Raises:
        UserError: it raised, or returned no finite number; the message shows prompt and reply.
    """
    number = call_user_function(function, prompt, reply, where=where, expected=NUMBER_FORMAT)
    if number is None:
        problem = _return_problem(where, "it returned None", prompt, reply, NUMBER_FORMAT)
        raise UserFunctionError(replace(problem, repair="return 0 for prompts that it does not apply to"))
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
    except KeyboardInterrupt:  # the user's second Ctrl-C
        raise
    except BaseException as error:  # the function is the user's and may raise anything, also SystemExit
        problem = _return_problem(where, describe_error(error), prompt, reply, expected)
        raise UserFunctionError(replace(problem, repair=_error_repair(error))) from error
    if value is None:
        return None
    number = as_number(value)
    # NaN would poison every mean.
    if number is None or not isfinite(number):
        problem = _return_problem(where, f"it returned {_describe_value(value)}", prompt, reply, expected)
        raise UserFunctionError(replace(problem, repair=_value_repair(value)))
    return number


def call_for_numbers(call: Callable[[], Any], count: int, *, where: str) -> list[float]:
    """Call a user function that returns the rewards of several completions; None counts as 0, as in TRL.

    Raises:
        UserError: it raised, or did not return a list of so many finite numbers.
    """
    return [number or 0.0 for number in call_for_grades(call, count, where=where)]


def call_for_grades(call: Callable[[], Any], count: int, *, where: str) -> list[float | None]:
    """Call a user function that returns the grades of several completions; None: it does not apply.

    Raises:
        UserError: it raised, or did not return a list of so many finite numbers.
    """
    expected = f"a list of {count} numbers, one per completion"
    try:
        values = call()
        # Lists, tuples, arrays and tensors; a text has a length too.
        values = None if isinstance(values, str | bytes | dict) else list(values)
    except KeyboardInterrupt:  # the user's second Ctrl-C
        raise
    except BaseException as error:  # the function is the user's and may raise anything, also SystemExit
        repair = CONVERSATIONS_REPAIR if isinstance(error, TypeError) else _error_repair(error)
        raise UserFunctionError(Problem(where, describe_error(error), expected, repair)) from error
    if values is None or len(values) != count:
        actual = f"it returned {'no list' if values is None else f'{len(values)} values'}"
        raise UserFunctionError(Problem(where, actual, expected))
    numbers = [None if value is None else as_number(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if value is not None and (number is None or not isfinite(number)):
            raise UserFunctionError(
                Problem(where, f"it returned {_describe_value(value)} in its list", expected)
            )
    return numbers


def as_number(value: Any) -> float | None:
    """Return a number, a bool, or a scalar of numpy or torch as a float; None for anything else."""
    # A scalar of numpy or torch is an array without dimensions. Not `float()`: it also converts texts.
    if not isinstance(value, Real | Decimal) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except (OverflowError, ValueError):  # an integer above 1e308, or Decimal("sNaN")
        return None


def describe_error(error: BaseException) -> str:
    """Return type, text and line of an exception in a user's code."""
    # Not str(error): the exception's class may be the user's, and fail in turn.
    text = str(traceback.TracebackException(type(error), error, None))
    if isinstance(error, SystemExit):
        description = f"it called sys.exit({error.code!r})"
    elif isinstance(error, FunctionTimeoutError):
        description = text
    else:
        text = text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}..."
        description = f"{type(error).__name__}: {text}".removesuffix(": ")
    # The text of a SyntaxError names file and line.
    line = "" if isinstance(error, SyntaxError) else _user_line(error)
    return f"{description} ({line})" if line else description


def _user_line(error: BaseException) -> str:
    """Return the line of the user's file at which an exception left it; "" if it was raised elsewhere."""
    frames: list[traceback.FrameSummary] = list(traceback.extract_tb(error.__traceback__))
    own = max((index for index, frame in enumerate(frames) if frame.filename == __file__), default=-1)
    frames = [frame for frame in frames[own + 1 :] if not frame.filename.startswith("<frozen")]
    # Later frames may be those of a library that the file calls.
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{frames[0].filename}:{lines[-1]}" if frames else ""


def _error_repair(error: BaseException) -> str:
    is_timeout = isinstance(error, FunctionTimeoutError)
    return "correct the function, or raise train.function_timeout" if is_timeout else ""


def _describe_value(value: Any) -> str:
    if inspect.isgenerator(value):
        return "a generator"
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that it was never awaited
        return "a coroutine"
    return reprlib.repr(value)


def _value_repair(value: Any) -> str:
    """Return the repair of a returned value that is no number."""
    if inspect.isgenerator(value):
        return "use `return` and not `yield`"
    if inspect.iscoroutine(value):
        return "write `def` and not `async def`; asyncio.run() runs a coroutine inside"
    if isinstance(value, list | tuple | dict) or getattr(value, "ndim", None):
        return "the function is called once per completion: return its number"
    return "return float(...) of it" if isinstance(value, str) else ""


def _return_problem(where: str, actual: str, prompt: str, reply: str, expected: str) -> Problem:
    details = (
        f"{actual}; prompt {prompt[:MAX_SHOWN_CHARACTERS]!r}, completion {reply[:MAX_SHOWN_CHARACTERS]!r}"
    )
    return Problem(where, details, expected)


def _import_file(file: Path, where: str) -> tuple[ModuleType, UserState]:
    """Import a file as a module; return it and what it has changed for itself."""
    # A digest of the path in its name: two files called rules.py are two modules.
    name = f"recipe_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module, state = importlib.util.module_from_spec(spec), UserState(file)
    sys.modules[name] = module  # dataclasses look up their module by name
    _forget_local_modules(file)
    import_first(imported_modules(file))
    try:
        with no_run_inside(str(file)), user_code(state):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file is the user's and may raise anything, also SystemExit
        del sys.modules[name]
        actual = f"'{file}' cannot be imported: {describe_error(error)}"
        problem = Problem(where, actual, "an importable Python file", _import_repair(error, file))
        raise UserError(problem) from error
    return module, state


def _forget_local_modules(file: Path) -> None:
    """Remove modules that have the names of a file's local modules from Python's cache."""
    # They may be those of another folder, or have been edited since: a notebook runs for days.
    folders = {path.relative_to(file.parent).parts[0].removesuffix(".py") for path in local_modules(file)}
    for name in [name for name in sys.modules if name.partition(".")[0] in folders]:
        # An installed library of that name is what the file imports.
        if "site-packages" not in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def _import_repair(error: BaseException, file: Path) -> str:
    if isinstance(error, SystemExit):
        return 'put argument parsing and main programs below `if __name__ == "__main__":`'
    if isinstance(error, EOFError):
        return "no input() while the file is imported"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name}, or put {error.name}.py into {file.parent}"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return f"import files of {file.parent} by their name: `import helper`"
    return ""
