"""Functions that are given in Python for keys of a recipe: rewards and graders of a notebook or a program.

A recipe file cannot hold them: it has their name, and the fingerprint of the run has a digest of their code.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, Field

from finetune.recipe.python_values import instance_schema, text_json_schema

UNNAMED = "function"
TEXT_START, TEXT_END = "<function ", " given in Python>"
PLAIN_TYPES = (str, bytes, int, float, complex, bool, type(None))


@dataclass(frozen=True)
class PythonFunction:
    """A function as the value of a recipe's key.

    Attributes:
        name: its name.
        sha256: of its code, and of the functions of its own file that it calls.
        function: the function.
    """

    name: str
    sha256: str
    function: Callable[..., Any] = field(compare=False)

    @staticmethod
    def of(function: Callable[..., Any]) -> "PythonFunction":
        """Return a function, a partial, a method or an object with ``__call__`` as a value."""
        target = function
        while isinstance(target, functools.partial):
            target = target.func
        name = str(getattr(target, "__name__", type(target).__name__))
        digest = hashlib.sha256()
        for part in _code_parts(function, {}):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        return PythonFunction(name if name.isidentifier() else UNNAMED, digest.hexdigest(), function)

    @property
    def file(self) -> Path:
        """Return the file of the function, or a name for the code of a notebook."""
        try:
            return Path(inspect.getfile(inspect.unwrap(self.function)))
        except TypeError:  # an object, or a function of C code
            return Path.cwd() / "notebook"

    def __str__(self) -> str:
        """Return the text that stands for the function where a recipe is shown."""
        return f"{TEXT_START}{self.name}{TEXT_END}"

    def __deepcopy__(self, memo: object) -> "PythonFunction":
        return self

    __get_pydantic_core_schema__: ClassVar[Any] = classmethod(instance_schema)
    __get_pydantic_json_schema__: ClassVar[Any] = classmethod(text_json_schema)


def function_from_python(value: Any) -> Any:
    """Return the value of a key that names a function as recipes hold it."""
    return PythonFunction.of(value) if callable(value) else value


def python_functions(value: Any) -> Iterator[PythonFunction]:
    """Yield the functions given in Python among the settings of a recipe."""
    if isinstance(value, PythonFunction):
        yield value
    elif isinstance(value, BaseModel):
        for _, item in value:
            yield from python_functions(item)
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from python_functions(item)


FunctionName = Annotated[
    Annotated[str, Field(min_length=1)] | PythonFunction, BeforeValidator(function_from_python)
]
"""The value of a key: ``path/to/file.py:function``; in Python also a function."""


def is_python_function_text(text: str) -> bool:
    """Return whether a text stands for a function that was given in Python."""
    return text.startswith(TEXT_START) and text.endswith(TEXT_END)


def _code_parts(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Yield texts that identify what a function does: another constant, name or default gives others.

    Args:
        value: a function, a part of one, or a value that it uses.
        seen: the objects that are done, by their id; functions may call each other.
    """
    if isinstance(value, PLAIN_TYPES):
        yield repr(value)
        return
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, functools.partial):
        yield from _parts_of((value.func, value.args, value.keywords), seen)
    elif inspect.ismethod(value):
        yield from _parts_of((value.__func__, value.__self__), seen)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        content = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, _own_globals(value))
        yield from _parts_of(content, seen)
    elif isinstance(value, CodeType):
        yield repr((value.co_code, value.co_names, value.co_varnames, value.co_freevars))
        yield from _parts_of(value.co_consts, seen)
    elif isinstance(value, dict):
        yield from _parts_of(value.items(), seen)
    elif isinstance(value, (list, tuple)):
        yield from _parts_of(value, seen)
    elif isinstance(value, (set, frozenset)):
        yield from _parts_of(sorted(value, key=repr), seen)
    else:
        # Not the repr of other objects, which may have their address in memory.
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(call := vars(type(value)).get("__call__"), FunctionType):
            yield from _parts_of((call, vars(value)), seen)


def _parts_of(values: Iterable[Any], seen: dict[int, Any]) -> Iterator[str]:
    for value in values:
        yield from _code_parts(value, seen)


def _own_globals(function: FunctionType) -> dict[str, Any]:
    """Return the functions of its own module, and the plain values, that a function uses by name."""
    used = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {
        name: value
        for name, value in used.items()
        if isinstance(value, PLAIN_TYPES)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    }
