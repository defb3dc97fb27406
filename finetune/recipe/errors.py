"""User errors: where, found, expected, repair; did-you-mean suggestions."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One user error.

    Attributes:
        where: its location: a key, a file with its line, or an option.
        actual: what was found there.
        expected: what is allowed.
        repair: a suggested fix, or "".
    """

    where: str
    actual: str
    expected: str
    repair: str = ""

    def __str__(self) -> str:
        """Return the problem in at most three lines."""
        lines = [f"{self.where}: {self.actual}", f"    expected: {self.expected}"]
        if self.repair:
            lines.append(f"    repair:   {self.repair}")
        return "\n".join(lines)

    def with_origin(self, origins: Mapping[str, str]) -> "Problem":
        """Append the origin (``file:line``) of the problem's key, or else of its section, to ``where``."""
        key = self.where
        # A problem of the parent run's recipe has its origin already.
        if key.endswith(")"):
            return self
        # data.mix[0].rows -> data.mix[0] -> data.mix: the closest key that has an origin.
        while key not in origins and (cut := max(key.rfind("."), key.rfind("["))) > 0:
            key = key[:cut]
        return replace(self, where=f"{self.where} ({origins[key]})") if key in origins else self


class UserError(Exception):
    """All problems found in the user's input; the command line prints them and exits with status 2.

    Attributes:
        problems: each of them.
    """

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[Problem]]]:
        """Pickle the problems and not their text, for sending the error between processes."""
        # The default passes args (the text) to __init__, which expects problems.
        return type(self), (self.problems,)


class SettingError(ValueError):
    """A value of a section, or a combination, that a pydantic validator refuses.

    Attributes:
        actual, expected, repair: as in ``Problem``.
    """

    def __init__(self, actual: str, expected: str, repair: str = "") -> None:
        super().__init__(actual)
        self.actual, self.expected, self.repair = actual, expected, repair

    def problem(self, where: str) -> Problem:
        """Return the problem of a key or a section."""
        return Problem(where, self.actual, self.expected, self.repair)


class LibraryError(UserError):
    """A library's exception on the user's model, adapter or setting; the exception itself is ``__cause__``.

    Attributes:
        cause: its type, text, location and traceback, for run.json; unlike ``__cause__`` it is pickled.
    """

    def __init__(self, problems: Problem | Sequence[Problem], cause: Mapping[str, str]) -> None:
        super().__init__(problems)
        self.cause = dict(cause)

    def __reduce__(self) -> tuple[type["LibraryError"], tuple[list[Problem], dict[str, str]]]:  # type: ignore[override]
        """Pickle the problems and the cause, for sending the error between processes."""
        return LibraryError, (self.problems, self.cause)


class HeldOutError(UserError):
    """More rows are held out than a source has.

    Attributes:
        num_rows: its usable rows.
    """

    def __init__(self, problems: Problem | Sequence[Problem], num_rows: int) -> None:
        super().__init__(problems)
        self.num_rows = num_rows

    def __reduce__(self) -> tuple[type["HeldOutError"], tuple[list[Problem], int]]:  # type: ignore[override]
        """Pickle the problems and the number, for sending the error between processes."""
        return HeldOutError, (self.problems, self.num_rows)


class UserFunctionError(UserError):
    """A user function raised or returned no number: the run resumes after the function is corrected."""


class CheckFailedError(UserError):
    """A check of a result failed: the files are kept, the run is marked as failed, and the status is 4."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known name closest to ``name``, "" if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'?" if match else ""


def one_of(names: Iterable[str]) -> str:
    """Return ``one of a, b, c``, or the name if there is one only."""
    names = list(names)
    return f"one of {', '.join(names)}" if len(names) != 1 else names[0]
