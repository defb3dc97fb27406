"""Check results of the pre-flight: name, detail, warning, and the problem that stops the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.recipe.errors import Problem, UserError

NAME_WIDTH = 14


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check; a ``problem`` stops the run.

    ``warned``: the run continues, but the user should read the detail.
    """

    name: str
    detail: str
    problem: Problem | None = None
    warned: bool = False

    def line(self) -> str:
        """Return the result as one line for the terminal."""
        mark = "NO" if self.problem else "!!" if self.warned else "ok"
        detail = "the run stops: see below" if self.problem else self.detail
        return f"{mark}  {self.name:<{NAME_WIDTH}}{detail}"

    def record(self) -> dict[str, Any]:
        """Return the result as an entry of run.json."""
        return {
            "name": self.name,
            "passed": self.problem is None,
            "warned": self.warned,
            "detail": self.detail,
        }


def failed(name: str, problem: Problem) -> CheckResult:
    """Return the result of a failed check."""
    return CheckResult(name, problem.actual, problem)


def raise_if_failed(results: Sequence[CheckResult], error: type[UserError] = UserError) -> None:
    """Raise an error with the problems of all failed checks, if any failed."""
    problems = [result.problem for result in results if result.problem]
    if problems:
        raise error(problems)


def first_few(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names and the number of the others.

    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
