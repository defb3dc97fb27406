"""Items of an evaluation suite, and what a model's answer to one is worth."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_templates.segments import Message

SCORE = "score"
"""The value by which items are averaged and compared: 1 is best for accuracy and grades."""


@dataclass(frozen=True)
class EvalItem:
    """A question of a suite.

    Attributes:
        id: unique in the suite, and the same in every evaluation of it.
        prompt: the turns up to the user's; () where a text itself is scored.
        reference: the expected answer, or the text to score.
        choices: answers to choose from, by likelihood.
        correct: indices of the correct choices.
        cluster: items that share it are not independent, such as variants of one prompt; "": the item's own.
        group: category, such as a subject; metrics are reported for each group too.
        columns: the row's columns, for graders and for the layout's metrics.
    """

    id: str
    prompt: tuple[Message, ...] = ()
    reference: str | None = None
    choices: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    cluster: str = ""
    group: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemResult:
    """What a model's answer to an item is worth.

    Attributes:
        id: of the item.
        cluster: of the item, never "".
        group: of the item.
        values: numbers that metrics are sums of, ``score`` among them; a number that does not apply to the
            item is absent.
        evidence: the prompt's text and the answer: completion, or log-probabilities of the choices.
    """

    id: str
    cluster: str
    group: str
    values: Mapping[str, float]
    evidence: Mapping[str, Any]

    @property
    def score(self) -> float | None:
        """Return the score, None if the item has none."""
        return self.values.get(SCORE)
