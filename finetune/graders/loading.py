"""Load the grader of a suite: by its name with options, or a function of the user's file."""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.errors import Problem, UserError
from finetune.recipe.graders import grader_function, grader_names
from finetune.recipe.user_arguments import ROW_NAMES, RowFunction, signature_problems
from finetune.recipe.user_function import load_user_function


def load_grader(name: str, options: Mapping[str, Any], *, where: str) -> RowFunction:
    """Return a grader with its options.

    Args:
        name: of a file of finetune/graders, or ``path/to/file.py:function``.
        options: values of the grader's Options; {} for a function of the user.
        where: the suite's key, for messages.

    Raises:
        UserError: there is no such grader or function, or it has other options or parameters.
    """
    if name in grader_names():
        return RowFunction(grader_function(name, options, where=where))
    function = load_user_function(name, where=where)
    problems = signature_problems(function, ROW_NAMES, where=where, has_columns=True)
    if options:
        actual = f"{', '.join(options)} for the function {name}"
        problems.append(Problem(f"{where}_options", actual, "a grader's name", "give the function defaults"))
    if problems:
        raise UserError(problems)
    return RowFunction(function)
