"""What a run says of itself at its end: a number, what it means, and what can be done about it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that happened: numbers, what they mean, and what can be done where something should be."""

    name: str
    said: str
    means: str
    action: str = ""

    def line(self) -> str:
        """Return it as a line for the terminal."""
        mark = "!!" if self.action else "--"
        return (
            f"{mark}  {self.name:<14}{self.said}: {self.means}{f' -> {self.action}' if self.action else ''}"
        )

    def record(self) -> dict[str, Any]:
        """Return it as run.json keeps it."""
        return {**asdict(self), "warned": bool(self.action)}
