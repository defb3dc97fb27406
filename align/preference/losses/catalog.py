"""Loss catalog: losses by name, parsed from their files without importing them (or torch)."""

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from align.preference.losses import inputs
from align.preference.losses.inputs import Interval, LossOutput, Needs
from finetune.recipe.errors import Problem, UserError, did_you_mean, one_of
from finetune.recipe.renamed import renamed_key, renamed_value

LOSS_FILES = ("pairwise", "listwise")
Setting = bool | float | str


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss as declared by its function's signature.

    Attributes:
        name: the function's name.
        summary: the first line of its docstring.
        takes: type of its first parameter: ``Pairs`` or ``Lists``.
        needs: what it needs besides the policy's log-probabilities.
        defaults: its settings.
        allowed: setting -> its range, or its allowed values.
    """

    name: str
    module: str
    summary: str
    takes: Literal["Pairs", "Lists"]
    needs: Needs
    defaults: Mapping[str, Setting]
    allowed: Mapping[str, Interval | tuple[bool, ...]]

    def function(self) -> Callable[..., LossOutput]:
        """Import and return the loss function (this imports torch)."""
        module = importlib.import_module(f"{__package__}.{self.module}")
        function: Callable[..., LossOutput] = vars(module)[self.name]
        return function

    def settings(self, chosen: Mapping[str, Setting], *, where: str) -> dict[str, Setting]:
        """Return all settings, the defaults updated with the chosen ones.

        Raises:
            UserError: settings that are unknown or out of range, all at once.
        """
        problems = [
            problem
            for key, value in chosen.items()
            if (problem := self._problem(key, value, f"{where}.{key}"))
        ]
        if problems:
            raise UserError(problems)
        return {**self.defaults, **chosen}

    def _problem(self, key: str, value: Setting, where: str) -> Problem | None:
        if renamed := renamed_key(where, value, self.defaults):
            return renamed
        if key not in self.defaults:
            expected = f"for the loss '{self.name}': {one_of(self.defaults)}"
            return Problem(where, "unknown setting", expected, did_you_mean(key, self.defaults))
        allowed = self.allowed[key]
        if isinstance(allowed, tuple):
            return (
                None
                if value in allowed
                else Problem(where, f"found {value!r}", "true or false", renamed_value(where, value))
            )
        # bool is a subclass of int, and NaN is in no interval.
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value in allowed
        return None if fits else Problem(where, f"found {value!r}", f"a number {allowed}")


def all_losses() -> dict[str, Loss]:
    """Return all losses by name, in the order of their files."""
    return {loss.name: loss for file in LOSS_FILES for loss in _losses_in_file(file)}


def find_loss(name: str, *, where: str) -> Loss:
    """Return the loss of this name.

    Args:
        name: the name in the recipe.
        where: the recipe key, for the message.

    Raises:
        UserError: no loss has this name.
    """
    known = all_losses()
    if name not in known:
        raise UserError(
            Problem(where, f"the loss '{name}' is unknown", one_of(known), did_you_mean(name, known))
        )
    return known[name]


def _losses_in_file(file: str) -> list[Loss]:
    # Recipes are validated and losses listed without importing torch, which takes seconds.
    tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [_parse_loss(function, file) for function in functions if not function.name.startswith("_")]


def _parse_loss(function: ast.FunctionDef, module: str) -> Loss:
    """Read ``def NAME(x: Annotated[TAKES, Needs(...)], *, SETTING: RANGE = DEFAULT, ...)``."""
    parameter = function.args.args[0].annotation
    assert isinstance(parameter, ast.Subscript) and isinstance(parameter.slice, ast.Tuple), function.name
    takes, needs = parameter.slice.elts
    assert isinstance(needs, ast.Call), f"{function.name}: Annotated[Pairs or Lists, Needs(...)]"
    settings = dict(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))
    return Loss(
        name=function.name,
        module=module,
        summary=(ast.get_docstring(function) or "").split("\n")[0],
        takes="Lists" if ast.unparse(takes) == "Lists" else "Pairs",
        needs=Needs(
            **{keyword.arg: ast.literal_eval(keyword.value) for keyword in needs.keywords if keyword.arg}
        ),
        defaults={key.arg: ast.literal_eval(value) for key, value in settings.items() if value is not None},
        allowed={key.arg: _allowed_values(key) for key in settings},
    )


def _allowed_values(setting: ast.arg) -> Interval | tuple[bool, ...]:
    """Return the range or the allowed values of a setting's annotation, which is a name of `inputs.py`."""
    assert isinstance(setting.annotation, ast.Name), f"{setting.arg}: annotate it with a name of inputs.py"
    annotation_args: tuple[Any, ...] = get_args(vars(inputs)[setting.annotation.id])
    return annotation_args[1] if isinstance(annotation_args[1], Interval) else annotation_args
