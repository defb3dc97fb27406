"""Graders by name: ``number`` is the function ``number`` of ``finetune/graders/number.py``."""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.recipe.discovery import INSTALLED, load_plugin, plugin_names
from finetune.recipe.error_messages import validation_problems
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import Section

GRADERS = "finetune.graders"
OPTIONS = "options"
"""Parameter of a grader that gets its Options; the other parameters are filled from the row."""


def grader_names() -> list[str]:
    """Return the names of all graders."""
    return plugin_names(GRADERS)


def grader_file(name: str) -> Path:
    """Return the file of a grader."""
    return INSTALLED / GRADERS.replace(".", "/") / f"{name}.py"


def grader_function(name: str, options: Mapping[str, Any], *, where: str) -> Callable[..., Any]:
    """Return the function of a grader; a grader with Options gets them with every call.

    Args:
        name: the grader's name.
        options: values of its Options.
        where: the key that names it, for messages.

    Raises:
        UserError: there is no such grader, it has other options, or it needs a package that is missing.
    """
    module = load_plugin(GRADERS, name, where=where)
    for package in vars(module).get("PACKAGES", ()):
        if importlib.util.find_spec(package) is None:
            actual, repair = f"'{name}' needs the package {package}", "pip install 'llm-align[graders]'"
            raise UserError(Problem(where, actual, "an installed package", repair))
    function: Callable[..., Any] = vars(module)[name]
    schema: type[Section] | None = vars(module).get("Options")
    if schema is not None:
        return _with_options(function, _parsed(schema, options, where))
    if options:
        actual = f"{', '.join(options)}, but '{name}' has no options"
        raise UserError(Problem(f"{where}_options", actual, "no options", "delete them"))
    return function


def _parsed(schema: type[Section], options: Mapping[str, Any], where: str) -> Section:
    try:
        return schema(**options)
    except ValidationError as error:
        raise UserError(validation_problems(f"{where}_options", error, model=schema)) from error


def _with_options(function: Callable[..., Any], options: Section) -> Callable[..., Any]:
    @functools.wraps(function)
    def grade(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs, **{OPTIONS: options})

    # Without the parameter: a column of the row that is called `options` must not fill it.
    signature = inspect.signature(function)
    kept = [parameter for key, parameter in signature.parameters.items() if key != OPTIONS]
    vars(grade)["__signature__"] = signature.replace(parameters=kept)
    return grade
