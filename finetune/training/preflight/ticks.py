"""One line of the pre-flight: what was checked, what was found, and how to repair it where it failed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.recipe.errors import Problem, UserError

NAME_WIDTH = 14


@dataclass(frozen=True, slots=True)
class Tick:
    """A check's name, what it found, and the problem that stops the run if there is one.

    ``warned``: the run goes on, but the user should read the line.
    """

    name: str
    detail: str
    problem: Problem | None = None
    warned: bool = False

    def line(self) -> str:
        """Return the check as a line for the terminal."""
        mark = "NO" if self.problem else "!!" if self.warned else "ok"
        detail = "the run stops: see below" if self.problem else self.detail
        return f"{mark}  {self.name:<{NAME_WIDTH}}{detail}"

    def record(self) -> dict[str, Any]:
        """Return the check as run.json keeps it."""
        return {
            "name": self.name,
            "passed": self.problem is None,
            "warned": self.warned,
            "detail": self.detail,
        }


def failed(name: str, problem: Problem) -> Tick:
    """Return a check that stops the run."""
    return Tick(name, problem.found, problem)


def refuse(ticks: Sequence[Tick]) -> None:
    """Raise UserError with the problems of all checks that failed, if any did."""
    problems = [tick.problem for tick in ticks if tick.problem]
    if problems:
        raise UserError(problems)


def some(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names and how many there are beyond them.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
