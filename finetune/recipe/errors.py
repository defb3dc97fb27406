"""What a user did wrong, said so that a stranger can act on it."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what was found there, what was expected, how to repair it."""

    where: str
    found: str
    expected: str
    repair: str = ""

    def __str__(self) -> str:
        """Return the mistake in at most three lines."""
        lines = [f"{self.where}: {self.found}", f"    expected: {self.expected}"]
        if self.repair:
            lines.append(f"    repair:   {self.repair}")
        return "\n".join(lines)

    def placed(self, origins: Mapping[str, str]) -> "Problem":
        """Return the mistake with the origin of its key, or else of its section, behind it.

        One of another recipe, which comes first, has its origin already.
        """
        key = self.where
        if key.endswith(")"):
            return self
        while key not in origins and (cut := max(key.rfind("."), key.rfind("["))) > 0:
            key = key[:cut]
        return replace(self, where=f"{self.where} ({origins[key]})") if key in origins else self


class UserError(Exception):
    """The user's mistakes, all that could be found at once; the command line prints them and exits with 2."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        """Keep the problems; the text of the exception is what the user reads."""
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[Problem]]]:
        """Go from process to process with the problems, not with their text."""
        return UserError, (self.problems,)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known name that looks most like ``name``, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'?" if match else ""


def one_of(names: Iterable[str]) -> str:
    """Return ``one of a, b, c``; of a single name, the name."""
    names = list(names)
    return f"one of {', '.join(names)}" if len(names) != 1 else names[0]
