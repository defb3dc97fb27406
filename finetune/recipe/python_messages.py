"""Messages for a reader in Python: options of the command line become arguments, in one place for all.

Messages are written for the command line. The functions of the Python API translate what leaves them; the
command line calls the same functions, and says that it reads the messages itself.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import ParamSpec, TypeVar

from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_FOR_COMMAND_LINE: ContextVar[bool] = ContextVar("for_command_line", default=False)
ARGUMENTS = {
    "force": "force=True",
    "accept-changed-code": "accept_changed_code=True",
    "out": "out=",
    "base": "base=",
    "data": "data=",
    "adapter": "adapter=",
    "from": "init_from=",
    "reward": "reward=",
    "stage": "stage=",
}
"""Options of the command line -> arguments of the Python API."""
SHELL = re.compile(r"`[^`]*`|llm-align [^;,\n]*")
"""Commands in a message: they are for a shell, whoever reads them."""
PYTHON_CALL = re.compile(r"`(\w+\(\w+)\) --force`")
"""The command that a run has recorded which was started in Python."""
OPTION = re.compile(r"--(?P<name>[a-z][a-z-]*)(?: (?P<value>[A-Z]+\b|[^\s,;:)]*[/.][^\s,;:)]*))?")
PHRASES = (
    (re.compile(r"\b([Rr])un the same command"), r"\1epeat the same call"),
    (re.compile(r"the same command"), "the same call"),
    (re.compile(r"\(command line\)"), "(Python)"),
    (re.compile(r"--traceback prints the library's error"), "its __cause__ is the library's error"),
)
OTHER_NAMES = {
    "start": "init_from",
    "parent": "init_from",
    "model": "base",
    "dataset": "data",
    "train_dataset": "data",
    "peft_config": "adapter",
    "output_dir": "out",
    "reward_funcs": "reward",
    "overrides": "settings",
    "config": "settings",
}
"""Names of other libraries for the arguments of ``load_recipe``."""


class ArgumentError(UserError, TypeError):
    """An argument that a function of the Python API does not have."""


@contextmanager
def command_line_messages() -> Iterator[None]:
    """Leave the messages of this block as they are: the command line prints them."""
    token = _FOR_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _FOR_COMMAND_LINE.reset(token)


def reader_words(text: str) -> str:
    """Return a message in the words of its reader: unchanged on the command line, translated in Python.

    >>> reader_words("choose another --out, or --force to replace that run")
    'choose another `out=`, or force=True to replace that run'
    >>> reader_words("`run(recipe) --force` repeats the run; `llm-align merge RUN --out DIR` writes it")
    '`run(recipe, force=True)` repeats the run; `llm-align merge RUN --out DIR` writes it'
    >>> reader_words("use a local file: --data my.jsonl. Run the same command to resume")
    'use a local file: data=my.jsonl. Repeat the same call to resume'
    """
    if _FOR_COMMAND_LINE.get():
        return text
    text = PYTHON_CALL.sub(r"`\1, force=True)`", text)
    parts = []
    end = 0
    for command in SHELL.finditer(text):
        parts += [_translated(text[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*parts, _translated(text[end:])])


def for_python(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Decorate a function of the Python API: its errors speak of Python, also those about its arguments."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown:
            raise ArgumentError([_argument_problem(function.__name__, signature, name) for name in unknown])
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.problems = [_translate_problem(problem) for problem in error.problems]
            error.args = ("\n".join(str(problem) for problem in error.problems),)
            raise
        except Exception as error:  # an interrupted run is no UserError, and says how it resumes
            if type(error).__module__.startswith("finetune.") and len(error.args) == 1:
                error.args = (reader_words(str(error)),)
            raise

    return call


def _argument_problem(function: str, signature: inspect.Signature, name: str) -> Problem:
    names = list(signature.parameters)
    known = OTHER_NAMES.get(name, "")
    repair = f"{known}=" if known in names else did_you_mean(name, names)
    if not repair and "settings" in names:
        repair = f'a key of the recipe goes into settings: {{"section.{name}": value}}'
    return Problem(f"{function}({name}=...)", "no such argument", one_of(names), repair)


def _translate_problem(problem: Problem) -> Problem:
    fields = {
        name: reader_words(getattr(problem, name)) for name in ("where", "actual", "expected", "repair")
    }
    return replace(problem, **fields)


def _translated(text: str) -> str:
    for pattern, words in PHRASES:
        text = pattern.sub(words, text)
    return OPTION.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    argument = ARGUMENTS.get(match["name"])
    if argument is None:
        return match[0]
    value = match["value"]
    if not argument.endswith("="):
        return f"{argument} {value}" if value else argument
    return f"{argument}{value}" if value else f"`{argument}`"
