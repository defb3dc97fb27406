"""Arguments of user functions: parameters are filled by name with what is known of a completion.

A reward function or a grader names what it needs: ``prompt``, ``completion``, ``expected`` (the reference
answer of the row) or a column of the row. A function that takes ``completions`` has TRL's signature: it is
called once with lists, and returns a list. ``**kwargs`` receives everything.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_templates.segments import REPLY_ROLES, Message
from finetune.recipe.errors import Problem, UserError, did_you_mean
from finetune.recipe.python_function import PythonFunction
from finetune.recipe.user_function import UserFunction, load_user_function

PROMPT, COMPLETION, EXPECTED = "prompt", "completion", "expected"
PROMPTS, COMPLETIONS = "prompts", "completions"
ROW_NAMES = (PROMPT, COMPLETION, EXPECTED)
BATCH_NAMES = (PROMPTS, COMPLETIONS, EXPECTED)
TRL_NAMES = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""Arguments of TRL's trainers that no other caller of a reward function has."""
OTHER_NAMES = ("reply", "response", "answer", "output", "text")
"""Usual names of the sampled text in other libraries."""

Columns = Mapping[str, Any]
ColumnsByLocation = Mapping[str, Columns]


@dataclass(frozen=True)
class CompletionRow:
    """A completion with all that is known of it.

    Attributes:
        prompt: text of the turns before it.
        completion: the text to grade.
        reference: the row's own reply.
        location: location of the row.
        columns_by_location: columns of all rows; read when a function asks for a column.
        turns: the turns before it, for functions that take conversations.
    """

    prompt: str
    completion: str
    reference: str | None = None
    location: str = ""
    columns_by_location: ColumnsByLocation = field(default_factory=dict)
    turns: Sequence[Message] = ()

    @property
    def columns(self) -> Columns:
        """Return the columns of the row."""
        return self.columns_by_location.get(self.location, {})

    @property
    def is_conversational(self) -> bool:
        """Return whether a column of the row is a list of messages, as TRL decides it."""
        return any(map(_is_messages, self.columns.values()))

    def value(self, name: str) -> Any:
        """Return the value of a parameter; None if the row has none."""
        if name in (PROMPT, COMPLETION):
            return self.prompt if name == PROMPT else self.completion
        # A column that is named so is meant to be it; the reply of the row may be a longer solution.
        value = self.columns.get(name)
        return self.reference if value is None and name == EXPECTED else value


def prompt_text(conversation: Sequence[Message]) -> str:
    """Return the text before a conversation's last reply, for display."""
    end = last_reply_index(conversation)
    prompt = "\n".join(filter(None, (turn.full_text for turn in conversation[:end])))
    return f"{prompt}\n{conversation[end - 1].context}".strip()


def completion_row(
    conversation: Sequence[Message],
    location: str,
    *,
    reference: str | None = None,
    columns: ColumnsByLocation | None = None,
) -> CompletionRow:
    """Return the last reply of a conversation as the input of user functions.

    Args:
        conversation: turns that end with the reply.
        location: location of the row.
        reference: the row's own reply.
        columns: columns of the rows, by location.
    """
    turns, completion = list(conversation[:-1]), conversation[-1].full_text
    return CompletionRow(prompt_text(conversation), completion, reference, location, columns or {}, turns)


def last_reply_index(conversation: Sequence[Message]) -> int:
    """Return the index of a conversation's last reply."""
    return max(index for index, turn in enumerate(conversation) if turn.role in REPLY_ROLES)


@dataclass(frozen=True)
class RowFunction:
    """A user function, and the parameters by which it is called."""

    function: Callable[..., Any]

    @cached_property
    def signature(self) -> inspect.Signature | None:
        """Return the signature; None for functions of C code that have none."""
        try:
            return inspect.signature(_target(self.function))
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """Return name and parameters, for messages."""
        return f"{function_name(self.function)}{self.signature or '(...)'}"

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Return the parameters that can be filled by name."""
        parameters = self.signature.parameters if self.signature else {}
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {name: parameter for name, parameter in parameters.items() if parameter.kind not in variable}

    @property
    def required(self) -> list[str]:
        """Return the names of the parameters without a default."""
        return [name for name, value in self.parameters.items() if value.default is inspect.Parameter.empty]

    @cached_property
    def takes_all(self) -> bool:
        """Return whether it has ``**kwargs``."""
        parameters = self.signature.parameters.values() if self.signature else ()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def is_positional(self) -> bool:
        """Return whether it names nothing, and gets prompt and completion by their position."""
        return not self.parameters and not self.takes_all

    @property
    def is_batch(self) -> bool:
        """Return whether it has TRL's signature: lists of prompts and completions."""
        return COMPLETIONS in self.parameters and COMPLETION not in self.parameters

    def call(self, row: CompletionRow) -> Any:
        """Call it on one completion."""
        if self.is_positional:
            return self.function(row.prompt, row.completion)
        names = {name: None for name in self.parameters}
        if self.takes_all:
            names |= dict.fromkeys((*ROW_NAMES, *row.columns))
        return self._call({name: row.value(name) for name in names})

    def call_batch(self, rows: Sequence[CompletionRow]) -> Any:
        """Call a function of TRL's signature on several completions."""
        conversational = bool(rows) and rows[0].is_conversational
        values: dict[str, Any] = {
            PROMPTS: [_as_dicts(row.turns) if conversational else row.prompt for row in rows],
            COMPLETIONS: [
                [{"role": "assistant", "content": row.completion}] if conversational else row.completion
                for row in rows
            ],
        }
        names = dict.fromkeys(
            [*self.parameters, *([*BATCH_NAMES, *rows[0].columns] if self.takes_all else [])]
        )
        for name in names:
            column = [row.value(name) for row in rows] if name not in values else []
            # A column that no row has is not passed: its parameter keeps the default.
            if any(value is not None for value in column):
                values[name] = column
        return self._call({name: values.get(name) for name in names})

    def _call(self, values: Mapping[str, Any]) -> Any:
        by_position = []
        by_name = {}
        for name, value in values.items():
            parameter = self.parameters.get(name)
            # A missing value leaves the default, where there is one; `**kwargs` gets no missing values.
            if value is None and (parameter is None or parameter.default is not parameter.empty):
                continue
            if parameter is not None and parameter.kind is parameter.POSITIONAL_ONLY:
                by_position.append(value)
            else:
                by_name[name] = value
        return self.function(*by_position, **by_name)


def signature_problems(
    function: Callable[..., Any], names: Sequence[str], *, where: str, has_columns: bool = False
) -> list[Problem]:
    """Return the problems of a function's parameters that are known without the rows.

    Args:
        function: the function.
        names: the names that are offered.
        where: the function's key in the recipe.
        has_columns: whether columns of rows are offered too.
    """
    bound = RowFunction(function)
    target = _target(function)
    if any(check(target) for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        repair = "write `def` and not `async def`; asyncio.run() runs a coroutine inside"
        return [Problem(where, f"{bound.text} is an async function", _offered(names, has_columns), repair)]
    if bound.is_positional:
        return _positional_problems(bound, names, where)
    if COMPLETION in names and not bound.takes_all and not {COMPLETION, COMPLETIONS} & set(bound.parameters):
        other = next((name for name in bound.parameters if name in OTHER_NAMES), "")
        repair = (
            f"rename `{other}` to `completion`" if other else "name the parameter of the text `completion`"
        )
        return [Problem(where, f"{bound.text} takes no `completion`", _offered(names, has_columns), repair)]
    return [] if has_columns else _unknown_problems(bound, names, where=where, has_columns=False)


def load_graders(graders: Mapping[str, str | PythonFunction]) -> dict[str, RowFunction]:
    """Return the grader functions that a recipe names; their files are executed.

    Raises:
        UserError: a file or function is missing, or a function has parameters that nothing fills.
    """
    functions: dict[str, RowFunction] = {}
    problems: list[Problem] = []
    for name, text in graders.items():
        where = f"evaluate.graders.{name}"
        try:
            function = load_user_function(text, where=where)
            functions[name] = RowFunction(function)
            problems += signature_problems(function, ROW_NAMES, where=where, has_columns=True)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return functions


def column_problems(function: RowFunction, columns: Sequence[str], *, where: str) -> list[Problem]:
    """Return the problems of parameters that are neither offered nor a column of the rows."""
    return _unknown_problems(function, [*ROW_NAMES, *columns], where=where, has_columns=True)


def default_notes(function: RowFunction, columns: Sequence[str], *, what: str) -> list[str]:
    """Return a line for each parameter that nothing fills, and that keeps its default."""
    offered = {*(BATCH_NAMES if function.is_batch else ROW_NAMES), *columns}
    return [
        f"{what}: no column '{name}' in the rows: the parameter keeps its default ({parameter.default!r:.40})"
        for name, parameter in function.parameters.items()
        if name not in offered and parameter.default is not parameter.empty
    ]


def missing_value_problems(
    function: RowFunction, rows: Sequence[CompletionRow], *, where: str
) -> list[Problem]:
    """Return the problems of parameters without a default whose value some rows lack."""
    given = (PROMPT, COMPLETION, PROMPTS, COMPLETIONS)
    problems = []
    for name in function.required:
        if name in given:
            continue
        missing = [row.location for row in rows if row.value(name) is None]
        if missing:
            noun = "reference answer" if name == EXPECTED else f"value in column '{name}'"
            actual = f"{len(missing)} of {len(rows)} rows have no {noun} (first: {missing[0]})"
            expected = f"a {noun} in each row"
            if name == EXPECTED:
                expected += ", as in question/answer data, or a column `expected`"
            problems.append(Problem(where, actual, expected, f"give the parameter a default: {name}=None"))
    return problems


def function_name(function: Callable[..., Any]) -> str:
    """Return a function's name for messages."""
    if isinstance(function, UserFunction):
        return function.name
    return str(getattr(function, "__name__", type(function).__name__))  # partials have no name


def _positional_problems(function: RowFunction, names: Sequence[str], where: str) -> list[Problem]:
    signature = function.signature
    offered = [name for name in names if name != EXPECTED]
    try:
        if signature is not None:
            signature.bind(*offered)
    except TypeError as error:
        return [Problem(where, f"{function.text}: {error}", _offered(names, has_columns=False))]
    return []


def _unknown_problems(
    function: RowFunction, names: Sequence[str], *, where: str, has_columns: bool
) -> list[Problem]:
    batch = function.is_batch and COMPLETION in names
    offered = [
        *(BATCH_NAMES if batch else ()),
        *(name for name in names if not batch or name not in ROW_NAMES),
    ]
    if batch and EXPECTED not in names:
        offered.remove(EXPECTED)
    problems = []
    for name in function.required:
        if name not in offered:
            actual = f"{function.text}: nothing fills the parameter '{name}'"
            repair = did_you_mean(name, offered) or f"give it a default: {name}=None"
            if name in TRL_NAMES:
                repair = f"`{name}` is an object of TRL's trainer: {repair}"
            problems.append(Problem(where, actual, _offered(offered, has_columns), repair))
    return problems


def _offered(names: Sequence[str], has_columns: bool) -> str:
    columns = " and columns of the rows" if has_columns and set(names) <= {*ROW_NAMES, *BATCH_NAMES} else ""
    return f"parameters named {', '.join(names)}{columns}"


def _target(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.function if isinstance(function, UserFunction) else function


def _is_messages(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _as_dicts(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.full_text} for turn in turns]
