"""Checked values of a config.json: what the planner reads has a valid type and range, or is reported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.recipe.errors import Problem, UserError

MAX_SIZE = 10**9
"""Above any size of a model: a larger number is a damaged file."""
REPAIR = "an undamaged config.json of the same model"


@dataclass
class ConfigValues:
    """The values of one section of a config.json over the defaults of its class.

    All problems are collected, and ``check`` raises them together.

    Attributes:
        values: what the section has.
        defaults: of transformers' configuration class.
        section: name of the section; "" for the top level.
        problems: those so far.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    section: str = ""
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def nested(cls, config: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> "ConfigValues":
        """Return the values of a nested section, which may be missing.

        Raises:
            UserError: it is not a mapping.
        """
        content = config.get(key)
        if content is not None and not isinstance(content, Mapping):
            raise UserError(_invalid(key, content, "a mapping"))
        return cls(content or {}, defaults, key)

    def size(self, key: str, *, minimum: int = 1) -> int:
        """Return an integer that a model cannot do without."""
        value = self.values[key] if key in self.values else self.defaults.get(key)
        if value is None:
            state = "null" if key in self.values else "missing"
            return self._report(
                f"config.json: {self._name(key)} is {state}", f"an integer, {minimum} or more", minimum
            )
        return self._integer(key, value, minimum)

    def optional_size(self, key: str, *, minimum: int = 1) -> int | None:
        """Return an integer; None if it is null, or missing without a default."""
        value = self.values[key] if key in self.values else self.defaults.get(key)
        return None if value is None else self._integer(key, value, minimum)

    def flag(self, key: str) -> bool:
        """Return a boolean; a missing one without a default is False."""
        value = self.values.get(key, self.defaults.get(key, False))
        if isinstance(value, bool):
            return value
        return bool(self._report(self._describe(key, value), "true or false", 0))

    def optional_number(self, key: str) -> float | None:
        """Return a positive number; None if it is null, or missing without a default."""
        value = self.values.get(key, self.defaults.get(key))
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
            return value
        return self._report(self._describe(key, value), "a number above 0, or null", 1)

    def layer_types(self, num_layers: int) -> list[str] | None:
        """Return the kind of attention of each layer; None if the config has no such list."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        is_list = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
        if is_list and len(value) == num_layers:
            return list(value)
        self._report(self._describe("layer_types", value), f"a list of {num_layers} names", 0)
        return None

    def require(self, valid: bool, key: str, expected: str) -> None:
        """Report a value that contradicts another one, unless one of both has been reported already."""
        if not valid and not self.problems:
            value = self.values.get(key, self.defaults.get(key))
            self._report(self._describe(key, value), expected, 0)

    def check(self) -> None:
        """Raise UserError with all problems, if there are any."""
        if self.problems:
            raise UserError(self.problems)

    def _integer(self, key: str, value: Any, minimum: int) -> int:
        # bool is a subclass of int.
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MAX_SIZE:
            return value
        return self._report(self._describe(key, value), f"an integer, {minimum} or more", minimum)

    def _report(self, actual: str, expected: str, substitute: int) -> int:
        """Record a problem, and return a valid value so that the others can be checked too."""
        problem = Problem("model.base", actual, expected, REPAIR)
        # A value may be read more than once.
        if problem not in self.problems:
            self.problems.append(problem)
        return max(1, substitute)

    def _name(self, key: str) -> str:
        return f"{self.section}.{key}" if self.section else key

    def _describe(self, key: str, value: Any) -> str:
        return f"config.json has {self._name(key)}={_short_json(value)}"


def _invalid(key: str, value: Any, expected: str) -> Problem:
    return Problem("model.base", f"config.json has {key}={_short_json(value)}", expected, REPAIR)


def _short_json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
